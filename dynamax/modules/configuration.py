"""A model's configuration out of the entries of a YAML file. Knows transformers' configurations, no weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dynamax.backbones.families import family
from dynamax.errors import UserError

TOKENIZED = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Entries of a configuration that the data decides."""


def configuration(entries: dict[str, Any]) -> PretrainedConfig:
    """The configuration that entries describe.

    Raises:
        UserError: If the model type is not in the family table, or an entry is unknown or refused.
    """
    given = dict(entries)
    model_type = given.pop("model_type", None)
    if model_type is None:
        raise UserError(f"config has no model_type: {entries}. Name one, such as llama.")
    family(model_type)
    known = AutoConfig.for_model(model_type).to_dict()
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UserError(
            f"A {model_type} configuration has no {', '.join(unknown)}. It has: {', '.join(sorted(known))}."
        )
    try:
        return AutoConfig.for_model(model_type, **given)
    except (TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        raise refused(model_type, given, error) from error


def refused(model_type: str, given: dict[str, Any], error: Exception) -> UserError:
    """What to raise where transformers does not take a configuration."""
    told = str(error).strip().splitlines()[-1].strip().rstrip(".") or type(error).__name__
    return UserError(f"The {model_type} configuration {given} was refused: {told}. Change it.")


def check_trained(entries: dict[str, Any]) -> None:
    """Refuse entries that training does not follow.

    Raises:
        UserError: If vocabulary or token ids are given, which come from the text, or dropout, which is left off.
    """
    named = sorted(TOKENIZED & set(entries))
    if named:
        raise UserError(f"config names {', '.join(named)}, which come from the tokenizer. Drop them; see data.vocab.")
    dropped = {name: value for name, value in entries.items() if "drop" in name and value}
    if dropped:
        raise UserError(f"config names {dropped}, but models are trained without dropout. Drop it.")


def check_runs(config: PretrainedConfig, given: dict[str, Any]) -> None:
    """Build a model with a handful of tokens and run it once: transformers finds some mistakes only then.

    Raises:
        UserError: If it fails.
    """
    small = copy.deepcopy(config)
    small.vocab_size = 8
    small.bos_token_id = small.eos_token_id = small.pad_token_id = 0
    try:
        with torch.no_grad():
            AutoModelForCausalLM.from_config(small)(torch.tensor([[1, 2, 3]]))
    except Exception as error:
        raise refused(config.model_type, given, error) from error


def check_depths(exits: list[int], depth: int) -> list[int]:
    """The exits, ascending.

    Raises:
        UserError: If one does not lie below the top, or stands twice.
    """
    if depth < 2:
        raise UserError(f"A model of {depth} blocks has no place for exits. Give it two or more.")
    if not exits or len(set(exits)) < len(exits) or not all(1 <= each < depth for each in exits):
        raise UserError(
            f"exits {exits} were given to a model of {depth} blocks; wanted different depths in 1 to {depth - 1}."
        )
    return sorted(exits)
