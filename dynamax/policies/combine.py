"""Policies made of policies. The later ones are asked only while the earlier ones leave a row undecided."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self, final

from torch import Tensor

from dynamax.errors import UserError
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Evidence


class _Combined(TerminationPolicy):
    """Several policies, one of which a sweep turns."""

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

    @property
    def label(self) -> str:
        """What tables and logs call it, with the policies it is made of."""
        return f"{type(self).__name__}({', '.join(policy.label for policy in self.policies)})"

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

    @final
    def __call__(self, evidence: Evidence) -> Tensor:
        leave_B = self.policies[0](evidence)
        for policy in self.policies[1:]:
            if self.decided(leave_B):
                break
            leave_B = self.joined(leave_B, policy(evidence))
        return leave_B

    @abstractmethod
    def decided(self, leave_B: Tensor) -> bool:
        """Whether no further policy can change any row."""

    @abstractmethod
    def joined(self, leave_B: Tensor, more_B: Tensor) -> Tensor:
        """The wishes so far with those of one more policy."""


class AnyOf(_Combined):
    """Leaves where any of the policies would.

    Args:
        policies: Asked in this order, so the cheap ones first.
        swept: Position, from 0, of the policy whose threshold a sweep turns.
    """

    def decided(self, leave_B: Tensor) -> bool:
        """Every row leaves already."""
        return bool(leave_B.all())

    def joined(self, leave_B: Tensor, more_B: Tensor) -> Tensor:
        """Either."""
        return leave_B | more_B


class AllOf(_Combined):
    """Leaves where all of the policies would.

    Args:
        policies: Asked in this order, so the cheap ones first.
        swept: Position, from 0, of the policy whose threshold a sweep turns.
    """

    def decided(self, leave_B: Tensor) -> bool:
        """No row leaves any more."""
        return not leave_B.any()

    def joined(self, leave_B: Tensor, more_B: Tensor) -> Tensor:
        """Both."""
        return leave_B & more_B
