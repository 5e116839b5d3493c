"""Policies that meet a mean while they decode: so many blocks a token, or so much time."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from dynamax.errors import UserError
from dynamax.policies.base import ScorePolicy, TerminationPolicy
from dynamax.types import Evidence, Past


class _Paced(TerminationPolicy):
    """Another policy, with a threshold that moves after each step, so that a mean is met.

    Args:
        policy: The policy whose score is used, and whose threshold is the first.
        threshold: The mean; a sweep changes it.
        rate: How fast the threshold moves.
    """

    def __init__(self, policy: ScorePolicy, threshold: float, rate: float) -> None:
        if not 0 < rate < math.inf:
            raise UserError(f"{type(self).__name__} was given rate {rate}; it must be greater than 0 and finite.")
        self.policy = policy
        self.rate = rate
        self.threshold = self.checked(threshold)
        self.gates = policy.gates
        self.depths = policy.depths
        self.recent = max(1, policy.recent)
        self.made_of = (policy.label,)

    @abstractmethod
    def saved(self, past: Past, total: int) -> list[float]:
        """For each row, what the steps before spent less than the mean, as a share of what one full step spends."""

    @final
    def __call__(self, evidence: Evidence) -> Tensor:
        """Where the inner policy's score is at least the threshold that the steps before have led to."""
        if evidence.past is None or evidence.past.blocks is None:
            raise UserError(
                f"{self.label} goes by what earlier steps spent, which is known only while decoding. Decode with it, "
                f"or use its policy {self.policy.label} here."
            )
        saved = self.saved(evidence.past, evidence.total)
        moved_B = torch.tensor(saved, device=evidence.hidden.device) * self.rate
        return self.policy.score(evidence) >= self.policy.level(evidence.depth) + moved_B

    @final
    def validate(self, depths: Sequence[int]) -> None:
        """Check the inner policy."""
        self.policy.validate(depths)

    @final
    def check_gates(self, offered: Mapping[int, Collection[str]], total: int) -> None:
        """Check the inner policy."""
        self.policy.check_gates(offered, total)


class Budget(_Paced):
    """Another policy, with a threshold that moves after each step, so that steps cost so many blocks on average.

    After ``t`` steps that called ``n`` blocks together, of a backbone of ``L``, the threshold is
    ``x + rate (t blocks - n) / L``, where ``x`` is the inner policy's: what was saved is spent on being surer. For a
    row decoded alone the mean differs from ``blocks`` by at most ``L (1 + rate) / (rate t)``, whatever the scores are,
    if ``blocks`` lies between the depth of the first exit and ``L``. It works only while decoding: along a known text
    nobody knows what earlier steps cost.

    Args:
        policy: The policy whose score is used, and whose threshold is the first.
        blocks: Block calls a token, from 1 on; the prompt is not counted. A sweep changes this number.
        rate: How fast the threshold moves, greater than 0: ``L`` blocks too many lower it by ``rate``.

    Source: adaptive conformal inference (Gibbs and Candès 2021, arXiv 2106.00172), with blocks in place of errors.
    """

    def __init__(self, policy: ScorePolicy, blocks: float, *, rate: float = 0.1) -> None:
        super().__init__(policy, blocks, rate)

    def saved(self, past: Past, total: int) -> list[float]:
        """Blocks, as a share of all."""
        assert isinstance(self.threshold, float), "its constructor and at() have checked it"
        assert past.blocks is not None, "asked before"
        return [(len(blocks) * self.threshold - sum(blocks)) / total for blocks in past.blocks()]

    def checked(self, threshold: float) -> float:
        """The blocks; a UserError if they are less than 1 or without end."""
        if not 1 <= threshold < math.inf:
            raise UserError(f"{type(self).__name__} was given {threshold} blocks a token; wanted: at least 1.")
        return float(threshold)


class LatencyBudget(_Paced):
    """Another policy, with a threshold that moves after each step, so that steps take so long on average.

    After ``t`` steps that took ``s`` milliseconds together, on the clock of the wall, the threshold is
    ``x + rate (t milliseconds - s) / milliseconds``, where ``x`` is the inner policy's. The target is met if it lies
    between the time of a step that always leaves at the first exit and that of one that never leaves; else the policy
    does always the one or the other. What it decides depends on the machine and on what else runs there, so two runs
    may differ. It works only while decoding.

    Args:
        policy: The policy whose score is used, and whose threshold is the first.
        milliseconds: Time of a token, greater than 0; the prompt's pass is not counted. A sweep changes this number.
        rate: How fast the threshold moves, greater than 0: being late by one target lowers it by ``rate``.

    Source: as ``Budget``, with time in place of blocks.
    """

    def __init__(self, policy: ScorePolicy, milliseconds: float, *, rate: float = 0.1) -> None:
        super().__init__(policy, milliseconds, rate)

    def saved(self, past: Past, total: int) -> list[float]:
        """Time, as a share of the target."""
        assert isinstance(self.threshold, float), "its constructor and at() have checked it"
        assert past.seconds is not None, "known where blocks are"
        return [len(spent) - 1000 * sum(spent) / self.threshold for spent in past.seconds()]

    def checked(self, threshold: float) -> float:
        """The milliseconds; a UserError if they are not greater than 0 and finite."""
        if not 0 < threshold < math.inf:
            raise UserError(f"{type(self).__name__} was given {threshold} ms a token; wanted: more than 0.")
        return float(threshold)
