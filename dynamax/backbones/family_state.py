"""How a skipped block's state is written from what would have come in: norm and projections, without the rest.

One function for each way in which families project keys and values. Knows transformers' blocks, no caches.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.backbones.mixers import Mixer
from dynamax.backbones.state import LayerView


def heads(x_BTC: Tensor, size: int) -> Tensor:
    """Channels to heads: ``x_BHTD``."""
    return x_BTC.unflatten(-1, (-1, size)).transpose(1, 2)


def separate_projections(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """``k_proj`` and ``v_proj``; keys may be normed, by head or as a whole."""
    return projected(block.get_submodule("self_attn"), u_BTD)


def mixer_projections(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The same, where attention is called ``mixer`` (Nemotron-H)."""
    return projected(block.get_submodule("mixer"), u_BTD)


def projected(attention: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - each type has its own class
    """Keys and values of an attention module with ``k_proj`` and ``v_proj``."""
    size, children = attention.head_dim, dict(attention.named_children())
    norm: Any = children.get("k_norm") or children.get("k_layernorm")
    k_BTC = attention.k_proj(u_BTD)
    if norm is not None and norm.weight.numel() != size:  # over all heads together (OLMo 2)
        k_BTC, norm = norm(k_BTC), None
    k_BHTD = heads(k_BTC, size)
    return k_BHTD if norm is None else norm(k_BHTD), heads(attention.v_proj(u_BTD), size)


def scaled_projections(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Falcon-H1: attention's input and its keys are multiplied by constants."""
    known: Any = block
    k_BHTD, v_BHTD = projected(known.self_attn, u_BTD * known.attention_in_multiplier)
    return k_BHTD * known.self_attn.key_multiplier, v_BHTD


def rows_of_fused_projection(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Phi-3: queries, keys and values are rows of one matrix, in this order."""
    attention: Any = block.get_submodule("self_attn")
    size, queries = attention.head_dim, attention.config.num_attention_heads * attention.head_dim
    k_BTC, v_BTC = F.linear(u_BTD, attention.qkv_proj.weight[queries:]).chunk(2, -1)
    return heads(k_BTC, size), heads(v_BTC, size)


def heads_of_fused_projection(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-NeoX: each head has its query, key and value behind one another in one matrix."""
    attention: Any = block.get_submodule("attention")
    size, fused = attention.head_size, attention.query_key_value
    weight_HCD = fused.weight.unflatten(0, (-1, 3 * size))[:, size:]
    kv_HNC = u_BTD.flatten(0, 1) @ weight_HCD.mT  # one product a head, without a copy of the weights
    if fused.bias is not None:
        kv_HNC = kv_HNC + fused.bias.unflatten(0, (-1, 1, 3 * size))[..., size:]
    k_BHTD, v_BHTD = kv_HNC.unflatten(1, u_BTD.shape[:2]).transpose(0, 1).chunk(2, -1)
    return k_BHTD, v_BHTD


def columns_of_fused_projection(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-2: queries, keys and values are columns of one transposed matrix."""
    attention: Any = block.get_submodule("attn")
    width = attention.embed_dim
    weight, bias = attention.c_attn.weight[:, width:], attention.c_attn.bias[width:]
    k_BTC, v_BTC = torch.addmm(bias, u_BTD.flatten(0, 1), weight).unflatten(0, u_BTD.shape[:2]).chunk(2, -1)
    return heads(k_BTC, attention.head_dim), heads(v_BTC, attention.head_dim)


def rotated(block: nn.Module, k_BHTD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Keys turned to their positions, by the function that the block's own attention uses."""
    place: Any = sys.modules[type(block).__module__]
    return place.apply_rotary_pos_emb(k_BHTD, k_BHTD, *angles)[1]


def write_behind_shared_transformer(
    block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any], view: LayerView, mixer: Mixer
) -> None:
    """Zamba2's hybrid blocks: the Mamba reads what the shared transformer gives, so that has to run.

    Args:
        block: The hybrid block.
        h_BTD: Residual stream and word embedding, side by side.
        index: Picks the adapters.
        options: Masks and positions, as for calling the block.
        view: Takes the state.
        mixer: The block's Mamba-2.
    """
    known: Any = block
    x_BTD, word_BTD = h_BTD.chunk(2, -1)
    shared_BTD = known.shared_transformer(x_BTD, original_hidden_states=word_BTD, layer_idx=index, **options)
    mixer.write(known.mamba_decoder.input_layernorm(x_BTD + known.linear(shared_BTD)), view)
