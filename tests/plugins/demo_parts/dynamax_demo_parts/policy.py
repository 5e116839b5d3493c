"""A policy from outside: an answer begins at full depth and goes on early."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax.policies.base import CountPolicy
from dynamax.types import Evidence


class LaterTokens(CountPolicy):
    """Leaves at the first exit once an answer is under way.

    Args:
        tokens: How many tokens an answer has when this begins.
    """

    gates = ()

    def __init__(self, tokens: int) -> None:
        self.threshold = self.checked(tokens)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Whether enough tokens have been generated."""
        step = torch.as_tensor(evidence.step, device=evidence.hidden.device)
        return (step >= self.count).expand(evidence.hidden.shape[:1])
