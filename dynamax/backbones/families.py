"""The family table: what differs between transformers' model types, one row a type.

Rows are explicit: a type is in the table because its logits were compared with transformers' own,
never because its modules have familiar names. A row names small functions of ``traits``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from dynamax.backbones import shapes, traits
from dynamax.backbones.cells import Part
from dynamax.backbones.chunk import Chunk, Rotary
from dynamax.backbones.mixers import Mixer


@dataclass(frozen=True)
class Row:
    """How one model type is driven block by block.

    Attributes:
        embedding: Name of the embedding matrix in the base model.
        blocks: Name of the list of blocks.
        norm: Name of the final norm.
        cache: Keyword by which a block takes its cache.
        attention: Attention implementation to load with: ``sdpa``, or ``eager`` where nothing else is exact.
        windows: Positions each block sees.
        kinds: Kind of rotary angles of each block.
        rotary: Rotary angles of a base model, or None.
        place: What is added to word embeddings.
        logits: What is done to raw logits.
        experts: Part of the experts that a position uses.
        parts: What each block keeps: keys, a recurrent state, both, neither.
        mixer: What continues the recurrent state of a block; None for a block without.
        call: How a block is called.
        residual: The part of a block's rows that is the residual stream.
        used: Whether a block uses a parameter that it holds.
        first: What a block that keeps both writes first.
    """

    embedding: str = "embed_tokens"
    blocks: str = "layers"
    norm: str = "norm"
    cache: str = "past_key_values"
    attention: str = "sdpa"
    windows: Callable[[PretrainedConfig], traits.Windows] = traits.unbounded
    kinds: Callable[[PretrainedConfig], traits.Kinds] = traits.one_kind
    rotary: Callable[[nn.Module], Rotary | None] = traits.shared_rotary
    place: Callable[[nn.Module, Tensor, Chunk], Tensor] = traits.tokens_only
    logits: Callable[[PretrainedConfig, Tensor], Tensor] = traits.plain_logits
    experts: Callable[[PretrainedConfig], float] = shapes.dense
    parts: Callable[[PretrainedConfig], traits.Parts] = traits.only_keys
    mixer: Callable[[nn.Module], Mixer | None] = traits.no_mixer
    call: Callable[[nn.Module, Tensor, int, dict[str, Any]], Tensor] = traits.plainly
    residual: Callable[[PretrainedConfig, Tensor], Tensor] = traits.whole
    used: Callable[[PretrainedConfig, int, str], bool] = shapes.all_used
    first: Part = "keys"


PURE = Row(
    embedding="embeddings",
    norm="norm_f",
    cache="cache_params",
    attention="eager",
    rotary=traits.no_rotary,
    parts=traits.parts_by_type,
)
"""Blocks of a recurrent mixer and nothing else."""

HYBRID = Row(parts=traits.parts_by_type, mixer=traits.ssd)
"""Attention in some blocks, Mamba-2 in others, or both in one."""

FAMILIES: dict[str, Row] = {
    "llama": Row(),
    "mistral": Row(windows=traits.same_window),
    "mixtral": Row(windows=traits.same_window, experts=shapes.routed),
    "qwen2": Row(windows=traits.windows_by_type),
    "qwen3": Row(windows=traits.windows_by_type),
    "gemma2": Row(attention="eager", windows=traits.windows_by_type, logits=traits.capped_logits),
    "gemma3_text": Row(
        windows=traits.windows_by_type,
        kinds=traits.kinds_by_type,
        rotary=traits.rotary_by_type,
        logits=traits.capped_logits,
    ),
    "phi3": Row(windows=traits.same_window),
    "gpt_neox": Row(embedding="embed_in", norm="final_layer_norm", cache="layer_past"),
    "gpt2": Row(embedding="wte", blocks="h", norm="ln_f", rotary=traits.no_rotary, place=traits.learned_positions),
    "olmo2": Row(),
    "starcoder2": Row(windows=traits.same_window),
    "mamba": replace(PURE, mixer=traits.selective),
    "mamba2": replace(PURE, mixer=traits.ssd),
    "falcon_mamba": replace(PURE, mixer=traits.normed_selective),
    "jamba": replace(
        HYBRID, norm="final_layernorm", rotary=traits.no_rotary, experts=shapes.routed, mixer=traits.normed_selective
    ),
    "bamba": replace(HYBRID, norm="final_layernorm"),
    "zamba2": replace(
        HYBRID,
        norm="final_layernorm",
        rotary=traits.rotary_if_wanted,
        place=traits.twice,
        call=traits.beside_embedding,
        residual=traits.first_half,
        used=shapes.own_adapter,
        mixer=traits.free_ssd,
    ),
    "granitemoehybrid": replace(
        HYBRID,
        rotary=traits.rotary_if_wanted,
        place=traits.multiplied,
        logits=traits.divided_logits,
        experts=shapes.routed,
    ),
    "falcon_h1": replace(
        HYBRID,
        norm="final_layernorm",
        place=traits.multiplied,
        logits=traits.multiplied_logits,
        mixer=traits.scaled_ssd,
        first="recurrent",
    ),
    "nemotron_h": replace(
        HYBRID,
        embedding="embeddings",
        norm="norm_f",
        rotary=traits.no_rotary,
        experts=shapes.routed,
        mixer=traits.free_ssd,
    ),
    "lfm2": replace(HYBRID, norm="embedding_norm", mixer=traits.short_convolution),
}


def family(model_type: str) -> Row:
    """The row of a model type.

    Raises:
        ValueError: If the table has no such row; near and known types are named.
    """
    if model_type not in FAMILIES:
        near = get_close_matches(model_type, FAMILIES, n=3, cutoff=0.5)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise ValueError(
            f"The model type {model_type!r} is not in the family table.{hint} Known: {', '.join(sorted(FAMILIES))}. "
            f"Use one of these, or write a Backbone of your own and prove it with dynamax.testing.check_backbone."
        )
    return FAMILIES[model_type]
