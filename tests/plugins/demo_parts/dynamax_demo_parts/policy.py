"""A policy from outside: an answer begins early and goes on at full depth."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax.policies.base import CountPolicy
from dynamax.types import Evidence


class FirstTokens(CountPolicy):
    """Leaves at the first exit while an answer is short.

    Args:
        tokens: How many tokens an answer has when this ends.
    """

    gates = ()

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Whether fewer tokens have been generated."""
        step = torch.as_tensor(evidence.step, device=evidence.hidden.device)
        return (step < self.count).expand(evidence.hidden.shape[:1])
