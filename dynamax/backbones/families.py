"""The family table: what differs between transformers' model types, one row a type.

Rows are explicit: a type is in the table because its logits were compared with transformers' own, never because its
modules have familiar names. A row names small functions of ``family_functions``. Other packages may offer rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from dynamax.backbones import costs, family_state
from dynamax.backbones import family_functions as functions
from dynamax.backbones.mixers import Mixer
from dynamax.backbones.plan import Rotary, StepPlan
from dynamax.backbones.state import LayerView
from dynamax.errors import UserError
from dynamax.registry import FAMILIES as PLUGINS
from dynamax.registry import near


@dataclass(frozen=True)
class FamilySpec:
    """How one model type is driven block by block: all that is special of it, with Llama's ways as defaults.

    ``base`` is the model without its output matrix, ``config`` its configuration; a list has an entry for each block.

    Attributes:
        embedding: Name of the embedding matrix in ``base``.
        blocks: Name of the list of blocks in ``base``.
        final_norm: Name of the final norm in ``base``.
        cache_argument: Keyword by which a block takes its cache.
        attention: Attention implementation to load with: ``sdpa``, or ``eager`` where nothing else is exact.
        windows: ``config`` to a list: how many positions a row of the block sees, its own included; None for all.
        rotary_types: ``config`` to a list: which of the model's rotary angles the block takes; None for the only ones.
        rotary: ``base`` to the function that gives rotary angles; None for a model without.
        after_embedding: ``(base, h_BTD, plan)`` to the input of block 0; ``h_BTD`` are the word embeddings.
        scale_logits: ``(config, logits)`` to logits, of one shape: a factor or a cap behind the output matrix.
        expert_share: ``config`` to the part, in (0, 1], of a block's experts that one position uses.
        state_kinds: ``config`` to a list: what the block keeps: keys, a recurrent state, both, neither.
        mixer: A block to what continues its recurrent state; None for a block without.
        call_block: ``(block, h_BTD, index, keywords)`` to ``h_BTD``, the block's output.
        residual_stream: ``(config, h_BTD)`` to the channels of ``h_BTD`` that the final norm reads.
        uses_parameter: ``(config, index, name)``: whether the block uses a parameter that it holds, for its costs.
        input_norm: Name of the norm that a block's input passes before it is projected; None for none.
        keys_and_values: ``(block, u_BTD)`` to ``(k_BHTD, v_BHTD)``, keys not yet turned to their positions.
        write: How a block's state is written where more than norm and projections has to run; None elsewhere.
    """

    embedding: str = "embed_tokens"
    blocks: str = "layers"
    final_norm: str = "norm"
    cache_argument: str = "past_key_values"
    attention: str = "sdpa"
    windows: Callable[[PretrainedConfig], functions.Windows] = functions.no_windows
    rotary_types: Callable[[PretrainedConfig], functions.RotaryTypes] = functions.one_rotary_type
    rotary: Callable[[nn.Module], Rotary | None] = functions.model_rotary
    after_embedding: Callable[[nn.Module, Tensor, StepPlan], Tensor] = functions.embedding_as_is
    scale_logits: Callable[[PretrainedConfig, Tensor], Tensor] = functions.logits_as_is
    expert_share: Callable[[PretrainedConfig], float] = costs.dense
    state_kinds: Callable[[PretrainedConfig], functions.StateKinds] = functions.keys_only
    mixer: Callable[[nn.Module], Mixer | None] = functions.no_mixer
    call_block: Callable[[nn.Module, Tensor, int, dict[str, Any]], Tensor] = functions.call_with_keywords
    residual_stream: Callable[[PretrainedConfig, Tensor], Tensor] = functions.all_channels
    uses_parameter: Callable[[PretrainedConfig, int, str], bool] = costs.all_used
    input_norm: str | None = "input_layernorm"
    keys_and_values: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = family_state.separate_projections
    write: Callable[[nn.Module, Tensor, int, dict[str, Any], LayerView, Mixer], None] | None = None


RECURRENT = FamilySpec(
    embedding="embeddings",
    final_norm="norm_f",
    input_norm="norm",
    cache_argument="cache_params",
    attention="eager",
    rotary=functions.no_rotary,
    state_kinds=functions.state_by_layer_type,
)
"""Blocks of a recurrent mixer and nothing else."""

HYBRID = FamilySpec(state_kinds=functions.state_by_layer_type, mixer=functions.mamba2_mixer)
"""Attention in some blocks, Mamba-2 in others, or both in one."""

FAMILIES: dict[str, FamilySpec] = {
    "llama": FamilySpec(),
    "mistral": FamilySpec(windows=functions.one_window),
    "mixtral": FamilySpec(windows=functions.one_window, expert_share=costs.routed),
    "qwen2": FamilySpec(windows=functions.windows_by_layer_type),
    "qwen3": FamilySpec(windows=functions.windows_by_layer_type),
    "gemma2": FamilySpec(
        attention="eager", windows=functions.windows_by_layer_type, scale_logits=functions.capped_logits
    ),
    "gemma3_text": FamilySpec(
        windows=functions.windows_by_layer_type,
        rotary_types=functions.rotary_type_by_layer_type,
        rotary=functions.rotary_by_layer_type,
        scale_logits=functions.capped_logits,
    ),
    "phi3": FamilySpec(windows=functions.one_window, keys_and_values=family_state.rows_of_fused_projection),
    "gpt_neox": FamilySpec(
        embedding="embed_in",
        final_norm="final_layer_norm",
        cache_argument="layer_past",
        keys_and_values=family_state.heads_of_fused_projection,
    ),
    "gpt2": FamilySpec(
        embedding="wte",
        blocks="h",
        final_norm="ln_f",
        rotary=functions.no_rotary,
        after_embedding=functions.add_learned_positions,
        input_norm="ln_1",
        keys_and_values=family_state.columns_of_fused_projection,
    ),
    "olmo2": FamilySpec(input_norm=None),
    "starcoder2": FamilySpec(windows=functions.one_window),
    "mamba": replace(RECURRENT, mixer=functions.mamba1_mixer),
    "mamba2": replace(RECURRENT, mixer=functions.mamba2_mixer),
    "falcon_mamba": replace(RECURRENT, mixer=functions.mamba1_mixer_normed),
    "jamba": replace(
        HYBRID,
        final_norm="final_layernorm",
        rotary=functions.no_rotary,
        expert_share=costs.routed,
        mixer=functions.mamba1_mixer_normed,
    ),
    "bamba": replace(HYBRID, final_norm="final_layernorm"),
    "zamba2": replace(
        HYBRID,
        final_norm="final_layernorm",
        rotary=functions.optional_rotary,
        after_embedding=functions.repeated_embedding,
        call_block=functions.call_with_embedding,
        residual_stream=functions.first_half_of_channels,
        uses_parameter=costs.own_adapter,
        mixer=functions.mamba2_mixer_unclamped,
        write=family_state.write_behind_shared_transformer,
    ),
    "granitemoehybrid": replace(
        HYBRID,
        rotary=functions.optional_rotary,
        after_embedding=functions.scaled_embedding,
        scale_logits=functions.divided_logits,
        expert_share=costs.routed,
    ),
    "falcon_h1": replace(
        HYBRID,
        final_norm="final_layernorm",
        after_embedding=functions.scaled_embedding,
        scale_logits=functions.multiplied_logits,
        mixer=functions.mamba2_mixer_scaled,
        keys_and_values=family_state.scaled_projections,
    ),
    "nemotron_h": replace(
        HYBRID,
        embedding="embeddings",
        final_norm="norm_f",
        rotary=functions.no_rotary,
        expert_share=costs.routed,
        mixer=functions.mamba2_mixer_unclamped,
        input_norm="norm",
        keys_and_values=family_state.mixer_projections,
    ),
    "lfm2": replace(HYBRID, final_norm="embedding_norm", mixer=functions.short_conv_mixer, input_norm="operator_norm"),
}


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
    if model_type not in offered:
        known = sorted({*FAMILIES, *offered})
        raise UserError(
            f"The model type {model_type!r} is not in the family table.{near(model_type, known)} Known: "
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
