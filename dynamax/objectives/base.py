"""What heads are trained towards. Knows heads, their sites and stored states; not optimisers, epochs or policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from dynamax.data.batch import HiddenBatch
from dynamax.heads.bank import ExitBank
from dynamax.types import Site

Phase = Literal["lenses", "gates"]


class Objective(ABC):
    """A loss over the heads of all exits at once. Heads share nothing, so neither do their gradients.

    Attributes:
        phase: Which heads its loss has a gradient for.
    """

    phase: ClassVar[Phase]

    @abstractmethod
    def loss(self, bank: ExitBank, batch: HiddenBatch, sites: Mapping[int, Site]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, summed over the exits, and what is worth logging beside it.

        Args:
            bank: The heads.
            batch: Hidden states at the exits and the full model's most likely tokens.
            sites: The place of each exit, by depth.

        Returns:
            The loss, a scalar with a gradient, and detached scalars by name, such as ``positive/15``.
        """

    def begin(self) -> None:  # noqa: B027 - most objectives remember nothing
        """Training begins: forget what was remembered of other heads."""


def counted(batch: HiddenBatch) -> Tensor:
    """The N positions, of B x T, at which heads are trained and measured: where decoding would ask them."""
    return batch.live_BT & batch.answer_BT
