"""The state of one block: keys and values, a recurrent state, both, or neither. Knows no positions, no debts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import torch
from torch import Tensor

Part = Literal["keys", "recurrent"]
"""What a block may keep of the positions it has seen."""

Past = tuple[Tensor, ...]
"""A recurrent state: whatever tensors its reader hands on. They are replaced, never written into."""

Anchor = tuple[int, Past | None]
"""A fill level, and the recurrent state there."""

Reader = Callable[..., tuple[Tensor, Past]]
"""``(past or None, *rows) -> (answer, past)``: continues a recurrence; rows have positions in dimension 1."""


class Keys:
    """Keys and values of one attention block, in buffers that grow by doubling.

    Nothing is ever evicted: a window is a slice, a rollback is a smaller fill level.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.fill = 0
        self.holes: set[int] = set()
        self._kv: tuple[Tensor, Tensor] | None = None

    def append(self, k_BHTD: Tensor, v_BHTD: Tensor) -> None:
        """Write the keys and values of the next positions."""
        stop = self.fill + k_BHTD.shape[2]
        if self._kv is None or stop > self._kv[0].shape[2]:
            self._grow(stop, k_BHTD, v_BHTD)
        assert self._kv is not None
        for buffer, new in zip(self._kv, (k_BHTD, v_BHTD), strict=True):
            buffer[:, :, self.fill : stop] = new
        self.fill = stop

    def _grow(self, needed: int, k_BHTD: Tensor, v_BHTD: Tensor) -> None:
        self.capacity = max(needed, self.capacity if self._kv is None else 2 * self.capacity)
        old = self._kv
        self._kv = tuple(  # type: ignore[assignment]
            x.new_zeros(x.shape[0], x.shape[1], self.capacity, x.shape[3]) for x in (k_BHTD, v_BHTD)
        )
        if old is not None:
            for buffer, past in zip(self._kv, old, strict=True):  # type: ignore[arg-type]
                buffer[:, :, : self.fill] = past[:, :, : self.fill]

    def read(self, start: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of positions ``start`` up to the fill level, as views."""
        assert self._kv is not None, "read before the first append"
        k, v = self._kv
        return k[:, :, start : self.fill], v[:, :, start : self.fill]

    def skip(self, count: int) -> None:
        """Leave the next positions empty, as holes that no later row may attend to."""
        stop = self.fill + count
        assert self._kv is not None, "nothing can be skipped before the first append"
        if stop > self._kv[0].shape[2]:
            self._grow(stop, *self._kv)
        self.holes |= set(range(self.fill, stop))
        self.fill = stop

    def crop(self, fill: int) -> None:
        """Forget the positions from ``fill`` on."""
        self.fill = min(self.fill, fill)
        self.holes = {hole for hole in self.holes if hole < fill}


class Recurrent:
    """Convolution window and scan state of one block, in whatever form its reader hands on.

    A recurrent state cannot be cropped. A mark keeps it, by reference, and from then on the rows that advance
    it are noted, so that a rollback can read the first few of them again: the recurrence alone, no weights
    but its own.
    """

    def __init__(self) -> None:
        self.fill = 0
        self.past: Past | None = None
        self._mark: Anchor | None = None
        self._reader: Reader | None = None
        self._rows: list[Past] = []

    def advance(self, reader: Reader, rows: Past) -> Tensor:
        """Read the next positions; answers with what the reader makes of them."""
        answer, self.past = reader(self.past, *rows)
        self.fill += rows[0].shape[1]
        if self._mark is not None:
            self._reader = reader
            self._rows.append(rows)
        return answer

    def skip(self, count: int) -> None:
        """Let positions go by unread. A rollback can then return to a mark, but to no place behind it."""
        self.fill += count
        self._mark = None

    def mark(self) -> Anchor:
        """Where ``crop`` can return to, and beyond it to any later position; rows are noted until the next mark."""
        self._mark, self._rows = (self.fill, self.past), []
        return self._mark

    def crop(self, fill: int, mark: Anchor) -> None:
        """Return to the fill level ``fill``: the mark's, or a later one if the mark is the newest."""
        if self.fill <= fill:
            return
        assert fill == mark[0] or mark is self._mark, "only positions after the newest mark can be kept"
        rows = [torch.cat(parts, 1)[:, : fill - mark[0]] for parts in zip(*self._rows, strict=True)]
        self.fill, self.past = mark
        self._mark, self._rows = mark, []
        if rows and rows[0].shape[1]:
            assert self._reader is not None
            self.advance(self._reader, tuple(rows))


class Cell:
    """What one block keeps.

    Attributes:
        keys: Keys and values, or None for a block without attention.
        recurrent: Recurrent state, or None for a block without.
    """

    def __init__(self, parts: Collection[Part], capacity: int) -> None:
        self.keys = Keys(capacity) if "keys" in parts else None
        self.recurrent = Recurrent() if "recurrent" in parts else None

    def skip(self, count: int) -> None:
        """Let positions go by: holes among the keys, nothing in a recurrent state."""
        for part in (self.keys, self.recurrent):
            if part is not None:
                part.skip(count)

    def mark(self) -> Anchor | None:
        """Where ``crop`` finds a recurrent state again; None without one."""
        return None if self.recurrent is None else self.recurrent.mark()

    def crop(self, fill: int, mark: Anchor | None) -> None:
        """Forget the positions from ``fill`` on, at or after the mark."""
        if self.keys is not None:
            self.keys.crop(fill)
        if self.recurrent is not None and mark is not None:
            self.recurrent.crop(fill, mark)
