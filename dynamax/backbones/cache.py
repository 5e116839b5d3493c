"""The state of all blocks, and which positions have been through which block. Knows neither heads nor policies.

Positions that left early are a *debt* at the depth where they stopped: their hidden states are kept there. Deeper
blocks have been through fewer positions, and at every moment (law 4)::

    filled[d] + positions owed at depths 1..d == filled[0]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax.backbones.plan import AngleTable, StepPlan
from dynamax.backbones.state import BlockState, Snapshot, StateKind
from dynamax.types import Memory, Span, Work


class RowGroup:
    """Rows of a batch that have been through the same blocks: their fill levels and their debts.

    Args:
        span: The blocks whose state is kept.

    Attributes:
        filled: For each block, how many positions have been through it.
    """

    def __init__(self, span: Span) -> None:
        self.span = span
        self.filled = [0] * span.stop
        self._debts: dict[int, Tensor] = {}

    @property
    def debts(self) -> dict[int, int]:
        """Positions owed, by depth, shallowest first."""
        return {depth: h_BTD.shape[1] for depth, h_BTD in sorted(self._debts.items())}

    def owe(self, depth: int, h_BTD: Tensor) -> None:
        """These positions stopped before block ``depth``; they are newer than any owed there."""
        assert self.span.start < depth < self.span.stop, f"a debt at depth {depth}, but blocks {self.span} are here"
        known_BTD = self._debts.get(depth)
        self._debts[depth] = h_BTD if known_BTD is None else torch.cat([known_BTD, h_BTD], 1)

    def due(self, depth: int) -> Tensor | None:
        """Take the positions owed before block ``depth``, oldest first; they are owed no longer."""
        return self._debts.pop(depth, None)

    def owed(self, depth: int) -> Tensor | None:
        """Look at the positions owed before block ``depth`` and leave them owed."""
        return self._debts.get(depth)

    def balance(self) -> None:
        """Law 4: every position is either through a block or owed below it."""
        owed, length = 0, self.filled[self.span.start]
        for depth in range(*self.span):
            debt_BTD = self._debts.get(depth)
            owed += 0 if debt_BTD is None else debt_BTD.shape[1]
            assert self.filled[depth] + owed == length, (
                f"block {depth} has seen {self.filled[depth]} positions and {owed} are owed below it, "
                f"but {length} came in"
            )

    def crop(self, length: int) -> None:
        """Forget the positions from ``length`` on, through blocks and owed alike."""
        at = self.filled[-1]
        for depth in sorted(self._debts, reverse=True):  # the deepest debts are the oldest
            h_BTD = self._debts.pop(depth)
            if at < length:
                self._debts[depth] = h_BTD[:, : length - at]
            at += h_BTD.shape[1]
        self.filled = [min(filled, length) for filled in self.filled]


@dataclass(frozen=True)
class CacheSnapshot:
    """Where a rollback can return to: the length, and what heads and blocks remembered then."""

    length: int
    memories: dict[tuple[int, str], Memory]
    states: list[Snapshot]


class Cache:
    """State of one decoding run over all blocks; the rows of the batch are one row group.

    Args:
        span: The blocks whose state is kept here; a part of them, where the others run elsewhere.
        capacity: Positions to make room for at first; more are made as needed.
        pad_B: Padding positions at the left of each row, or None.
        kinds: What each block keeps; keys and values if left out.

    Attributes:
        states: The state of each block.
        group: Fill levels and debts of the rows.
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
        kinds: Sequence[Collection[StateKind]] | None = None,
    ) -> None:
        self.span = span
        self.pad_B = pad_B
        self.states = [BlockState(("keys",) if kinds is None else kinds[i], capacity) for i in range(span.stop)]
        self.group = RowGroup(span)
        self.calls = [0] * span.stop
        self.rows = [0] * span.stop
        self.writes = [0] * span.stop
        self.memories: dict[tuple[int, str], Memory] = {}
        self.plan: StepPlan | None = None
        self.angles: AngleTable | None = None

    @property
    def length(self) -> int:
        """Positions that have come in."""
        return self.filled[self.span.start]

    @property
    def filled(self) -> list[int]:
        """For each block, how many positions have been through it."""
        return self.group.filled

    def work(self) -> Work:
        """All that has been counted so far."""
        return Work(tuple(self.calls), tuple(self.rows), tuple(self.writes))

    def snapshot(self) -> CacheSnapshot:
        """Where a later ``rollback`` can return to. Copies no keys and no states."""
        memories = {key: memory.copy() for key, memory in self.memories.items()}
        states = [state.snapshot(filled) for state, filled in zip(self.states, self.filled, strict=True)]
        return CacheSnapshot(self.length, memories, states)

    def rollback(self, snapshot: CacheSnapshot, keep: int = 0) -> None:
        """Forget all positions since the snapshot but the first ``keep``; heads' memories return to the snapshot.

        Where blocks are recurrent, positions can be kept since the newest snapshot alone, and an older one can be
        returned to only if nothing was owed there.
        """
        length = snapshot.length + keep
        for state, filled, then in zip(self.states, self.filled, snapshot.states, strict=True):
            if filled > length:
                state.crop(length, then)
        self.group.crop(length)
        self.memories = {key: memory.copy() for key, memory in snapshot.memories.items()}
