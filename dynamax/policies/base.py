"""What a termination policy is: evidence in, a decision to leave out. It never sees a head or a backbone."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor

from dynamax.errors import UserError
from dynamax.types import Evidence

ScoresByDepth = Mapping[int, tuple[Tensor, Tensor]]
"""For each exit's depth: what a policy scored on tokens, ``score_N``, and whether the exit was right, ``right_N``."""


class TerminationPolicy(ABC):
    """Decides at each exit, for each row, whether to leave. It keeps no state: the evidence holds all it needs.

    Attributes:
        threshold: The number that a sweep changes; None for a policy that has none. A mapping gives each exit depth
            its own.
        gates: Names of the gates it may ask; None means any. Recurrent gates that it never asks are not run.
        depths: Depths of the exits it asks; None means all. Decoding passes the other exits as if there were none:
            they are not read, and stand in no trail.
        recent: Earlier steps whose logits or cost it looks at. What it decides then depends on where those steps left.
        known_text: Whether it needs the full model's tokens; decoders refuse it, since only a known text has them.
        made_of: What its label names in brackets: a gate, or the policies it is made of.
    """

    threshold: float | Mapping[int, float] | None = None
    gates: Collection[str] | None = None
    depths: Collection[int] | None = None
    recent: int = 0
    known_text: bool = False
    made_of: Sequence[str] = ()

    @property
    def label(self) -> str:
        """What tables and logs call it."""
        return type(self).__name__ + (f"({', '.join(self.made_of)})" if self.made_of else "")

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Tensor:
        """Whether to leave here, ``leave_B``, bool."""

    def at(self, threshold: float) -> Self:
        """The same policy at another threshold, one for all depths; checked like the constructor's."""
        other = copy.copy(self)
        other.threshold = self.checked(threshold)
        return other

    def checked(self, threshold: float) -> float:
        """The threshold; a UserError if it is out of this policy's range, or the policy has none."""
        raise UserError(f"{type(self).__name__} has no threshold, but {threshold} was given. Leave it out.")

    def validate(self, depths: Sequence[int]) -> None:  # noqa: B027 - most policies fit any exits
        """Check the policy, once, against the depths of the exits, ascending; a UserError if they do not fit."""

    def check_gates(self, offered: Mapping[int, Collection[str]], total: int) -> None:  # noqa: B027 - most ask none
        """Refuse exits without the gate that this policy asks there, before an answer begins.

        Args:
            offered: Class names of the gates at each exit's depth.
            total: Depth of the whole model.

        Raises:
            UserError: Naming the exit and its gates.
        """


def check_gate(gate: str | None, offered: Mapping[int, Collection[str]], total: int) -> None:
    """Refuse (UserError) exits without a gate of that name; without any, if the name is None."""
    for depth, names in offered.items():
        if (gate in names) if gate is not None else names:
            continue
        asked = gate or "(unnamed)"
        if depth == total:
            raise UserError(
                f"The policy asks for the gate {asked} of the exit at depth {depth}, the top, which takes no gates. "
                f"Ask the gate at the exits below alone: OnlyAt(policy, depths)."
            )
        raise UserError(
            f"The policy asks exit {depth} for the gate {asked}; its gates are: {', '.join(names) or 'none'}. Name one "
            f"of them in the policy (gate: NAME), give every exit such a gate, or ask the others alone (OnlyAt)."
        )


class ScorePolicy(TerminationPolicy):
    """Leaves when a score is at least the threshold. Greater is surer, for every score.

    Args:
        threshold: In [0, 1]; one number for all exits, or a mapping from each exit's depth to its own.

    Attributes:
        reads_trail: Whether the score depends on the exits that were read before. It then changes if one of them is no
            longer asked.
    """

    reads_trail: ClassVar[bool] = False

    def __init__(self, threshold: float | dict[int, float]) -> None:
        self.threshold = self._all_checked(threshold)

    def at(self, threshold: float | Mapping[int, float]) -> Self:
        """The same policy at another threshold, or at one for each exit's depth; checked like the constructor's."""
        other = copy.copy(self)
        other.threshold = self._all_checked(threshold)
        return other

    def _all_checked(self, threshold: float | Mapping[int, float]) -> float | dict[int, float]:
        if isinstance(threshold, Mapping):
            return {depth: self.checked(level) for depth, level in threshold.items()}
        return self.checked(threshold)

    @abstractmethod
    def score(self, evidence: Evidence) -> Tensor:
        """How sure the exit is, ``score_B`` in [0, 1]."""

    def __call__(self, evidence: Evidence) -> Tensor:
        """Whether the score is at least the threshold here, ``leave_B``."""
        return self.score(evidence) >= self.level(evidence.depth)

    def fitted(self, scores_of: Callable[[ScorePolicy], ScoresByDepth]) -> Self:
        """The policy, ready for use: fitted, if it must be and has not been; else itself.

        Args:
            scores_of: Gives the scores of another policy on tokens that are known. It is slow: it reads texts.

        Raises:
            UserError: If the tokens are too few to fit the policy.
        """
        return self

    @property
    def fitted_options(self) -> dict[str, Any]:
        """The options that ``fitted`` sets, as YAML holds them; empty for a policy that is never fitted."""
        return {}

    def level(self, depth: int) -> float:
        """The threshold at one depth; a UserError if thresholds are given by depth and this depth has none."""
        assert self.threshold is not None, "a score policy has a threshold"
        if not isinstance(self.threshold, Mapping):
            return self.threshold
        if depth not in self.threshold:
            self.validate([depth])
        return self.threshold[depth]

    def checked(self, threshold: float) -> float:
        """The threshold; a UserError if it is not in [0, 1]."""
        if not 0.0 <= threshold <= 1.0:
            raise UserError(
                f"{type(self).__name__} was given threshold {threshold}; it must lie in [0, 1]. "
                f"Greater means surer: 0 leaves at the first exit, above every score never leaves."
            )
        return float(threshold)

    def validate(self, depths: Sequence[int]) -> None:
        """Refuse thresholds by depth that are not one for each exit."""
        if isinstance(self.threshold, Mapping) and set(self.threshold) != set(depths):
            raise UserError(
                f"{type(self).__name__} was given thresholds for the depths {sorted(self.threshold)}, but the exits "
                f"are at {sorted(depths)}. Give each exit one threshold, or one number for all."
            )


class CountPolicy(TerminationPolicy):
    """A policy whose threshold is a count, of exits or of blocks; its constructor sets ``checked(count)``."""

    @property
    def count(self) -> int:
        """The threshold, as a whole number."""
        assert isinstance(self.threshold, int), "a count policy has one whole number"
        return self.threshold

    def checked(self, threshold: float) -> int:
        """The count; a UserError if it is not a whole number of at least 1."""
        if not 1 <= threshold < math.inf or threshold != int(threshold):
            raise UserError(
                f"{type(self).__name__} was given {threshold}; it counts and needs a whole number of at least 1."
            )
        return int(threshold)
