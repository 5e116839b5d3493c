"""The family table: what differs between transformers' model types, one row a type.

Rows are explicit: a type is in the table because its logits were compared with transformers' own, never because its
modules have familiar names. Other packages may offer rows.
"""

from __future__ import annotations

from dynamax.backbones.family_spec import FamilySpec
from dynamax.backbones.recurrent_families import RECURRENT_FAMILIES
from dynamax.backbones.transformer_families import TRANSFORMER_FAMILIES
from dynamax.errors import UserError
from dynamax.registry import FAMILIES as PLUGINS
from dynamax.registry import near

__all__ = ["FAMILIES", "REFUSED", "FamilySpec", "family"]

FAMILIES: dict[str, FamilySpec] = {**TRANSFORMER_FAMILIES, **RECURRENT_FAMILIES}
"""Rows by model type."""

REFUSED: dict[str, str] = {
    "gemma3n": "its blocks take inputs of their own for each layer and several residual streams",
    "gemma3n_text": "its blocks take inputs of their own for each layer and several residual streams",
    "gemma4": "its blocks take inputs of their own for each layer, and some read the keys of others",
    "gemma4_text": "its blocks take inputs of their own for each layer, and some read the keys of others",
    "llama4": "it sees images; of its text alone, blocks attend within chunks, for which there is no mask yet",
    "llama4_text": "some of its blocks attend within chunks, for which there is no mask yet",
    "mpt": "its attention takes one bias for all rows of a batch and asks its cache for one length",
    "olmo_hybrid": "its recurrent blocks have no mixer here yet",
    "recurrent_gemma": "its recurrent blocks keep their state in themselves, where nothing can be rolled back",
    "rwkv": "its blocks take and give their state as an argument, not by a cache",
    "xlstm": "its blocks take and give their state as an argument, not by a cache",
}
"""Model types that were tried and do not come out exact, and why."""

NEAR = 0.8
"""How alike a known type must be to be suggested: names that merely sound alike are other architectures."""


def family(model_type: str) -> FamilySpec:
    """The row of a model type: of the table here, else of an installed package.

    Raises:
        UserError: If there is none, near and known types are named; if two are offered; if what a package offers is no
            ``FamilySpec``.
    """
    offered = PLUGINS.names()
    if model_type in FAMILIES and model_type in offered:
        raise UserError(
            f"The model type {model_type!r} is in the family table, and an installed package offers another row, "
            f"{PLUGINS.find(model_type).value}. Uninstall the package, or remove its entry point."
        )
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED and model_type not in offered:
        raise UserError(
            f"The model type {model_type!r} cannot be driven block by block: {REFUSED[model_type]}. Use a model of "
            f"another type (dynamax list families), or write a Backbone of your own."
        )
    if model_type not in offered:
        known = sorted({*FAMILIES, *offered})
        raise UserError(
            f"The model type {model_type!r} is not in the family table.{near(model_type, known, cutoff=NEAR)} Known: "
            f"{', '.join(known)}. Use one of these, offer a FamilySpec by an entry point of the group "
            f"dynamax.families, or write a Backbone of your own; prove either with dynamax.testing.check_backbone."
        )
    row: object = PLUGINS.get(model_type)
    if not isinstance(row, FamilySpec):
        raise UserError(
            f"The model family {model_type} of {PLUGINS.find(model_type).value} is {row!r:.80}; a FamilySpec of "
            f"dynamax.backbones.families is wanted. Let the entry point name one."
        )
    return row
