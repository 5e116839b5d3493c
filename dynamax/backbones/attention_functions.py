"""What rows of the family table say of attention: keys and values, how they are turned, what they cost, ALiBi's slopes.

Keys and values are those of a chunk, not yet turned, from the normed input of a block. Knows no caches.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dynamax.backbones.linear import channels
from dynamax.backbones.plan import Rotary
from dynamax.kernels.products import Product

# -- keys and values ------------------------------------------------------------------------------------


def heads(x_BTC: Tensor, size: int) -> Tensor:
    """Channels to heads: ``x_BHTD``."""
    return x_BTC.unflatten(-1, (-1, size)).transpose(1, 2)


def projected(attention: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Of an attention module with ``k_proj`` and ``v_proj``; keys may be normed: by head, all alike, or as a whole."""
    size, children = attention.head_dim, dict(attention.named_children())
    norm: Any = children.get("k_norm") or children.get("k_layernorm")
    k_BTC, v_BHTD = attention.k_proj(u_BTD), heads(attention.v_proj(u_BTD), size)
    if norm is None:
        return heads(k_BTC, size), v_BHTD
    weight = dict(norm.named_parameters(recurse=False)).get("weight")
    if weight is not None and weight.ndim == 2:  # a gain of its own for each head (Cohere)
        return norm(k_BTC.unflatten(-1, (-1, size))).transpose(1, 2), v_BHTD
    if weight is not None and weight.numel() != size:  # over all heads together (OLMo 2)
        return heads(norm(k_BTC), size), v_BHTD
    return norm(heads(k_BTC, size)), v_BHTD


def clipped_projections(block: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """OLMo and OLMoE: keys and values are kept within bounds, if the configuration names one."""
    k_BHTD, v_BHTD = projected(block.self_attn, u_BTD)
    bound = block.self_attn.config.clip_qkv
    return (k_BHTD, v_BHTD) if bound is None else (k_BHTD.clamp(-bound, bound), v_BHTD.clamp(-bound, bound))


def scaled_projections(block: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Falcon-H1: attention's input and its keys are multiplied by constants."""
    k_BHTD, v_BHTD = projected(block.self_attn, u_BTD * block.attention_in_multiplier)
    return k_BHTD * block.self_attn.key_multiplier, v_BHTD


def latents(block: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """DeepSeek: one latent for the keys and values of all heads, and one key that is turned, as one head each."""
    attention = block.self_attn
    rank, turned = attention.kv_lora_rank, attention.qk_rope_head_dim
    latent_BTC, turned_BTC = attention.kv_a_proj_with_mqa(u_BTD).split([rank, turned], -1)
    return attention.kv_a_layernorm(latent_BTC)[:, None], turned_BTC[:, None]


def parted_latents(block: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """DeepSeek V3: channels that are turned together may be neighbours; those it holds stand half a head apart."""
    latent_BHTC, turned_BHTR = latents(block, u_BTD)
    if block.self_attn.config.rope_interleave:
        turned_BHTR = torch.cat([turned_BHTR[..., ::2], turned_BHTR[..., 1::2]], -1)
    return latent_BHTC, turned_BHTR


def rows_of_fused_projection(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Phi-3: queries, keys and values are rows of one matrix, in this order."""
    attention: Any = block.get_submodule("self_attn")
    size, queries = attention.head_dim, attention.config.num_attention_heads * attention.head_dim
    fused = attention.qkv_proj
    k_BTC, v_BTC = channels(fused, u_BTD, (queries, fused.out_features)).chunk(2, -1)
    return heads(k_BTC, size), heads(v_BTC, size)


def columns_of_fused_projection(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-2: queries, keys and values are columns of one transposed matrix."""
    attention: Any = block.get_submodule("attn")
    width = attention.embed_dim
    k_BTC, v_BTC = channels(attention.c_attn, u_BTD, (width, 3 * width)).chunk(2, -1)
    return heads(k_BTC, attention.head_dim), heads(v_BTC, attention.head_dim)


def heads_of_fused_projection(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-NeoX: each head has its query, key and value behind one another in one matrix."""
    attention: Any = block.get_submodule("attention")
    return groups_of_fused_projection(attention.query_key_value, u_BTD, attention.head_size, 1)


def bloom_projections(block: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """BLOOM: as GPT-NeoX."""
    attention = block.self_attention
    return groups_of_fused_projection(attention.query_key_value, u_BTD, attention.head_dim, 1)


def bigcode_projections(block: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """GPT-BigCode: one key and value for all queries, or one for each."""
    attention = block.attn
    queries = attention.num_heads if attention.multi_query else 1
    return groups_of_fused_projection(attention.c_attn, u_BTD, attention.head_dim, queries)


def falcon_projections(block: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Falcon: as GPT-BigCode; newer ones have groups of queries, and hold their key and value once a query."""
    attention = block.self_attention
    queries = falcon_queries(attention)
    k_BHTD, v_BHTD = groups_of_fused_projection(attention.query_key_value, u_BTD, attention.head_dim, queries)
    if attention.new_decoder_architecture:
        return k_BHTD.repeat_interleave(queries, 1), v_BHTD.repeat_interleave(queries, 1)
    return k_BHTD, v_BHTD


def falcon_queries(attention: Any) -> int:  # noqa: ANN401
    """Queries that share a key in Falcon."""
    if attention.new_decoder_architecture:
        return attention.num_heads // attention.num_kv_heads
    return attention.num_heads if attention.multi_query else 1


def groups_of_fused_projection(fused: Any, u_BTD: Tensor, size: int, queries: int) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Of one matrix that has group after group: its queries, each of ``size`` rows, then their key and value."""
    first, last = queries * size, (queries + 2) * size
    if isinstance(fused, Product):
        spans = [(start + first, start + last) for start in range(0, fused.out_features, last)]
        kv_BTHC = fused.part(u_BTD, *spans).unflatten(-1, (-1, 2 * size))
        k_BHTD, v_BHTD = kv_BTHC.transpose(1, 2).chunk(2, -1)
        return k_BHTD, v_BHTD
    weight_HCD = fused.weight.unflatten(0, (-1, last))[:, first:]
    kv_HNC = u_BTD.flatten(0, 1) @ weight_HCD.mT  # one product a group, without a copy of the weights
    if fused.bias is not None:
        kv_HNC = kv_HNC + fused.bias.unflatten(0, (-1, 1, last))[..., first:]
    k_BHTD, v_BHTD = kv_HNC.unflatten(1, u_BTD.shape[:2]).transpose(0, 1).chunk(2, -1)
    return k_BHTD, v_BHTD


# -- turned to their positions --------------------------------------------------------------------------


def turned_by_its_module(block: nn.Module, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """By the function that the block's own attention uses."""
    place: Any = sys.modules[type(block).__module__]
    return place.apply_rotary_pos_emb(k_BHTD, k_BHTD, cos_BTR, sin_BTR)[1]


def turned_in_part(block: nn.Module, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """StableLM and Phi: the same over the first channels; the others stay."""
    turned_BHTR, kept = k_BHTD.tensor_split([cos_BTR.shape[-1]], -1)
    return torch.cat([turned_by_its_module(block, turned_BHTR, cos_BTR, sin_BTR), kept], -1)


def turned_in_pairs(block: nn.Module, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """GPT-J: neighbouring channels are turned together, the first ones only."""
    turned_BHTR, kept = k_BHTD.tensor_split([cos_BTR.shape[-1]], -1)
    beside_BHTR = torch.stack([-turned_BHTR[..., 1::2], turned_BHTR[..., ::2]], -1).flatten(-2)
    return torch.cat([turned_BHTR * cos_BTR[:, None] + beside_BHTR * sin_BTR[:, None], kept], -1)


def turned_where_used(block: nn.Module, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """SmolLM3, Exaone 4, Cohere 2: some blocks know no positions, and leave their keys as they are."""
    attention: Any = block.get_submodule("self_attn")
    known = vars(attention)
    if "use_rope" in known:
        used = known["use_rope"]
    elif "is_sliding" in known:
        used = known["is_sliding"] or known["sliding_window"] is None
    else:
        used = known["sliding_window"] is not None
    return turned_by_its_module(block, k_BHTD, cos_BTR, sin_BTR) if used else k_BHTD


def turned_as_complex(block: nn.Module, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """DeepSeek V2: neighbouring channels are one complex number."""
    place: Any = sys.modules[type(block).__module__]
    return place.apply_rotary_emb(k_BHTD, k_BHTD, torch.complex(cos_BTR, sin_BTR))[1]


# -- angles and slopes ----------------------------------------------------------------------------------


def sinusoidal_rotary(base: nn.Module) -> Rotary:
    """GPT-J: each angle for two neighbouring channels."""
    config: Any = base.config

    def rotary(like: Tensor, positions_BT: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        width = config.rotary_dim or config.hidden_size
        steps_R = torch.arange(0, width, 2, device=positions_BT.device) / width
        angles_BTR = (positions_BT[..., None].float() / 10000**steps_R).repeat_interleave(2, -1)
        return angles_BTR.cos().to(like.dtype), angles_BTR.sin().to(like.dtype)

    return rotary


def complex_rotary(base: nn.Module) -> Rotary:
    """DeepSeek V2: angles come as complex numbers."""
    rotary = base.get_submodule("rotary_emb")

    def parted(like: Tensor, positions_BT: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        angles_BTR = rotary(like, positions_BT)
        return angles_BTR.real, angles_BTR.imag

    return parted


def alibi_slopes(config: PretrainedConfig) -> Tensor:
    """BLOOM: powers of two, and for other counts of heads those between (arXiv 2108.12409). ``[H]``."""
    count = config.num_attention_heads
    whole = 2 ** math.floor(math.log2(count))
    first = [2.0 ** (-8.0 * step / whole) for step in range(1, whole + 1)]
    between = [2.0 ** (-4.0 * step / whole) for step in range(1, 2 * (count - whole), 2)]
    return torch.tensor([*first, *between], dtype=torch.float32)


# -- costs ----------------------------------------------------------------------------------------------


class AttentionCost(NamedTuple):
    """What attention costs, in counts.

    Attributes:
        scores: Multiply-adds a position spends on each key it attends to.
        keys: Values kept for each position.
        write: Weights used to write a position's keys and values.
        unfolding: Weights, among those of the block, that are multiplied with what is kept of each position attended
            to, not with the position itself; ``scores`` counts them.
    """

    scores: int
    keys: int
    write: int
    unfolding: int = 0


def attention_cost(config: PretrainedConfig, block: nn.Module) -> AttentionCost:
    """By the configuration's heads, and groups of them that share keys."""
    known, queries = config.to_dict(), config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    keys = 2 * (known.get("num_key_value_heads") or queries) * size
    return AttentionCost(2 * queries * size, keys, keys * (known.get("attention_hidden_size") or config.hidden_size))


def falcon_cost(config: PretrainedConfig, block: Any) -> AttentionCost:  # noqa: ANN401
    """Falcon, where groups of queries are held as if each query had a key of its own."""
    attention = block.self_attention
    written = 2 * attention.head_dim * attention.num_heads // falcon_queries(attention)
    held = 2 * attention.hidden_size if attention.new_decoder_architecture else written
    return AttentionCost(2 * attention.hidden_size, held, written * attention.hidden_size)


def bigcode_cost(config: PretrainedConfig, block: Any) -> AttentionCost:  # noqa: ANN401
    """GPT-BigCode."""
    held = 2 * block.attn.kv_dim
    return AttentionCost(2 * config.hidden_size, held, held * config.hidden_size)


def latent_cost(config: PretrainedConfig, block: Any) -> AttentionCost:  # noqa: ANN401
    """DeepSeek: latents are kept; keys and values are made of them again for each position that attends."""
    attention = block.self_attn
    unfolding = attention.kv_b_proj.weight.numel()
    held = attention.kv_lora_rank + attention.qk_rope_head_dim
    scores = attention.num_heads * (attention.qk_head_dim + attention.v_head_dim)
    return AttentionCost(scores + unfolding, held, held * attention.hidden_size, unfolding)
