"""What the full model would say next, position by position: its most likely tokens. Knows logits alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Logits of which only the greatest is looked at first."""
CACHED = 1 << 21
"""Bytes of logits that are handled at a time on a CPU, so that they stay in its cache."""


class Labels(NamedTuple):
    """The most likely tokens at N positions.

    Attributes:
        tokens_NK: Token ids, surest first, int32.
        probs_NK: Their probabilities over the whole vocabulary, float32.
        logsumexp_N: Of all logits, float32.
    """

    tokens_NK: Tensor
    probs_NK: Tensor
    logsumexp_N: Tensor


def labels(logits_NV: Tensor, k: int) -> Labels:
    """The ``k`` most likely tokens of every position, with true probabilities.

    Args:
        logits_NV: Float32 (or wider) logits over the whole vocabulary.
        k: How many; at most V.
    """
    wide = logits_NV.shape[1] * logits_NV.element_size()
    rows = max(1, CACHED // wide) if logits_NV.device.type == "cpu" else len(logits_NV)
    parts = [_labels(part_NV, k) for part_NV in logits_NV.split(rows)]
    return Labels(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _labels(logits_NV: Tensor, k: int) -> Labels:
    top_NK, tokens_NK = fast_topk(logits_NV, k)
    logsumexp_N = top_NK[:, 0] + (logits_NV - top_NK[:, :1]).exp_().sum(-1).log()
    probs_NK = (top_NK - logsumexp_N[:, None]).exp()
    return Labels(tokens_NK.int(), probs_NK.float(), logsumexp_N.float())


def fast_topk(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What ``torch.topk`` gives, in a third of its time on a CPU.

    The k greatest logits lie in the k blocks with the greatest maxima, so only those are sorted.

    Returns:
        Values and indices, both [N, k], greatest first.
    """
    width = logits_NV.shape[1]
    if width < 4 * k * BLOCK:
        return logits_NV.topk(k, -1)
    whole = width // BLOCK * BLOCK
    blocks_NMW = logits_NV[:, :whole].unflatten(1, (-1, BLOCK))
    chosen_NK = blocks_NMW.amax(-1).topk(k, -1, sorted=False).indices
    rows_N1 = torch.arange(len(logits_NV), device=logits_NV.device)[:, None]
    inside_NC = blocks_NMW[rows_N1, chosen_NK].flatten(1)
    values_NK, at_NK = torch.cat([inside_NC, logits_NV[:, whole:]], 1).topk(k, -1)
    behind_NK = whole + at_NK - k * BLOCK
    block_NK = chosen_NK.gather(1, (at_NK // BLOCK).clamp_max(k - 1))
    return values_NK, torch.where(at_NK < k * BLOCK, block_NK * BLOCK + at_NK % BLOCK, behind_NK)
