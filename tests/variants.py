"""How the laws configure each model type: tiny, with odd settings that other families do not have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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


ALONE = {"num_key_value_heads": None}  # such types know no groups
W = {"sliding_window": WINDOW}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MULTIPLIERS = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
BETA = {**YARN, "llama_4_scaling_beta": 0.1}
LATENT = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    **EXPERTS,
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
    "lfm2_moe": Variant(
        "lfm2_moe", {**EXPERTS, "conv_L_cache": 3, "num_experts": 4, "num_dense_layers": 2}, (CONV, CONV, FULL)
    ),
    "qwen3_next": Variant(
        "qwen3_next",
        {
            **EXPERTS,
            "num_experts": 4,
            "head_dim": 16,
            "rope_parameters": ROPE_PARTIAL,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 8,
        },
        (LINEAR, LINEAR, FULL),
    ),
}

TRANSFORMERS: dict[str, Variant] = {
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
    "gpt_neox": Variant("gpt_neox", {**ALONE, "rope_parameters": ROPE_PARTIAL}),
    "gpt_neox-sequential": Variant(
        "gpt_neox", {**ALONE, "use_parallel_residual": False, "rope_parameters": ROPE_PARTIAL}
    ),
    "gpt2": Variant("gpt2", ALONE),
    "olmo2": Variant("olmo2"),
    "starcoder2": Variant("starcoder2", {"sliding_window": WINDOW}),
    "starcoder2-nowindow": Variant("starcoder2", {"sliding_window": None}),
    "apertus": Variant("apertus"),
    "arcee": Variant("arcee", {"mlp_bias": True}),
    "bloom": Variant("bloom", ALONE, attention="eager"),
    "cohere": Variant("cohere", {"use_qk_norm": True, "logit_scale": 0.25, "tie_word_embeddings": True}),
    "cohere2": Variant("cohere2", {**W, "head_dim": 8, "logit_scale": 0.25}, (SLIDING, SLIDING, FULL)),
    "deepseek_v2": Variant("deepseek_v2", {**LATENT, "q_lora_rank": None}),
    "deepseek_v3": Variant("deepseek_v3", {**LATENT, "q_lora_rank": 10}),
    "deepseek_v3-halves": Variant("deepseek_v3", {**LATENT, "q_lora_rank": 10, "rope_interleave": False}),
    "exaone4": Variant("exaone4", W, (SLIDING, SLIDING, FULL)),
    "falcon": Variant("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon-one-key": Variant("falcon", {"new_decoder_architecture": False, "multi_query": True, "bias": True}),
    "gemma": Variant("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "glm": Variant("glm", {"head_dim": 8, "attention_bias": True}),
    "glm4": Variant("glm4", {"head_dim": 8}),
    "gpt_bigcode": Variant("gpt_bigcode"),
    "gpt_bigcode-keys": Variant("gpt_bigcode", {"multi_query": False}),
    "gpt_oss": Variant("gpt_oss", {**W, **EXPERTS, "head_dim": 8, "num_local_experts": 4}, (SLIDING, FULL), "eager"),
    "gptj": Variant("gptj", {**ALONE, "rotary_dim": 4}, attention="eager"),
    "granite": Variant("granite", MULTIPLIERS),
    "granitemoe": Variant("granitemoe", {**MULTIPLIERS, **EXPERTS, "num_local_experts": 4}),
    "helium": Variant("helium", {"head_dim": 8}),
    "ministral": Variant("ministral", {**W, "head_dim": 16}, (SLIDING, FULL)),
    "ministral3": Variant("ministral3", {**W, "head_dim": 16, "rope_parameters": BETA}),
    "nanochat": Variant("nanochat", {"final_logit_softcapping": 3.0}),
    "nemotron": Variant("nemotron", {"rope_parameters": ROPE_PARTIAL}),
    "olmo": Variant("olmo", {"clip_qkv": 1.0}),
    "olmo3": Variant("olmo3", W, (SLIDING, FULL)),
    "olmoe": Variant("olmoe", {**EXPERTS, "num_experts": 4, "clip_qkv": 1.0}),
    "opt": Variant("opt", {**ALONE, "ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": True}),
    "phi": Variant("phi", {"rope_parameters": ROPE_PARTIAL, "qk_layernorm": True}),
    "qwen2_moe": Variant("qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": Variant("qwen3_moe", {**EXPERTS, "num_experts": 4, "head_dim": 16, "decoder_sparse_step": 2}),
    "seed_oss": Variant("seed_oss", {"head_dim": 16}),
    "smollm3": Variant("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 3}),
    "stablelm": Variant("stablelm", {"rope_parameters": ROPE_PARTIAL, "use_qkv_bias": True}),
    "stablelm-parallel": Variant(
        "stablelm", {"rope_parameters": ROPE_PARTIAL, "use_parallel_residual": True, "qk_layernorm": True}
    ),
}
"""Variants of Transformers by name."""

FAMILIES = {**TRANSFORMERS, **RECURRENT}
"""Variants by name; every row of the family table is among them."""

ALIKE = {
    *("apertus", "arcee", "gemma", "glm4", "gpt_bigcode-keys", "granite", "helium", "ministral", "ministral3"),
    *("mistral-nowindow", "nanochat", "nemotron", "olmo", "olmo3", "qwen2", "seed_oss", "starcoder2"),
    *("starcoder2-nowindow", "stablelm-parallel"),
}
"""Variants whose blocks call nothing that those of others do not."""
DISTINCT = [name for name in FAMILIES if name not in ALIKE]
"""The others: what holds of these in the machinery around blocks holds of all."""
