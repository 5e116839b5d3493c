"""The state of all blocks: cells, fill levels, debts, marks. Knows neither heads nor policies.

Positions that left early stand as a *debt* at the depth where they stopped. Deeper blocks have
seen fewer positions, and at every moment the books balance (law 4)::

    filled[d] + positions owed at depths 1..d == filled[0]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax.backbones.cells import Anchor, Cell, Part
from dynamax.types import Memory, Span, Work


@dataclass(frozen=True)
class Mark:
    """Where a rollback can return to: the length, and what heads and recurrent blocks remembered then."""

    length: int
    memories: dict[tuple[int, str], Memory]
    states: list[Anchor | None]


class Cache:
    """State of one decoding run over all blocks.

    Args:
        span: The blocks whose state is kept here; a part of them, where the others run elsewhere.
        capacity: Positions to make room for at first; more are made as needed.
        pad_B: Padding positions at the left of each row, or None.
        parts: What each block keeps; keys and values if left out.

    Attributes:
        cells: The state of each block.
        filled: For each block, how many positions have been through it.
        calls: For each block, how often it was called.
        rows: For each block, how many positions those calls held.
        writes: For each block, how many positions were written without running it.
        memories: What recurrent heads remember, by (depth, head name).
    """

    def __init__(
        self,
        span: Span,
        capacity: int = 256,
        pad_B: Tensor | None = None,
        parts: Sequence[Collection[Part]] | None = None,
    ) -> None:
        self.span = span
        depth = span.stop
        self.pad_B = pad_B
        self.cells = [Cell(("keys",) if parts is None else parts[index], capacity) for index in range(depth)]
        self.filled = [0] * depth
        self.calls = [0] * depth
        self.rows = [0] * depth
        self.writes = [0] * depth
        self.memories: dict[tuple[int, str], Memory] = {}
        self._debts: dict[int, Tensor] = {}

    @property
    def length(self) -> int:
        """Positions that have come in."""
        return self.filled[self.span.start]

    # -- debts ---------------------------------------------------------------------------------

    @property
    def debts(self) -> dict[int, int]:
        """Positions owed, by depth."""
        return {depth: h.shape[1] for depth, h in sorted(self._debts.items())}

    def owe(self, depth: int, h_BTD: Tensor) -> None:
        """These positions stopped before block ``depth``; they are newer than any owed there."""
        assert self.span.start < depth < self.span.stop, f"a debt at depth {depth}, but blocks {self.span} are here"
        known = self._debts.get(depth)
        self._debts[depth] = h_BTD if known is None else torch.cat([known, h_BTD], 1)

    def due(self, depth: int) -> Tensor | None:
        """Take the positions owed before block ``depth``, oldest first; they are owed no longer."""
        return self._debts.pop(depth, None)

    def owed(self, depth: int) -> Tensor | None:
        """Look at the positions owed before block ``depth`` and leave them owed."""
        return self._debts.get(depth)

    def balance(self) -> None:
        """Law 4: every position is either through a block or owed below it."""
        owed = 0
        for depth in range(*self.span):
            debt = self._debts.get(depth)
            owed += 0 if debt is None else debt.shape[1]
            assert self.filled[depth] + owed == self.length, (
                f"block {depth} has seen {self.filled[depth]} positions and {owed} are owed below it, "
                f"but {self.length} came in"
            )

    # -- what blocks call -----------------------------------------------------------------------

    def count(self, block: int, rows: int) -> None:
        """A block has been run over ``rows`` positions."""
        self.filled[block] += rows
        self.calls[block] += 1
        self.rows[block] += rows

    def work(self) -> Work:
        """All that has been counted so far."""
        return Work(tuple(self.calls), tuple(self.rows), tuple(self.writes))

    # -- marks ----------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """Where a later ``rollback`` can return to. Costs no copy."""
        memories = {key: memory.copy() for key, memory in self.memories.items()}
        return Mark(self.length, memories, [cell.mark() for cell in self.cells])

    def rollback(self, mark: Mark, keep: int = 0) -> None:
        """Forget all positions since the mark but the first ``keep``.

        Where blocks are recurrent, positions can be kept since the newest mark alone, and an older mark can be
        returned to only if nothing was owed there. Heads' memories return to the mark; whoever keeps positions lets
        the heads read them again.
        """
        length = mark.length + keep
        at = self.filled[-1]
        for depth in sorted(self._debts, reverse=True):
            rows = self._debts[depth].shape[1]
            kept = max(0, min(rows, length - at))
            at += rows
            if kept < rows:
                self._debts[depth] = self._debts[depth][:, :kept]
            if kept == 0:
                del self._debts[depth]
        for block, (cell, state) in enumerate(zip(self.cells, mark.states, strict=True)):
            cell.crop(length, state)
            self.filled[block] = min(self.filled[block], length)
        self.memories = {key: memory.copy() for key, memory in mark.memories.items()}
