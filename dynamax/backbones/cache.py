"""The state of all blocks, and which positions have been through which block. Knows neither heads nor policies.

Positions that left early are a *debt* at the depth where they stopped: their hidden states are kept there. Deeper
blocks have been through fewer positions, and at every moment (law 4)::

    filled[d] + positions owed at depths 1..d == filled[0]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from dynamax.backbones.plan import AngleTable, Plan, Rotary, StepPlan
from dynamax.backbones.state import BlockState, CacheView, HeldView, Snapshot, StateKind
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
        if not self._debts and self.filled.count(length) == len(self.filled):
            return
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


class AnyCache(ABC):
    """What ``Backbone.run`` continues: the state of all blocks for the rows of a chunk, and what these rows owe.

    A place is what ``at`` gives and ``plan`` takes: a position, or one for each row.

    Attributes:
        span: The blocks whose state is kept.
    """

    span: Span

    @abstractmethod
    def at(self, depth: int) -> Any:  # noqa: ANN401 - see the class
        """The place behind all positions that have been through block ``depth``."""

    @abstractmethod
    def before(self, count: int) -> Any:  # noqa: ANN401
        """The place of the newest ``count`` positions."""

    @abstractmethod
    def plan(
        self,
        like: Tensor,
        start: Any,  # noqa: ANN401
        past: Any = None,  # noqa: ANN401
        *,
        additive: bool,
        rotary: Rotary | None,
        context: int,
        slopes: Tensor | None = None,
    ) -> Plan:
        """Positions and masks of a chunk; see ``Backbone.plan``. ``context`` is the backbone's."""

    @abstractmethod
    def view(self, index: int, plan: Plan, window: int | None) -> HeldView:
        """What a block is given of its state while the chunk passes."""

    @abstractmethod
    def joins(self, span: Span) -> list[int]:
        """Depths inside the span where positions are owed or looked at."""

    @abstractmethod
    def join(self, depth: int, h_BTD: Tensor) -> Tensor:
        """The chunk, behind the positions that its rows owe before block ``depth``."""

    @abstractmethod
    def part(self, depth: int, h_BTD: Tensor, count: int) -> Tensor:
        """The newest ``count`` positions of each row; the others are owed before block ``depth``, if that is here."""

    @abstractmethod
    def going_on(self, h_BTD: Tensor) -> Tensor:
        """Of a chunk that ``part`` gave back, the rows that have not left since."""

    @abstractmethod
    def owe(self, depth: int, h_BTD: Tensor) -> None:
        """The newest positions of each row stopped before block ``depth``."""

    @abstractmethod
    def passed(self, span: Span, plan: Plan) -> None:
        """The chunk has been through these blocks."""

    @abstractmethod
    def arrived(self, depth: int, h_BTD: Tensor) -> None:
        """The chunk, whatever it brought along, is now before block ``depth``."""

    @abstractmethod
    def peeked(self, index: int, plan: Plan) -> None:
        """The chunk has been through a block that keeps nothing of it."""

    @abstractmethod
    def written(self, index: int, plan: Plan) -> None:
        """The chunk's state was written into a block that did not run."""


@final
class Cache(AnyCache):
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
        outlets: Given the positions ``h_BTD`` that come by a depth, each once and in order, by depth.
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
        self.outlets: dict[int, Callable[[Tensor], None]] = {}
        self._plan: StepPlan | None = None
        self._angles: AngleTable | None = None

    @property
    def length(self) -> int:
        """Positions that have come in."""
        return self.filled[self.span.start]

    @property
    def filled(self) -> list[int]:
        """For each block, how many positions have been through it."""
        return self.group.filled

    # -- what a run needs ---------------------------------------------------------------------------

    def at(self, depth: int) -> int:
        """Positions that have been through block ``depth``."""
        return self.group.filled[depth]

    def before(self, count: int) -> int:
        """Where the newest ``count`` positions begin."""
        return self.length - count

    def plan(
        self,
        like: Tensor,
        start: int,
        past: int | None = None,
        *,
        additive: bool,
        rotary: Rotary | None,
        context: int,
        slopes: Tensor | None = None,
    ) -> StepPlan:
        """A plan for all rows; the newest one is used again for a chunk like its own."""
        assert past is None or past <= start, f"of positions from {start} on, a block has been through {past - start}"
        key = (start, like.shape[1], start if past is None else past, like.dtype, like.device)
        if self._plan is None or self._plan.key != key:
            if self._angles is None and rotary is not None:
                self._angles = AngleTable(rotary, context)
            options: dict[str, Any] = {"additive": additive, "rotary": rotary, "past": past, "table": self._angles}
            options["slopes"] = slopes
            self._plan = StepPlan(like, start, self.pad_B, **options)
        return self._plan

    def view(self, index: int, plan: Plan, window: int | None) -> CacheView:
        """A view of the block's state."""
        assert isinstance(plan, StepPlan), "rows in step have one plan"
        return CacheView(self.states[index], plan, window)

    def joins(self, span: Span) -> list[int]:
        """Depths inside the span where positions are owed or looked at; law 4 is checked where a step begins."""
        if span.start == self.span.start:
            self.group.balance()
        return [depth for depth in {*self.group.debts, *self.outlets} if span.start < depth < span.stop]

    def join(self, depth: int, h_BTD: Tensor) -> Tensor:
        """The chunk, behind the positions owed before block ``depth``."""
        debt_BTD = self.group.due(depth)
        return h_BTD if debt_BTD is None else torch.cat([debt_BTD, h_BTD], 1)

    def part(self, depth: int, h_BTD: Tensor, count: int) -> Tensor:
        """The newest ``count`` positions; the others are owed before block ``depth``, if that is here."""
        if h_BTD.shape[1] > count and depth < self.span.stop:
            self.group.owe(depth, h_BTD[:, :-count])
        return h_BTD[:, -count:]

    def going_on(self, h_BTD: Tensor) -> Tensor:
        """All rows: they leave together."""
        return h_BTD

    def owe(self, depth: int, h_BTD: Tensor) -> None:
        """The newest positions stopped before block ``depth``."""
        self.group.owe(depth, h_BTD)

    def passed(self, span: Span, plan: Plan) -> None:
        """The chunk has been through these blocks."""
        for index in range(*span):
            self.group.filled[index] += plan.length
            self.calls[index] += 1
            self.rows[index] += plan.length

    def arrived(self, depth: int, h_BTD: Tensor) -> None:
        """Show them to whoever looks there."""
        if self.outlets and depth in self.outlets:
            self.outlets[depth](h_BTD)

    def peeked(self, index: int, plan: Plan) -> None:
        """A call of a block."""
        self.calls[index] += 1
        self.rows[index] += plan.length

    def written(self, index: int, plan: Plan) -> None:
        """The chunk's state was written into a block that did not run."""
        self.group.filled[index] += plan.length
        self.writes[index] += plan.length

    # -- the whole run --------------------------------------------------------------------------------

    def work(self) -> Work:
        """All that has been counted so far."""
        return Work(tuple(self.calls), tuple(self.rows), tuple(self.writes))

    def count_anew(self) -> Work:
        """All that has been counted since the last call; from here on the count begins at zero."""
        work = self.work()
        self.calls, self.rows, self.writes = ([0] * self.span.stop for _ in range(3))
        return work

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
