"""The state of many runs of one row each, side by side, so that any of them can share a chunk.

Each row has fill levels and debts of its own: a position is owed by its row alone, and is run when that row goes on.
They are those of a run of its own (``Cache``), as are its memories and counts; the state of its blocks is in a slot.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynamax.backbones.cache import AnyCache, Cache
from dynamax.backbones.plan import AngleTable, Plan, Rotary
from dynamax.backbones.ragged import RaggedPlan, SlotState, SlotView
from dynamax.backbones.state import StateKind
from dynamax.types import Span

Place = tuple[int, ...]
"""A position for each row."""


@final
class Slots:
    """The state of all blocks for a number of rows; the rows that are taken are always the first.

    Args:
        span: The blocks whose state is kept.
        kinds: What each block keeps.
        slots: Most rows.
        capacity: Positions to make room for at first.

    Attributes:
        rows: The run of each row, by slot.
        angles: Rotary angles; None before any were asked for.
    """

    def __init__(self, span: Span, kinds: Sequence[Collection[StateKind]], slots: int, capacity: int = 256) -> None:
        self.span = span
        self.rows: list[Cache] = []
        self.angles: AngleTable | None = None
        self.states = [SlotState(kind, slots, capacity) for kind in kinds]

    def add(self, cache: Cache) -> None:
        """A run that has read nothing yet moves in behind the others. It has no states of its own from here on."""
        cache.states.clear()
        self.rows.append(cache)

    def remove(self, slot: int) -> None:
        """A row is done; the last row moves to its slot."""
        last = self.rows.pop()
        if slot < len(self.rows):
            self.rows[slot] = last
            for index, state in enumerate(self.states):
                state.move(len(self.rows), slot, last.filled[index])

    def clear(self, slot: int) -> None:
        """Forget the state in a slot: what a mask hides must still be numbers."""
        for state in self.states:
            for buffer in (*state.keys, *state.recurrent):
                buffer[slot] = 0

    def select(self, slots: Sequence[int], lengths: Sequence[int] | None = None) -> SelectedRows:
        """Some of the rows, to run a chunk with; see ``SelectedRows``."""
        return SelectedRows(self, slots, lengths)


@final
class SelectedRows(AnyCache):
    """Some rows of ``Slots``. A place is a position for each of them.

    A chunk of them is given and given back with as many positions of every row; between that, positions that a row
    owes stand before its own, and shorter rows are padded behind.

    Args:
        slots: All rows.
        chosen: The slots of those that are meant.
        lengths: Positions of each row in the chunk, if they differ: then it is padded from the beginning, and no row
            may owe anything.
    """

    def __init__(self, slots: Slots, chosen: Sequence[int], lengths: Sequence[int] | None = None) -> None:
        self.span = slots.span
        self._all = slots
        self.slots = tuple(chosen)
        self.rows = [slots.rows[slot] for slot in chosen]
        self._given = self._lengths = lengths
        self._kept: list[int] | None = None
        self._plan: tuple[object, RaggedPlan] | None = None

    def only(self, places: Sequence[int]) -> SelectedRows:
        """Those of these rows that stand at some places among them."""
        return SelectedRows(self._all, [self.slots[place] for place in places])

    def keep(self, places: Sequence[int]) -> None:
        """The other rows leave: from here on these are meant."""
        self.slots = tuple(self.slots[place] for place in places)
        self.rows = [self.rows[place] for place in places]
        self._kept = list(places)

    def going_on(self, h_BTD: Tensor) -> Tensor:
        """The rows that were kept."""
        kept, self._kept = self._kept, None
        return h_BTD if kept is None else h_BTD[kept]

    def at(self, depth: int) -> Place:
        """Positions of each row that have been through block ``depth``."""
        return tuple(row.group.filled[depth] for row in self.rows)

    def before(self, count: int) -> Place:
        """Where each row's newest ``count`` positions begin."""
        return tuple(row.length - count for row in self.rows)

    def plan(
        self,
        like: Tensor,
        start: Place,
        past: Place | None = None,
        *,
        additive: bool,
        rotary: Rotary | None,
        context: int,
        slopes: Tensor | None = None,
    ) -> RaggedPlan:
        """A plan for these rows; the newest one is used again for a chunk like its own."""
        past = start if past is None else past
        lengths = self._lengths or [like.shape[1]] * len(self.rows)
        assert all(map(operator.le, past, start)), f"of positions from {start} on, blocks have been through {past}"
        key = (like.shape[1], tuple(lengths), start, past, self.slots)
        if self._plan is None or self._plan[0] != key:
            if self._all.angles is None and rotary is not None:
                self._all.angles = AngleTable(rotary, context)
            options: dict[str, Any] = {"rotary": rotary, "table": self._all.angles, "slopes": slopes}
            made = RaggedPlan(like, start, past, lengths, self.slots, **options)
            self._plan = key, made
        return self._plan[1]

    def view(self, index: int, plan: Plan, window: int | None) -> SlotView:
        """A view of these rows' state."""
        assert isinstance(plan, RaggedPlan), "each row has a place of its own"
        return SlotView(self._all.states[index], plan, window)

    def joins(self, span: Span) -> list[int]:
        """Depths inside the span where any of the rows owes positions."""
        if span.start == self.span.start:
            for row in self.rows:
                row.group.balance()
        return sorted({depth for row in self.rows for depth in row.group.debts if span.start < depth < span.stop})

    def join(self, depth: int, h_BTD: Tensor) -> Tensor:
        """The chunk, each row behind the positions that it owes before block ``depth``."""
        debts = [row.group.due(depth) for row in self.rows]
        if all(debt is None for debt in debts):
            return h_BTD
        lengths = self._lengths or [h_BTD.shape[1]] * len(self.rows)
        rows = []
        for debt_1TD, h_TD, length in zip(debts, h_BTD, lengths, strict=True):
            rows.append(h_TD[:length] if debt_1TD is None else torch.cat([debt_1TD[0], h_TD[:length]]))
        self._lengths = [len(h_TD) for h_TD in rows]
        return pad_sequence(rows, batch_first=True)

    def part(self, depth: int, h_BTD: Tensor, count: int) -> Tensor:
        """Each row's newest ``count`` positions; the others are owed before block ``depth``, if that is here."""
        lengths, self._lengths = self._lengths, self._given
        if lengths is self._given or lengths is None:
            return h_BTD
        newest = []
        for row, h_TD, length in zip(self.rows, h_BTD, lengths, strict=True):
            own = length - count
            if own and depth < self.span.stop:
                row.group.owe(depth, h_TD[None, :own])
            newest.append(h_TD[own:length])
        return torch.stack(newest)

    def owe(self, depth: int, h_BTD: Tensor) -> None:
        """Each row's newest positions stopped before block ``depth``."""
        for row, h_TD in zip(self.rows, h_BTD, strict=True):
            row.group.owe(depth, h_TD[None])

    def passed(self, span: Span, plan: Plan) -> None:
        """The chunk has been through these blocks."""
        lengths = self._lengths or [plan.length] * len(self.rows)
        blocks = slice(*span)
        for row, length in zip(self.rows, lengths, strict=True):
            filled = row.group.filled
            filled[blocks] = [positions + length for positions in filled[blocks]]
            row.calls[blocks] = [calls + 1 for calls in row.calls[blocks]]
            row.rows[blocks] = [positions + length for positions in row.rows[blocks]]

    def arrived(self, depth: int, h_BTD: Tensor) -> None:
        """Nobody looks at rows that share a chunk."""

    def peeked(self, index: int, plan: Plan) -> None:
        """The chunk has been through a block that keeps nothing of it."""
        for row in self.rows:
            row.calls[index] += 1
            row.rows[index] += plan.length

    def written(self, index: int, plan: Plan) -> None:
        """The chunk's state was written into a block that did not run."""
        for row in self.rows:
            row.group.filled[index] += plan.length
            row.writes[index] += plan.length
