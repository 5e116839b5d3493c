"""What a decoder is, and the clock that may watch it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from torch import Tensor

from dynamax.types import Step


class Probe:
    """Watches a decoder. Does nothing itself; see ``dynamax.decoding.probe`` for clocks."""

    def begin(self, *, prefill: bool) -> None:
        """A step begins."""

    def mark(self, depth: int) -> None:
        """The step has completed ``depth`` blocks and read the exit there."""

    def end(self, depth: int) -> None:
        """The step has its token, from ``depth`` blocks."""


class Decoder(ABC):
    """Turns a prompt into tokens, a step at a time."""

    @abstractmethod
    def decode(
        self,
        prompt_BT: Tensor,
        *,
        limit: int,
        stop: Sequence[int] = (),
        pad_B: Tensor | None = None,
        forced_BT: Tensor | None = None,
        probe: Probe | None = None,
    ) -> Iterator[Step]:
        """Yield one ``Step`` for each generated token.

        Args:
            prompt_BT: Token ids; rows padded at the left.
            limit: Most tokens to generate.
            stop: Token ids that end a row; decoding ends when every row has ended.
            pad_B: Padding positions at the left of each row, or None.
            forced_BT: Tokens to go on with in place of the generated ones; the steps still tell what
                would have been generated at each position.
            probe: A clock.

        Raises:
            UserError: At the first step: if the prompt is not token ids of shape [B, T] within the vocabulary, or
                does not fit the context together with the limit.
        """
