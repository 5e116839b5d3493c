"""The family table: what differs between transformers' model types, one row a type.

Rows are explicit: a type is in the table because its logits were compared with transformers' own,
never because its modules have familiar names. A row names small functions of ``family_functions``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from dynamax.backbones import costs, family_state
from dynamax.backbones import family_functions as functions
from dynamax.backbones.mixers import Mixer
from dynamax.backbones.plan import Rotary, StepPlan
from dynamax.backbones.state import LayerView
from dynamax.errors import UserError


@dataclass(frozen=True)
class FamilySpec:
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
        input_norm: Name of the norm that a block's input passes before it is projected; None for none.
        keys_and_values: ``(block, u_BTD) -> (k_BHTD, v_BHTD)``, keys not yet turned to their positions.
        write: How a block's state is written where more than norm and projections has to run; None elsewhere.
    """

    embedding: str = "embed_tokens"
    blocks: str = "layers"
    norm: str = "norm"
    cache: str = "past_key_values"
    attention: str = "sdpa"
    windows: Callable[[PretrainedConfig], functions.Windows] = functions.unbounded
    kinds: Callable[[PretrainedConfig], functions.Kinds] = functions.one_kind
    rotary: Callable[[nn.Module], Rotary | None] = functions.shared_rotary
    place: Callable[[nn.Module, Tensor, StepPlan], Tensor] = functions.tokens_only
    logits: Callable[[PretrainedConfig, Tensor], Tensor] = functions.plain_logits
    experts: Callable[[PretrainedConfig], float] = costs.dense
    parts: Callable[[PretrainedConfig], functions.Parts] = functions.only_keys
    mixer: Callable[[nn.Module], Mixer | None] = functions.no_mixer
    call: Callable[[nn.Module, Tensor, int, dict[str, Any]], Tensor] = functions.plainly
    residual: Callable[[PretrainedConfig, Tensor], Tensor] = functions.whole
    used: Callable[[PretrainedConfig, int, str], bool] = costs.all_used
    input_norm: str | None = "input_layernorm"
    keys_and_values: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = family_state.separate_projections
    write: Callable[[nn.Module, Tensor, int, dict[str, Any], LayerView, Mixer], None] | None = None


PURE = FamilySpec(
    embedding="embeddings",
    norm="norm_f",
    input_norm="norm",
    cache="cache_params",
    attention="eager",
    rotary=functions.no_rotary,
    parts=functions.parts_by_type,
)
"""Blocks of a recurrent mixer and nothing else."""

HYBRID = FamilySpec(parts=functions.parts_by_type, mixer=functions.ssd)
"""Attention in some blocks, Mamba-2 in others, or both in one."""

FAMILIES: dict[str, FamilySpec] = {
    "llama": FamilySpec(),
    "mistral": FamilySpec(windows=functions.same_window),
    "mixtral": FamilySpec(windows=functions.same_window, experts=costs.routed),
    "qwen2": FamilySpec(windows=functions.windows_by_type),
    "qwen3": FamilySpec(windows=functions.windows_by_type),
    "gemma2": FamilySpec(attention="eager", windows=functions.windows_by_type, logits=functions.capped_logits),
    "gemma3_text": FamilySpec(
        windows=functions.windows_by_type,
        kinds=functions.kinds_by_type,
        rotary=functions.rotary_by_type,
        logits=functions.capped_logits,
    ),
    "phi3": FamilySpec(windows=functions.same_window, keys_and_values=family_state.rows_of_fused_projection),
    "gpt_neox": FamilySpec(
        embedding="embed_in",
        norm="final_layer_norm",
        cache="layer_past",
        keys_and_values=family_state.heads_of_fused_projection,
    ),
    "gpt2": FamilySpec(
        embedding="wte",
        blocks="h",
        norm="ln_f",
        rotary=functions.no_rotary,
        place=functions.learned_positions,
        input_norm="ln_1",
        keys_and_values=family_state.columns_of_fused_projection,
    ),
    "olmo2": FamilySpec(input_norm=None),
    "starcoder2": FamilySpec(windows=functions.same_window),
    "mamba": replace(PURE, mixer=functions.selective),
    "mamba2": replace(PURE, mixer=functions.ssd),
    "falcon_mamba": replace(PURE, mixer=functions.normed_selective),
    "jamba": replace(
        HYBRID,
        norm="final_layernorm",
        rotary=functions.no_rotary,
        experts=costs.routed,
        mixer=functions.normed_selective,
    ),
    "bamba": replace(HYBRID, norm="final_layernorm"),
    "zamba2": replace(
        HYBRID,
        norm="final_layernorm",
        rotary=functions.rotary_if_wanted,
        place=functions.twice,
        call=functions.beside_embedding,
        residual=functions.first_half,
        used=costs.own_adapter,
        mixer=functions.free_ssd,
        write=family_state.write_behind_shared_transformer,
    ),
    "granitemoehybrid": replace(
        HYBRID,
        rotary=functions.rotary_if_wanted,
        place=functions.multiplied,
        logits=functions.divided_logits,
        experts=costs.routed,
    ),
    "falcon_h1": replace(
        HYBRID,
        norm="final_layernorm",
        place=functions.multiplied,
        logits=functions.multiplied_logits,
        mixer=functions.scaled_ssd,
        keys_and_values=family_state.scaled_projections,
    ),
    "nemotron_h": replace(
        HYBRID,
        embedding="embeddings",
        norm="norm_f",
        rotary=functions.no_rotary,
        experts=costs.routed,
        mixer=functions.free_ssd,
        input_norm="norm",
        keys_and_values=family_state.mixer_projections,
    ),
    "lfm2": replace(HYBRID, norm="embedding_norm", mixer=functions.short_convolution, input_norm="operator_norm"),
}


def family(model_type: str) -> FamilySpec:
    """The row of a model type.

    Raises:
        UserError: If the table has no such row; near and known types are named.
    """
    if model_type not in FAMILIES:
        near = get_close_matches(model_type, FAMILIES, n=3, cutoff=0.5)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise UserError(
            f"The model type {model_type!r} is not in the family table.{hint} Known: {', '.join(sorted(FAMILIES))}. "
            f"Use one of these, or write a Backbone of your own and prove it with dynamax.testing.check_backbone."
        )
    return FAMILIES[model_type]
