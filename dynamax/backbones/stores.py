"""What a block is given for its cache while one chunk passes. Knows one cell and no positions.

transformers' attention calls ``update`` with keys and values; recurrent mixers call ``advance``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax.backbones.cells import Cell, Past, Reader


class Store:
    """What a block is given for its cache: its cell, appended to and read from a position on.

    Attributes:
        cell: The block's state.
        first: Oldest position whose keys the chunk may see.
        live_BT: False on padding, for recurrent blocks; None if nothing is padded.
    """

    def __init__(self, cell: Cell, first: int, live_BT: Tensor | None = None) -> None:
        self.cell, self.first, self.live_BT = cell, first, live_BT

    @property
    def holes(self) -> frozenset[int]:
        """Positions whose keys were never written."""
        return frozenset() if self.cell.keys is None else frozenset(self.cell.keys.holes)

    @property
    def last(self) -> bool:
        """Whether the block may stop as soon as it has advanced its recurrent state: nothing else is wanted of it."""
        return False

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append the chunk's keys and values; answer with all that the chunk may see."""
        assert self.cell.keys is not None
        self.cell.keys.append(k_BHTD, v_BHTD)
        return self.cell.keys.read(self.first)

    def advance(self, reader: Reader, rows: Past) -> Tensor:
        """Continue the recurrent state over the chunk."""
        assert self.cell.recurrent is not None
        return self.cell.recurrent.advance(reader, rows)


class Peek(Store):
    """The same, but nothing is kept: for a look ahead that must leave no trace."""

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Answer with the held keys and values and the chunk's own behind them."""
        assert self.cell.keys is not None
        k_past, v_past = self.cell.keys.read(self.first)
        return torch.cat([k_past, k_BHTD], 2), torch.cat([v_past, v_BHTD], 2)

    def advance(self, reader: Reader, rows: Past) -> Tensor:
        """Read the chunk from the held state."""
        assert self.cell.recurrent is not None
        return reader(self.cell.recurrent.past, *rows)[0]


class Pass(Store):
    """No state at all: for one pass over a text from its first position."""

    def __init__(self, live_BT: Tensor | None = None) -> None:
        super().__init__(Cell((), 0), 0, live_BT)

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Answer with the chunk's own keys and values."""
        return k_BHTD, v_BHTD

    def advance(self, reader: Reader, rows: Past) -> Tensor:
        """Read the chunk from nothing."""
        return reader(None, *rows)[0]


class Written(Exception):
    """The block's state has been written and nothing more is wanted of it."""


class WriteOnly(Store):
    """Write, then stop the block: its queries, scores and feed-forward are not wanted.

    A block that keeps two parts runs until the second is written.
    """

    def __init__(self, cell: Cell, first: int, live_BT: Tensor | None = None) -> None:
        super().__init__(cell, first, live_BT)
        self._open = (cell.keys is not None) + (cell.recurrent is not None)

    @property
    def last(self) -> bool:
        """True if only one part is left to be written."""
        return self._open == 1

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append the chunk's keys and values.

        Raises:
            Written: If that was all.
        """
        seen = super().update(k_BHTD, v_BHTD)
        self._close()
        return seen

    def advance(self, reader: Reader, rows: Past) -> Tensor:
        """Continue the recurrent state.

        Raises:
            Written: If that was all.
        """
        answer = super().advance(reader, rows)
        self._close()
        return answer

    def _close(self) -> None:
        self._open -= 1
        if not self._open:
            raise Written
