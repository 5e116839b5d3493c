"""How well each depth of a language model predicts text. Knows tokens and logits, no models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F


class DepthScore(NamedTuple):
    """One depth over a text.

    Attributes:
        perplexity: Exponential of the mean cross-entropy of true next tokens.
        accuracy: How often the likeliest token is the true next one.
        agreement: How often it is the top's likeliest token; 1 at the top.
    """

    perplexity: float
    accuracy: float
    agreement: float


@final
class DepthScores:
    """Adds up batches; one position is one vote.

    Args:
        depths: Depths that are read, the top last.
    """

    def __init__(self, depths: Sequence[int]) -> None:
        self.depths = tuple(depths)
        self._sums_E3 = torch.zeros(len(self.depths), 3, dtype=torch.float64)
        self._count = 0

    def update(self, logits: Sequence[Tensor], tokens_BT: Tensor) -> None:
        """Count one batch.

        Args:
            logits: ``logits_BTV`` at each depth, the top's last.
            tokens_BT: The tokens that went in; each position is held against the next one.
        """
        next_N = tokens_BT[:, 1:].flatten()
        top_N = logits[-1][:, :-1].argmax(-1).flatten()
        for row, logits_BTV in enumerate(logits):
            logits_NV = logits_BTV[:, :-1].flatten(0, 1)
            said_N = logits_NV.argmax(-1)
            lost = F.cross_entropy(logits_NV, next_N, reduction="sum")
            counts = torch.stack([lost.double(), (said_N == next_N).sum().double(), (said_N == top_N).sum().double()])
            self._sums_E3[row] += counts.cpu()
        self._count += len(next_N)

    def compute(self) -> dict[int, DepthScore]:
        """The scores by depth."""
        rows = (self._sums_E3 / max(1, self._count)).tolist()
        return {
            depth: DepthScore(math.exp(lost), right, agreed)
            for depth, (lost, right, agreed) in zip(self.depths, rows, strict=True)
        }
