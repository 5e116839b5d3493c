"""Rows of the family table: types with recurrent blocks, Mamba and others, alone or beside attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from dynamax.backbones import family_functions as functions
from dynamax.backbones.attention_functions import projected, scaled_projections
from dynamax.backbones.delta_mixer import GatedDeltaMixer
from dynamax.backbones.family_spec import FamilySpec
from dynamax.backbones.mixers import SelectiveMixer, ShortConvMixer, SSDMixer

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

RECURRENT_FAMILIES: dict[str, FamilySpec] = {
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
        keys_and_values=scaled_projections,
    ),
    "nemotron_h": replace(
        HYBRID,
        embedding="embeddings",
        final_norm="norm_f",
        rotary=lambda base: None,
        expert_share=functions.routed,
        mixer=lambda block: functions.mixer_in(block, "dt_bias", functions.unclamped_mamba2),
        input_norm="norm",
        keys_and_values=lambda block, u_BTD: projected(block.get_submodule("mixer"), u_BTD),
    ),
    "lfm2": replace(
        HYBRID,
        final_norm="embedding_norm",
        mixer=lambda block: functions.mixer_in(block, "in_proj", ShortConvMixer),
        input_norm="operator_norm",
    ),
    "lfm2_moe": replace(
        HYBRID,
        final_norm="embedding_norm",
        rotary=partial(functions.model_rotary, name="pos_emb"),
        expert_share=functions.routed,
        mixer=lambda block: functions.mixer_in(block, "in_proj", ShortConvMixer),
        input_norm="operator_norm",
    ),
    "qwen3_next": replace(
        HYBRID, expert_share=functions.routed, mixer=lambda block: functions.mixer_in(block, "dt_bias", GatedDeltaMixer)
    ),
}
