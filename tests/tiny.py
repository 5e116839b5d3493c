"""Tiny random models of every family, with weights at unit gain so that no block is near identity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

WINDOW = 8


@dataclass(frozen=True)
class Variant:
    """One way to configure a model type.

    Attributes:
        model_type: Type in transformers' spelling.
        options: Configuration beside the common sizes.
        cycle: Layer types, repeated up to the depth; empty for types without.
        attention: Attention implementation.
        types: What the configuration calls its layer types.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    cycle: tuple[str, ...] = ()
    attention: str = "sdpa"
    types: str = "layer_types"


SLIDING, FULL = "sliding_attention", "full_attention"
ROPE_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

LINEAR, HYBRID, CONV = "linear_attention", "hybrid", "conv"
MAMBA1 = {"state_size": 4, "conv_kernel": 4, "expand": 2, "time_step_rank": 3}
MAMBA2 = {"state_size": 8, "n_groups": 2, "num_heads": 8, "head_dim": 8, "expand": 2, "chunk_size": 4}
HEADS = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_expand": 2}
NEMOTRON = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}

RECURRENT: dict[str, Variant] = {
    "mamba": Variant("mamba", MAMBA1, attention="eager"),
    "mamba2": Variant("mamba2", MAMBA2, attention="eager"),
    "mamba-bias": Variant("mamba", {**MAMBA1, "use_bias": True, "use_conv_bias": False}, attention="eager"),
    "mamba2-bias": Variant("mamba2", {**MAMBA2, "use_bias": True, "use_conv_bias": False}, attention="eager"),
    "falcon_mamba": Variant("falcon_mamba", MAMBA1, attention="eager"),
    "jamba": Variant(
        "jamba",
        {
            "mamba_d_state": 4,
            "mamba_dt_rank": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
        },
    ),
    "bamba": Variant("bamba", {**HEADS, "attn_layer_indices": [1, 4]}),
    "zamba2": Variant(
        "zamba2",
        {
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "attention_head_dim": 16,
            "num_key_value_heads": 4,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "adapter_rank": 4,
            "use_mem_rope": True,
        },
        (LINEAR, HYBRID),
        types="layers_block_type",
    ),
    "zamba2-norope": Variant(
        "zamba2",
        {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8},
        (HYBRID, LINEAR),
        types="layers_block_type",
    ),
    "granitemoehybrid": Variant(
        "granitemoehybrid",
        {**HEADS, "num_local_experts": 4, "shared_intermediate_size": 32, "position_embedding_type": None},
        (LINEAR, LINEAR, FULL),
    ),
    "granitemoehybrid-dense": Variant(
        "granitemoehybrid",
        {
            **HEADS,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 64,
            "position_embedding_type": "rope",
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
        },
        (LINEAR, FULL),
    ),
    "falcon_h1": Variant(
        "falcon_h1",
        {
            **HEADS,
            "mamba_d_ssm": 64,
            "embedding_multiplier": 2.0,
            "lm_head_multiplier": 0.5,
            "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9],
            "ssm_in_multiplier": 1.3,
        },
    ),
    "falcon_h1-normed": Variant(
        "falcon_h1",
        {**HEADS, "mamba_d_ssm": 64, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_proj_bias": True},
    ),
    "nemotron_h": Variant("nemotron_h", NEMOTRON, (LINEAR, FULL, LINEAR, "moe", "mlp")),
    "lfm2": Variant("lfm2", {"conv_L_cache": 3}, (CONV, CONV, FULL)),
    "lfm2-bias": Variant("lfm2", {"conv_L_cache": 4, "conv_bias": True}, (CONV, FULL)),
}

FAMILIES: dict[str, Variant] = {
    "llama": Variant("llama"),
    "llama-eager": Variant("llama", attention="eager"),
    "llama-tied": Variant("llama", {"tie_word_embeddings": True}),
    "llama-yarn": Variant("llama", {"rope_parameters": YARN}),
    "mistral": Variant("mistral", {"sliding_window": WINDOW}),
    "mistral-nowindow": Variant("mistral", {"sliding_window": None}),
    "mistral-eager": Variant("mistral", {"sliding_window": WINDOW}, attention="eager"),
    "mixtral": Variant("mixtral", {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Variant("qwen2"),
    "qwen2-window": Variant("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW}, (FULL, SLIDING)),
    "qwen3": Variant("qwen3", {"head_dim": 16}),
    "gemma2": Variant(
        "gemma2",
        {
            "sliding_window": WINDOW,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
        },
        (SLIDING, FULL),
        "eager",
    ),
    "gemma3_text": Variant(
        "gemma3_text",
        {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16},
        (SLIDING, SLIDING, FULL),
    ),
    "phi3": Variant("phi3", {"sliding_window": WINDOW, "rope_parameters": ROPE_PARTIAL}),
    "gpt_neox": Variant("gpt_neox", {"rope_parameters": ROPE_PARTIAL}),
    "gpt_neox-sequential": Variant("gpt_neox", {"use_parallel_residual": False, "rope_parameters": ROPE_PARTIAL}),
    "gpt2": Variant("gpt2"),
    "olmo2": Variant("olmo2"),
    "starcoder2": Variant("starcoder2", {"sliding_window": WINDOW}),
    "starcoder2-nowindow": Variant("starcoder2", {"sliding_window": None}),
    **RECURRENT,
}
"""Variants by name; every row of the family table is among them."""


def tiny(
    family: str,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    depth: int = 6,
    width: int = 32,
    vocab: int = 61,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model that never ends a sequence of its own accord.

    Args:
        family: Name in ``FAMILIES``.
        dtype: Type of all weights.
        seed: Seed of the weights.
        depth: Blocks.
        width: Residual stream; a multiple of 16.
        vocab: Tokens.
        **overrides: Configuration entries that win over the variant's.
    """
    variant = FAMILIES[family]
    options: dict[str, Any] = {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "vocab_size": vocab,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **({variant.types: [variant.cycle[i % len(variant.cycle)] for i in range(depth)]} if variant.cycle else {}),
        **variant.options,
    }
    config = AutoConfig.for_model(variant.model_type, **{**options, **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=variant.attention, dtype=dtype)
    if model.config.to_dict().get("num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    redraw(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Draw all weights at unit gain; vectors stay near what they were initialised to."""
    generator = torch.Generator().manual_seed(seed)
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 1:
            parameter += 0.1 * noise.to(parameter.dtype)
        else:
            fan_in = parameter.shape[0 if id(parameter) in transposed else -1]
            parameter.copy_(noise * fan_in**-0.5)
