"""What heads are trained towards. Knows heads, their sites and stored states; not optimisers, epochs or policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar, Literal, get_args

from torch import Tensor

from dynamax.data.batch import HiddenBatch
from dynamax.heads.bank import ExitBank
from dynamax.types import Site

Kind = Literal["lenses", "gates"]
"""What an exit is made of: a lens says which token, gates say whether to leave."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class Objective(ABC):
    """A loss over the heads of all exits at once. Heads share nothing, so neither do their gradients.

    Attributes:
        trains: The kinds of heads that its loss has a gradient for.
        tokens: How many of the full model's most likely tokens the store must keep of a position.
    """

    trains: ClassVar[frozenset[Kind]]
    tokens: int = 1

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

    def forget(self, changed: Collection[Kind] | None) -> None:  # noqa: B027 - most objectives remember nothing
        """Forget what was remembered of heads that have changed.

        Args:
            changed: Kinds of heads; None where everything may have, documents too.
        """


def counted(batch: HiddenBatch) -> Tensor:
    """The N positions, of B x T, at which heads are trained and measured: where decoding would ask them."""
    return batch.live_BT & batch.answer_BT
