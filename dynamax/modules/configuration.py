"""A model's configuration out of the entries of a YAML file. Knows transformers' configurations, no weights."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from dynamax.backbones.families import family


def configuration(entries: dict[str, Any]) -> PretrainedConfig:
    """The configuration that entries describe.

    Raises:
        ValueError: If the model type is not in the family table, or an entry is unknown or refused.
    """
    given = dict(entries)
    model_type = given.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"config has no model_type: {entries}. Name one, such as llama.")
    family(model_type)
    known = AutoConfig.for_model(model_type).to_dict()
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"A {model_type} configuration has no {', '.join(unknown)}. It has: {', '.join(sorted(known))}."
        )
    try:
        return AutoConfig.for_model(model_type, **given)
    except (TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(f"The {model_type} configuration {given} was refused: {error}. Change it.") from error


def check_depths(exits: list[int], depth: int) -> list[int]:
    """The exits, ascending.

    Raises:
        ValueError: If one does not lie below the top, or stands twice.
    """
    if not exits or len(set(exits)) < len(exits) or not all(1 <= each < depth for each in exits):
        raise ValueError(
            f"exits {exits} were given to a model of {depth} blocks; wanted different depths in 1 to {depth - 1}."
        )
    return sorted(exits)
