"""Rows of the family table: Transformers, whose blocks all attend."""

from __future__ import annotations

from dataclasses import replace

from dynamax.backbones import attention_functions as attention
from dynamax.backbones import family_functions as functions
from dynamax.backbones.family_spec import FamilySpec

ONE_WINDOW = FamilySpec(windows=lambda config: [config.sliding_window] * config.num_hidden_layers)
"""Every block has the window that the configuration names, if it names one; there are no layer types."""

WINDOW_BY_TYPE = FamilySpec(
    windows=lambda config: [
        config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
    ]
)
"""Blocks of type ``sliding_attention`` have a window, the others none."""

ROTARY_BY_TYPE = replace(
    WINDOW_BY_TYPE,
    rotary_types=lambda config: list(config.layer_types),
    rotary=lambda base: base.get_submodule("rotary_emb"),  # takes the layer type
)
"""Besides, each type of block has rotary angles of its own."""

SCALED = FamilySpec(
    after_embedding=lambda base, h_BTD, plan: h_BTD * base.embedding_multiplier,
    scale_logits=lambda config, logits: logits / config.logits_scaling,
)
"""Embeddings are multiplied and logits divided by constants (Granite)."""

LATENT = FamilySpec(
    expert_share=functions.routed,
    keys_and_values=attention.latents,
    turned="values",
    attention_cost=attention.latent_cost,
)
"""Attention over latents, of which a head makes its keys and values (DeepSeek)."""

GPT = FamilySpec(
    embedding="wte",
    blocks="h",
    final_norm="ln_f",
    rotary=lambda base: None,
    input_norm="ln_1",
)
"""Names as in GPT-2."""

TRANSFORMER_FAMILIES: dict[str, FamilySpec] = {
    "llama": FamilySpec(),
    "apertus": FamilySpec(input_norm="attention_layernorm"),
    "arcee": FamilySpec(),
    "bloom": replace(
        GPT,
        embedding="word_embeddings",
        attention="eager",
        cache_argument="layer_past",
        after_embedding=lambda base, h_BTD, plan: base.word_embeddings_layernorm(h_BTD),
        call_block=functions.call_without_alibi,
        input_norm="input_layernorm",
        keys_and_values=attention.bloom_projections,
        slopes=attention.alibi_slopes,
    ),
    "cohere": FamilySpec(scale_logits=functions.multiplied_logits),
    "cohere2": replace(WINDOW_BY_TYPE, scale_logits=functions.multiplied_logits, turn=attention.turned_where_used),
    "deepseek_v2": replace(
        LATENT,
        rotary=attention.complex_rotary,
        call_block=functions.call_with_complex_angles,
        turn=attention.turned_as_complex,
    ),
    "deepseek_v3": replace(LATENT, keys_and_values=attention.parted_latents),
    "exaone4": replace(WINDOW_BY_TYPE, input_norm=None, turn=attention.turned_where_used),
    "falcon": replace(
        GPT,
        embedding="word_embeddings",
        cache_argument="layer_past",
        rotary=functions.model_rotary,
        call_block=functions.call_without_alibi,
        input_norm=("ln_attn", "input_layernorm"),
        keys_and_values=attention.falcon_projections,
        attention_cost=attention.falcon_cost,
        refuse=functions.falcon_with_alibi,
    ),
    "gemma": FamilySpec(),
    "gemma2": replace(WINDOW_BY_TYPE, attention="eager", scale_logits=functions.capped_logits),
    "gemma3_text": replace(ROTARY_BY_TYPE, scale_logits=functions.capped_logits),
    "glm": FamilySpec(),
    "glm4": FamilySpec(),
    "gpt2": replace(
        GPT,
        after_embedding=lambda base, h_BTD, plan: h_BTD + base.wpe(plan.positions_BT),
        keys_and_values=attention.columns_of_fused_projection,
    ),
    "gpt_bigcode": replace(
        GPT,
        cache_argument="layer_past",
        after_embedding=lambda base, h_BTD, plan: h_BTD + base.wpe(plan.positions_BT),
        keys_and_values=attention.bigcode_projections,
        attention_cost=attention.bigcode_cost,
    ),
    "gpt_neox": FamilySpec(
        embedding="embed_in",
        final_norm="final_layer_norm",
        cache_argument="layer_past",
        keys_and_values=attention.heads_of_fused_projection,
    ),
    "gpt_oss": replace(WINDOW_BY_TYPE, attention="eager", expert_share=functions.routed),
    "gptj": replace(
        GPT,
        attention="eager",
        cache_argument="layer_past",
        rotary=attention.sinusoidal_rotary,
        keys_and_values=lambda block, u_BTD: attention.projected(block.get_submodule("attn"), u_BTD),
        turn=attention.turned_in_pairs,
    ),
    "granite": SCALED,
    "granitemoe": replace(SCALED, expert_share=functions.routed),
    "helium": FamilySpec(),
    "ministral": WINDOW_BY_TYPE,
    "ministral3": ONE_WINDOW,
    "mistral": ONE_WINDOW,
    "mixtral": replace(ONE_WINDOW, expert_share=functions.routed),
    "nanochat": FamilySpec(
        after_embedding=lambda base, h_BTD, plan: base.norm(h_BTD), scale_logits=functions.capped_logits
    ),
    "nemotron": FamilySpec(),
    "olmo": FamilySpec(keys_and_values=attention.clipped_projections),
    "olmo2": FamilySpec(input_norm=None),
    "olmo3": replace(ROTARY_BY_TYPE, input_norm=None),
    "olmoe": FamilySpec(keys_and_values=attention.clipped_projections, expert_share=functions.routed),
    "opt": FamilySpec(
        embedding="decoder.embed_tokens",
        blocks="decoder.layers",
        final_norm="decoder.final_layer_norm",
        rotary=lambda base: None,
        after_embedding=lambda base, h_BTD, plan: (
            h_BTD + base.decoder.embed_positions(plan.positions_BT, position_ids=plan.positions_BT)
        ),
        input_norm="self_attn_layer_norm",
        refuse=functions.opt_of_another_layout,
    ),
    "phi": FamilySpec(final_norm="final_layernorm", turn=attention.turned_in_part),
    "phi3": replace(ONE_WINDOW, keys_and_values=attention.rows_of_fused_projection),
    "qwen2": WINDOW_BY_TYPE,
    "qwen2_moe": replace(WINDOW_BY_TYPE, expert_share=functions.routed),
    "qwen3": WINDOW_BY_TYPE,
    "qwen3_moe": replace(ONE_WINDOW, expert_share=functions.routed),
    "seed_oss": FamilySpec(),
    "smollm3": replace(WINDOW_BY_TYPE, turn=attention.turned_where_used),
    "stablelm": FamilySpec(turn=attention.turned_in_part),
    "starcoder2": ONE_WINDOW,
}
