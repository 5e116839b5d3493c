"""Whether scores are probabilities: bins of a reliability diagram, ECE and Brier score. Knows tensors, no models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from dynamax.errors import UserError

BINS = 10
"""Bins of equal width over [0, 1]."""


class Figures(NamedTuple):
    """What ``Reliability`` finds; all float64, and nan where nothing was counted.

    Attributes:
        ece: Expected calibration error over the bins.
        brier: Brier score: the mean of ``(score - right)^2``.
        count_K: Scores in each bin.
        score_K: Mean score of each bin.
        right_K: Share of each bin that was right.
    """

    ece: Tensor
    brier: Tensor
    count_K: Tensor
    score_K: Tensor
    right_K: Tensor


class Reliability(Metric):
    """Scores in [0, 1] against how often leaving was right, in bins of equal width.

    Source: ECE by Guo et al. 2017, arXiv 1706.04599; Brier 1950.

    >>> metric = Reliability()
    >>> metric.update(torch.tensor([0.25, 0.75, 1.0]), torch.tensor([False, True, True]))
    >>> found = metric.compute()
    >>> round(found.ece.item(), 4), round(found.brier.item(), 4)
    (0.1667, 0.0417)
    """

    is_differentiable = False
    full_state_update = False
    count_K: Tensor
    score_K: Tensor
    right_K: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count_K", "score_K", "right_K"):
            self.add_state(name, torch.zeros(BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, score_BT: Tensor, right_BT: Tensor) -> None:
        """Add positions.

        Args:
            score_BT: Scores in [0, 1]. Any shape.
            right_BT: Whether leaving was right, bool or 0 and 1, of the same shape.

        Raises:
            UserError: If the shapes differ, or a score is not in [0, 1].
        """
        score_N, right_N = score_BT.detach().double().flatten(), right_BT.double().flatten()
        if score_BT.shape != right_BT.shape:
            raise UserError(f"Wanted a label a score; given {tuple(score_BT.shape)} and {tuple(right_BT.shape)}.")
        if not bool(((score_N >= 0) & (score_N <= 1)).all()):
            raise UserError(
                f"Scores from {score_N.min():g} to {score_N.max():g} were given; wanted: probabilities in [0, 1]."
            )
        bin_N = (score_N * BINS).long().clamp(max=BINS - 1)
        self.count_K = self.count_K.index_add(0, bin_N, torch.ones_like(score_N))
        self.score_K = self.score_K.index_add(0, bin_N, score_N)
        self.right_K = self.right_K.index_add(0, bin_N, right_N)
        self.squares = self.squares + (score_N - right_N).square().sum()

    def compute(self) -> Figures:
        """Errors and bins."""
        count = self.count_K.sum()
        gaps = (self.score_K - self.right_K).abs().sum()
        return Figures(
            gaps / count, self.squares / count, self.count_K, self.score_K / self.count_K, self.right_K / self.count_K
        )
