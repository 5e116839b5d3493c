"""Policies made of policies. The later ones are asked only while the earlier ones leave a row undecided."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Self, final

import torch
from torch import Tensor

from dynamax.errors import UserError
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Evidence


class _Combined(TerminationPolicy):
    """Several policies; a sweep changes the threshold of one of them."""

    def __init__(self, policies: list[TerminationPolicy], *, swept: int = 0) -> None:
        if not 0 <= swept < len(policies):
            raise UserError(
                f"{type(self).__name__} was given {len(policies)} policies and swept {swept}; give at least one policy "
                f"and, as swept, the position of one of them, counted from 0."
            )
        self.policies = tuple(policies)
        self.swept = swept
        self.threshold = policies[swept].threshold
        asked = [policy.gates for policy in policies]
        self.gates = None if None in asked else {name for names in asked for name in names or ()}
        depths = [policy.depths for policy in policies]
        self.depths = None if None in depths else {depth for some in depths for depth in some or ()}
        self.recent = max(policy.recent for policy in policies)
        self.known_text = any(policy.known_text for policy in policies)
        self.made_of = [policy.label for policy in policies]

    @final
    def at(self, threshold: float) -> Self:
        """The same combination with the swept policy at another threshold."""
        policies = list(self.policies)
        policies[self.swept] = policies[self.swept].at(threshold)
        return type(self)(policies, swept=self.swept)

    @final
    def validate(self, depths: Sequence[int]) -> None:
        """Check every policy."""
        for policy in self.policies:
            policy.validate(depths)

    def check_gates(self, offered: Mapping[int, Collection[str]], total: int) -> None:
        """Check all policies."""
        for policy in self.policies:
            policy.check_gates(offered, total)


class AnyOf(_Combined):
    """Leaves where any of the policies would.

    Args:
        policies: Asked in this order, so the cheap ones first.
        swept: Position, from 0, of the policy whose threshold a sweep changes.
    """

    def __call__(self, evidence: Evidence) -> Tensor:
        """Where one of them leaves; the later ones are not asked once every row leaves."""
        leave_B = self.policies[0](evidence)
        for policy in self.policies[1:]:
            if leave_B.all():
                break
            evidence.settle(leave_B)
            leave_B = leave_B | policy(evidence)
        return leave_B


class AllOf(_Combined):
    """Leaves where all of the policies would.

    Args:
        policies: Asked in this order, so the cheap ones first.
        swept: Position, from 0, of the policy whose threshold a sweep changes.
    """

    def __call__(self, evidence: Evidence) -> Tensor:
        """Where each of them leaves; the later ones are not asked once no row is left that would."""
        leave_B = self.policies[0](evidence)
        for policy in self.policies[1:]:
            if not leave_B.any():
                break
            leave_B = leave_B & policy(evidence)
        return leave_B


class Cascade(AllOf):
    """Two or more policies in order of cost: each is asked only where those before it would leave.

    A cheap gate that says no spares the reading of the output matrix; where it says yes, the next one decides. In a
    batch a policy is asked about all rows as long as those before it let one of them through.

    Args:
        policies: At least two, the cheapest first, such as a gate, ``CandidateProb`` and ``MaxProb``.
        swept: Position, from 0, of the policy whose threshold a sweep changes; the last if left out.
    """

    def __init__(self, policies: list[TerminationPolicy], *, swept: int | None = None) -> None:
        if len(policies) < 2:
            raise UserError(
                f"Cascade was given {len(policies)} policies; wanted: at least two, the cheapest first. Add one, or "
                f"use the policy alone."
            )
        super().__init__(policies, swept=len(policies) - 1 if swept is None else swept)


class OnlyAt(TerminationPolicy):
    """Another policy, asked at some exits alone; no row leaves at the others.

    While decoding, an exit that no policy asks costs nothing. This pays where an exit lets few rows leave, or saves
    few blocks (``docs/performance.md``, "When exits pay").

    Args:
        policy: The policy. Thresholds by depth are given for the depths here.
        depths: Depths of the exits where it is asked.
    """

    def __init__(self, policy: TerminationPolicy, depths: list[int]) -> None:
        if not depths:
            raise UserError("OnlyAt was given no depths. Name the exits where the policy is asked, or use Never.")
        self.policy = policy
        self.depths = self._asked = tuple(sorted(set(depths)))
        self.threshold = policy.threshold
        self.gates = policy.gates
        self.recent = policy.recent
        self.known_text = policy.known_text
        self.made_of = (policy.label, *map(str, self._asked))

    def __call__(self, evidence: Evidence) -> Tensor:
        """What the policy says at its depths; elsewhere no row leaves, and nothing is read."""
        if evidence.depth in self._asked:
            return self.policy(evidence)
        return evidence.hidden.new_zeros(len(evidence.hidden), dtype=torch.bool)

    def at(self, threshold: float) -> Self:
        """The inner policy at another threshold, at the same depths."""
        return type(self)(self.policy.at(threshold), list(self._asked))

    def validate(self, depths: Sequence[int]) -> None:
        """Refuse a depth at which there is no exit; check the inner policy against the depths here."""
        missing = [depth for depth in self._asked if depth not in depths]
        if missing:
            raise UserError(
                f"OnlyAt was given the depths {list(self._asked)}, but the exits are at {sorted(depths)}. Name some of "
                f"these, or add an exit at {missing[0]}."
            )
        self.policy.validate(self._asked)

    def check_gates(self, offered: Mapping[int, Collection[str]], total: int) -> None:
        """Check the inner policy at the depths here."""
        self.policy.check_gates({depth: names for depth, names in offered.items() if depth in self._asked}, total)
