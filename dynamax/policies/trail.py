"""Policies that compare an exit with the exits before it, through ``evidence.trail``. They keep no state."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax.policies.base import CountPolicy, ScorePolicy
from dynamax.types import Evidence


class Patience(CountPolicy):
    """Leaves when the lens gives the same token at that many consecutive exits, this one included.

    Args:
        patience: Exits that must agree, at least 1; 1 leaves at the first exit. It is the number a sweep turns.

    Source: PABEE (Zhou et al. 2020, arXiv 2006.04152), which counts repetitions: its ``t`` is ``patience - 1``.
    """

    gates = ()

    def __init__(self, patience: int) -> None:
        super().__init__(patience)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Where the last exits and this one say the same token."""
        first = len(evidence.trail) - (self.count - 1)
        leave_B = torch.full(evidence.hidden.shape[:1], first >= 0, device=evidence.hidden.device)
        for before in evidence.trail[first:] if first >= 0 else ():
            leave_B = leave_B & (before.token == evidence.token)
        return leave_B


class Saturation(ScorePolicy):
    """Cosine similarity of the hidden state with the previous exit's; negative ones score 0.

    The first exit has nothing to compare with and scores 0. Neither lens nor gate is read.

    Source: CALM's hidden-state saturation (Schuster et al. 2022, arXiv 2207.07061), there between neighbouring layers.
    """

    gates = ()

    def score(self, evidence: Evidence) -> Tensor:
        """Cosine similarity with the exit before, ``score_B``."""
        h_BD = evidence.hidden.float()
        if not evidence.trail:
            return h_BD.new_zeros(h_BD.shape[0])
        before_BD = evidence.trail[-1].hidden.float()
        return torch.cosine_similarity(h_BD, before_BD, dim=-1).clamp(0.0, 1.0)
