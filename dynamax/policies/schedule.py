"""Policies of depth and time: never, at a depth, at a depth or threshold that falls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from dynamax.errors import UserError
from dynamax.policies.base import CountPolicy, ScorePolicy, TerminationPolicy
from dynamax.types import Evidence


class Never(TerminationPolicy):
    """Never leaves: full decoding, with the exits' heads left unread."""

    gates = ()

    def __call__(self, evidence: Evidence) -> Tensor:
        """No row leaves."""
        return evidence.hidden.new_zeros(len(evidence.hidden), dtype=torch.bool)


class AtDepth(CountPolicy):
    """Leaves at one depth, whatever the evidence says.

    Args:
        depth: Depth of an exit, in blocks completed. A sweep changes this number. ``validate`` refuses a depth
            without an exit; without that check, the policy leaves at the first exit at or above it.
    """

    gates = ()

    def __init__(self, depth: int) -> None:
        self.threshold = self.checked(depth)

    def __call__(self, evidence: Evidence) -> Tensor:
        """All rows leave from the depth on."""
        leaves = evidence.depth >= self.count
        return evidence.hidden.new_full((len(evidence.hidden),), leaves, dtype=torch.bool)

    def validate(self, depths: Sequence[int]) -> None:
        """Refuse a depth at which there is no exit."""
        if self.count not in depths:
            raise UserError(
                f"{type(self).__name__} was given depth {self.count}, but the exits are at {sorted(depths)}. "
                f"Name one of these depths, or add an exit at {self.count}."
            )


class PositionSchedule(CountPolicy):
    """Leaves at a depth that falls with the position of the token in the answer; the evidence is not read.

    From ``deepest`` at the start of the answer the depth falls in equal steps to ``shallowest`` at ``horizon`` tokens,
    and stays there. A token leaves at the first exit at this depth or above it.

    Args:
        shallowest: Depth from ``horizon`` on, in blocks completed. A sweep changes this number.
        deepest: Depth at the start; with the depth of the backbone, the first tokens do not leave.
        horizon: Tokens until the depth has fallen.

    Source: SkipDecode (Del Corro et al. 2023, arXiv 2307.02628). There skipped blocks lie below the others; here they
    lie above.
    """

    gates = ()

    def __init__(self, shallowest: int, *, deepest: int, horizon: int) -> None:
        if horizon < 1:
            raise UserError(f"{type(self).__name__} was given horizon {horizon}; it must be at least 1 token.")
        self.deepest = deepest
        self.horizon = horizon
        self.threshold = self.checked(shallowest)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Where the exit is as deep as this step asks for."""
        step = torch.as_tensor(evidence.step, device=evidence.hidden.device).clamp_max(self.horizon)
        fallen = (self.deepest - self.count) * step / self.horizon
        return (evidence.depth >= self.deepest - fallen).expand(len(evidence.hidden))

    def checked(self, threshold: float) -> int:
        """The depth; a UserError if it is no depth, or deeper than the deepest."""
        if threshold > self.deepest:
            raise UserError(
                f"{type(self).__name__} was given shallowest {threshold} and deepest {self.deepest}; the depth must "
                f"not rise. Lower the former, or raise the latter."
            )
        return super().checked(threshold)


class Decaying(TerminationPolicy):
    """Another policy, with a threshold that falls as the answer grows: late errors do less harm.

    At step ``t`` the threshold ``x`` is ``clip(0.9 x + 0.1 exp(-temperature * t / horizon), 0, 1)``: it starts above
    ``x`` and ends near ``0.9 x``. So a threshold of 1 is no longer never.

    Args:
        policy: The policy whose score and threshold are used; a sweep changes its threshold.
        temperature: How fast the threshold falls, at least 0.
        horizon: Longest answer expected, in tokens.

    Source: CALM (Schuster et al. 2022, arXiv 2207.07061), its decaying threshold.
    """

    def __init__(self, policy: ScorePolicy, *, temperature: float, horizon: int) -> None:
        if not temperature >= 0 or horizon < 1:
            raise UserError(
                f"{type(self).__name__} was given temperature {temperature} and horizon {horizon}; "
                f"the temperature must be at least 0 and the horizon at least 1 token."
            )
        self.policy = policy
        self.temperature = temperature
        self.horizon = horizon
        self.threshold = policy.threshold
        self.gates = policy.gates
        self.depths = policy.depths
        self.recent = policy.recent
        self.made_of = (policy.label,)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Where the inner policy's score is at least the threshold of this step."""
        step = torch.as_tensor(evidence.step, device=evidence.hidden.device)
        fall = torch.exp(-self.temperature * step / self.horizon)
        level = (0.9 * self.policy.level(evidence.depth) + 0.1 * fall).clamp(0.0, 1.0)
        return self.policy.score(evidence) >= level

    def at(self, threshold: float) -> Self:
        """The same schedule over the inner policy at another threshold."""
        return type(self)(self.policy.at(threshold), temperature=self.temperature, horizon=self.horizon)

    def validate(self, depths: Sequence[int]) -> None:
        """Check the inner policy."""
        self.policy.validate(depths)

    def check_gates(self, offered: Mapping[int, Collection[str]], total: int) -> None:
        """Check the inner policy."""
        self.policy.check_gates(offered, total)
