"""The family table: what differs between transformers' model types, one row a type.

Rows are explicit: a type is in the table because its logits were compared with transformers' own, never because its
modules have familiar names. Other packages may offer rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dynamax.backbones import family_functions as functions
from dynamax.backbones.mixers import Mixer, SelectiveMixer, ShortConvMixer, SSDMixer
from dynamax.backbones.plan import Plan, Rotary
from dynamax.backbones.state import LayerView, StateKind
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
    windows: Callable[[PretrainedConfig], list[int | None]] = lambda config: [None] * config.num_hidden_layers
    rotary_types: Callable[[PretrainedConfig], list[str | None]] = lambda config: [None] * config.num_hidden_layers
    rotary: Callable[[nn.Module], Rotary | None] = functions.model_rotary
    after_embedding: Callable[[Any, Tensor, Plan], Tensor] = lambda base, h_BTD, plan: h_BTD
    scale_logits: Callable[[PretrainedConfig, Tensor], Tensor] = lambda config, logits: logits
    expert_share: Callable[[PretrainedConfig], float] = lambda config: 1.0
    state_kinds: Callable[[PretrainedConfig], list[tuple[StateKind, ...]]] = lambda config: (
        [("keys",)] * config.num_hidden_layers
    )
    mixer: Callable[[nn.Module], Mixer | None] = lambda block: None
    call_block: Callable[[nn.Module, Tensor, int, dict[str, Any]], Tensor] = functions.call_with_keywords
    residual_stream: Callable[[PretrainedConfig, Tensor], Tensor] = lambda config, h_BTD: h_BTD
    uses_parameter: Callable[[PretrainedConfig, int, str], bool] = lambda config, index, name: True
    input_norm: str | None = "input_layernorm"
    keys_and_values: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = lambda block, u_BTD: functions.projected(
        block.get_submodule("self_attn"), u_BTD
    )
    write: Callable[[nn.Module, Tensor, int, dict[str, Any], LayerView, Mixer], None] | None = None


ONE_WINDOW = FamilySpec(windows=lambda config: [config.sliding_window] * config.num_hidden_layers)
"""Every block has the window that the configuration names, if it names one; there are no layer types."""

WINDOW_BY_TYPE = FamilySpec(
    windows=lambda config: [
        config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
    ]
)
"""Blocks of type ``sliding_attention`` have a window, the others none."""

RECURRENT = FamilySpec(
    embedding="embeddings",
    final_norm="norm_f",
    input_norm="norm",
    cache_argument="cache_params",
    attention="eager",
    rotary=lambda base: None,
    state_kinds=functions.state_by_layer_type,
    mixer=lambda block: functions.mixer_in(block, "dt_bias", SSDMixer),
)
"""Blocks of a recurrent mixer, Mamba-2, and nothing else."""

HYBRID = FamilySpec(state_kinds=functions.state_by_layer_type, mixer=RECURRENT.mixer)
"""Attention in some blocks, Mamba-2 in others, or both in one."""

NORMED = partial(SelectiveMixer, norms=("dt_layernorm", "b_layernorm", "c_layernorm"))
"""Mamba-1 with norms on step, B and C."""

FAMILIES: dict[str, FamilySpec] = {
    "llama": FamilySpec(),
    "mistral": ONE_WINDOW,
    "mixtral": replace(ONE_WINDOW, expert_share=functions.routed),
    "qwen2": WINDOW_BY_TYPE,
    "qwen3": WINDOW_BY_TYPE,
    "gemma2": replace(WINDOW_BY_TYPE, attention="eager", scale_logits=functions.capped_logits),
    "gemma3_text": replace(
        WINDOW_BY_TYPE,
        rotary_types=lambda config: list(config.layer_types),
        rotary=lambda base: base.get_submodule("rotary_emb"),  # takes the layer type
        scale_logits=functions.capped_logits,
    ),
    "phi3": replace(ONE_WINDOW, keys_and_values=functions.rows_of_fused_projection),
    "gpt_neox": FamilySpec(
        embedding="embed_in",
        final_norm="final_layer_norm",
        cache_argument="layer_past",
        keys_and_values=functions.heads_of_fused_projection,
    ),
    "gpt2": FamilySpec(
        embedding="wte",
        blocks="h",
        final_norm="ln_f",
        rotary=lambda base: None,
        after_embedding=lambda base, h_BTD, plan: h_BTD + base.wpe(plan.positions_BT),
        input_norm="ln_1",
        keys_and_values=functions.columns_of_fused_projection,
    ),
    "olmo2": FamilySpec(input_norm=None),
    "starcoder2": ONE_WINDOW,
    "mamba": replace(RECURRENT, mixer=lambda block: functions.mixer_in(block, "x_proj", SelectiveMixer)),
    "mamba2": RECURRENT,
    "falcon_mamba": replace(RECURRENT, mixer=lambda block: functions.mixer_in(block, "x_proj", NORMED)),
    "jamba": replace(
        HYBRID,
        final_norm="final_layernorm",
        rotary=lambda base: None,
        expert_share=functions.routed,
        mixer=lambda block: functions.mixer_in(block, "x_proj", NORMED),
    ),
    "bamba": replace(HYBRID, final_norm="final_layernorm"),
    "zamba2": replace(  # its shared blocks read the word embeddings again, which go along as a second half of channels
        HYBRID,
        final_norm="final_layernorm",
        rotary=functions.optional_rotary,
        after_embedding=lambda base, h_BTD, plan: torch.cat([h_BTD, h_BTD], -1),
        call_block=functions.call_with_embedding,
        residual_stream=lambda config, h_BTD: h_BTD[..., : config.hidden_size],
        uses_parameter=functions.own_adapter,
        mixer=lambda block: functions.mixer_in(block, "dt_bias", functions.unclamped_mamba2),
        write=functions.write_behind_shared_transformer,
    ),
    "granitemoehybrid": replace(
        HYBRID,
        rotary=functions.optional_rotary,
        after_embedding=lambda base, h_BTD, plan: h_BTD * base.embedding_multiplier,
        scale_logits=lambda config, logits: logits / config.logits_scaling,
        expert_share=functions.routed,
    ),
    "falcon_h1": replace(
        HYBRID,
        final_norm="final_layernorm",
        after_embedding=lambda base, h_BTD, plan: h_BTD * base.embedding_multiplier,
        scale_logits=lambda config, logits: logits * config.lm_head_multiplier,
        mixer=lambda block: functions.mixer_in(block, "dt_bias", functions.scaled_mamba2),
        keys_and_values=functions.scaled_projections,
    ),
    "nemotron_h": replace(
        HYBRID,
        embedding="embeddings",
        final_norm="norm_f",
        rotary=lambda base: None,
        expert_share=functions.routed,
        mixer=lambda block: functions.mixer_in(block, "dt_bias", functions.unclamped_mamba2),
        input_norm="norm",
        keys_and_values=lambda block, u_BTD: functions.projected(block.get_submodule("mixer"), u_BTD),
    ),
    "lfm2": replace(
        HYBRID,
        final_norm="embedding_norm",
        mixer=lambda block: functions.mixer_in(block, "in_proj", ShortConvMixer),
        input_norm="operator_norm",
    ),
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
