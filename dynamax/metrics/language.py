"""How well each depth of a language model predicts text. Knows tokens and logits, no models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


class TeacherScore(NamedTuple):
    """One depth over a text, held against a teacher.

    Attributes:
        divergence: Mean KL(teacher || this depth), in nats a position.
        fidelity: How often the likeliest token is the teacher's.
    """

    divergence: float
    fidelity: float


@final
class TeacherScores:
    """Adds up batches, as ``DepthScores`` does; here the last position of a row counts too, for it has a distribution.

    Args:
        depths: Depths that are read.
        teacher: The teacher's logits for tokens.
    """

    def __init__(self, depths: Sequence[int], teacher: Callable[[Tensor], Tensor]) -> None:
        self.depths = tuple(depths)
        self._teacher = teacher
        self._sums_E2 = torch.zeros(len(self.depths), 2, dtype=torch.float64)
        self._count = 0

    def update(self, logits: Sequence[Tensor], tokens_BT: Tensor) -> None:
        """Count one batch; arguments as for ``DepthScores.update``."""
        wanted_NV = self._teacher(tokens_BT).log_softmax(-1).flatten(0, 1)
        for row, logits_BTV in enumerate(logits):
            logp_NV = logits_BTV.log_softmax(-1).flatten(0, 1)
            apart = F.kl_div(logp_NV, wanted_NV, log_target=True, reduction="sum")
            same = (logp_NV.argmax(-1) == wanted_NV.argmax(-1)).sum()
            self._sums_E2[row] += torch.stack([apart.double(), same.double()]).cpu()
        self._count += tokens_BT.numel()

    def compute(self) -> dict[int, TeacherScore]:
        """The scores by depth."""
        rows = (self._sums_E2 / max(1, self._count)).tolist()
        return {depth: TeacherScore(*row) for depth, row in zip(self.depths, rows, strict=True)}
