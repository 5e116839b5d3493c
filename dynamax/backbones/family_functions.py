"""What rows of the family table name, where it takes more than a line: functions of configurations and modules.

Knows no caches and no weights by value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from dynamax.backbones.linear import channels
from dynamax.backbones.mixers import Mixer, SSDMixer
from dynamax.backbones.plan import Rotary
from dynamax.backbones.state import LayerView, StateKind
from dynamax.kernels.products import Product

# -- the whole model ---------------------------------------------------------------------------------------


def model_rotary(base: nn.Module) -> Rotary:
    """Angles from the model's ``rotary_emb``, the same for all blocks."""
    rotary = base.get_submodule("rotary_emb")
    return lambda h_BTD, positions_BT, _: rotary(h_BTD, positions_BT)


def optional_rotary(base: nn.Module) -> Rotary | None:
    """Angles from the model's ``rotary_emb``; None where its configuration asks for no rotary positions."""
    return model_rotary(base) if "rotary_emb" in dict(base.named_children()) else None


def capped_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Logits squashed into (-cap, cap) if the configuration names a cap (Gemma 2)."""
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def routed(config: PretrainedConfig) -> float:
    """A position is routed to some of the experts; without experts, to all there is."""
    experts = config.num_local_experts
    return config.num_experts_per_tok / experts if experts else 1.0


def state_by_layer_type(config: PretrainedConfig) -> list[tuple[StateKind, ...]]:
    """What blocks of each layer type keep."""
    kept: dict[str, tuple[StateKind, ...]] = {
        "full_attention": ("keys",),
        "linear_attention": ("recurrent",),
        "conv": ("recurrent",),
        "hybrid": ("keys", "recurrent"),
        "mlp": (),
        "moe": (),
    }
    return [kept[kind] for kind in config.layer_types]


# -- one block ---------------------------------------------------------------------------------------------


def call_with_keywords(block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any]) -> Tensor:
    """``h_BTD`` and keywords in, ``h_BTD`` out; some types return a tuple whose first entry it is."""
    out = block(h_BTD, **options)
    return out[0] if isinstance(out, tuple) else out


def call_with_embedding(block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any]) -> Tensor:
    """Zamba2: residual stream and word embedding as two arguments, and the index that picks the adapters."""
    x_BTD, word_BTD = h_BTD.chunk(2, -1)
    mask = options.pop("attention_mask")
    out = block(x_BTD, original_hidden_states=word_BTD, layer_idx=index, causal_mask=mask, **options)
    return torch.cat([out, word_BTD], -1)


def own_adapter(config: PretrainedConfig, index: int, name: str) -> bool:
    """Zamba2's shared blocks hold an adapter for each place they stand at, and use the one of this place."""
    found = re.search(r"adapter_list\.(\d+)\.", name)
    return found is None or int(found[1]) == config.hybrid_layer_ids.index(index)


# -- what continues a block's recurrent state ----------------------------------------------------------------


def mixer_in(block: nn.Module, name: str, make: Callable[[nn.Module], Mixer]) -> Mixer | None:
    """The mixer of the first module of the block that has a parameter or child of this name; None without one."""
    for module in block.modules():
        if name in module._parameters or name in module._modules:
            return make(module)
    return None


def unclamped_mamba2(module: Any) -> SSDMixer:  # noqa: ANN401 - each type has its own class
    """Mamba-2 of Zamba2 and Nemotron-H: chunks and single steps are made to agree on step sizes.

    transformers clamps step sizes from below by ``time_step_min``, a bound of their initialisation, in chunks and not
    in single steps, so that its own decoding differs from its own pass over the same text. The code that these models
    were trained with clamps in neither, unless a configuration names a limit.
    """
    module.time_step_limit = tuple(module.config.to_dict().get("time_step_limit") or (0.0, math.inf))
    return SSDMixer(module)


def scaled_mamba2(module: Any) -> SSDMixer:  # noqa: ANN401
    """Falcon-H1's Mamba-2: input and channels are scaled, and the gated norm may be missing."""
    finish = None if module.mamba_rms_norm else gated
    return SSDMixer(module, gain=module.ssm_in_multiplier, scale="mup_vector", finish=finish)


def gated(y_BTE: Tensor, z_BTE: Tensor) -> Tensor:
    """The scan's output times the gate."""
    return y_BTE * F.silu(z_BTE)


# -- keys and values of a chunk, keys not yet turned, from the normed input of a block -------------------------


def heads(x_BTC: Tensor, size: int) -> Tensor:
    """Channels to heads: ``x_BHTD``."""
    return x_BTC.unflatten(-1, (-1, size)).transpose(1, 2)


def projected(attention: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Of an attention module with ``k_proj`` and ``v_proj``; keys may be normed, by head or as a whole."""
    size, children = attention.head_dim, dict(attention.named_children())
    norm: Any = children.get("k_norm") or children.get("k_layernorm")
    k_BTC = attention.k_proj(u_BTD)
    if norm is not None and norm.weight.numel() != size:  # over all heads together (OLMo 2)
        k_BTC, norm = norm(k_BTC), None
    k_BHTD = heads(k_BTC, size)
    return k_BHTD if norm is None else norm(k_BHTD), heads(attention.v_proj(u_BTD), size)


def scaled_projections(block: Any, u_BTD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Falcon-H1: attention's input and its keys are multiplied by constants."""
    k_BHTD, v_BHTD = projected(block.self_attn, u_BTD * block.attention_in_multiplier)
    return k_BHTD * block.self_attn.key_multiplier, v_BHTD


def rows_of_fused_projection(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Phi-3: queries, keys and values are rows of one matrix, in this order."""
    attention: Any = block.get_submodule("self_attn")
    size, queries = attention.head_dim, attention.config.num_attention_heads * attention.head_dim
    fused = attention.qkv_proj
    k_BTC, v_BTC = channels(fused, u_BTD, (queries, fused.out_features)).chunk(2, -1)
    return heads(k_BTC, size), heads(v_BTC, size)


def heads_of_fused_projection(block: nn.Module, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-NeoX: each head has its query, key and value behind one another in one matrix."""
    attention: Any = block.get_submodule("attention")
    size, fused = attention.head_size, attention.query_key_value
    if isinstance(fused, Product):
        spans = [(start + size, start + 3 * size) for start in range(0, fused.out_features, 3 * size)]
        kv_BTHC = fused.part(u_BTD, *spans).unflatten(-1, (-1, 2 * size))
        k_BHTD, v_BHTD = kv_BTHC.transpose(1, 2).chunk(2, -1)
        return k_BHTD, v_BHTD
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
    k_BTC, v_BTC = channels(attention.c_attn, u_BTD, (width, 3 * width)).chunk(2, -1)
    return heads(k_BTC, attention.head_dim), heads(v_BTC, attention.head_dim)


def write_behind_shared_transformer(
    block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any], view: LayerView, mixer: Mixer
) -> None:
    """Zamba2's hybrid blocks: the Mamba reads the output of the shared transformer, so that has to run."""
    hybrid: Any = block
    x_BTD, word_BTD = h_BTD.chunk(2, -1)
    shared_BTD = hybrid.shared_transformer(x_BTD, original_hidden_states=word_BTD, layer_idx=index, **options)
    mixer.write(hybrid.mamba_decoder.input_layernorm(x_BTD + hybrid.linear(shared_BTD)), view)
