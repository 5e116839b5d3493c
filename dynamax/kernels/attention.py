"""Attention over held keys and values, in the one form that all packed blocks use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = {"dropout", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions"}
"""What transformers passes along and a mask of ours says already, or what is about training."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, ``[B, H, T, D]`` to ``[B, T, H, D]``; no head gets a copy of its keys.

    Args:
        module: The attention module; not used.
        query: Queries ``[B, H, T, D]``.
        key: Keys ``[B, G, K, D]``, where G divides H.
        value: Values ``[B, G, K, D]``.
        attention_mask: True where a row may look, or what is added to the scores; without one, a single row sees all
            keys, several see causally.
        scaling: Factor of the scores; ``D ** -0.5`` if left out.
        softcap: Cap of the scores, as in Gemma 2.
        s_aux: A score ``[H]`` of nothing, that takes its share from the keys (a sink), as in gpt-oss.
        **options: The rest of what transformers passes.

    Raises:
        NotImplementedError: At an option that would change the result.
    """
    unknown = {name for name, value in options.items() if value is not None} - IGNORED
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(sorted(unknown))}")
    causal = attention_mask is None and query.shape[2] > 1
    if softcap is None and s_aux is None:
        grouped = query.shape[1] != key.shape[1]
        out_BHTD = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
        return out_BHTD.transpose(1, 2).contiguous(), None
    groups = key.shape[1]
    q_BGRTD = query.unflatten(1, (groups, -1))
    scores = q_BGRTD @ key[:, :, None].mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    if attention_mask is not None and attention_mask.is_floating_point():
        scores = scores + attention_mask[:, :, None]
    elif attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, :, None], torch.finfo(scores.dtype).min)
    elif causal:
        scores = scores.masked_fill(~scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if s_aux is not None:
        sinks_BGRT1 = s_aux.to(scores.dtype).view(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks_BGRT1], -1)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = weights if s_aux is None else weights[..., :-1]
    return (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2).contiguous(), None
