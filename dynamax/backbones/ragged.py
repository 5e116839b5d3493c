"""Rows of a batch that stand at positions of their own: their plan, their state, and what a block is given of it.

Rows take turns: any of them may run, each with a few positions of its own. So a chunk may be ragged: a row's positions
come first, and what is left of the chunk behind them is padding, which changes nothing.

S counts the slots: places for one row's state each.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.backbones.plan import AngleTable, Plan, Rotary
from dynamax.backbones.state import HeldView, Recurrence, StateKind, Tensors


@final
class RaggedPlan(Plan):
    """A chunk of which each row holds positions of its own.

    Args:
        like: As for ``Plan``.
        starts: Position of each row's first one in the chunk.
        past: Keys that each row's block holds from before the chunk.
        lengths: Positions of each row; the chunk is as long as the longest.
        slots: The slot of each row's state.
        rotary: As for ``Plan``.
        table: Its angles; None only where there are none.
        slopes: As for ``Plan``.

    Attributes:
        held: Keys that attention is given for each row, its own and padding included.
        fresh: Whether the rows' blocks have been through nothing yet.
        whole: Whether the rows are those of the first slots, in their order: then no state need be gathered.
        slots_B: The slots, as a tensor.
    """

    def __init__(
        self,
        like: Tensor,
        starts: Sequence[int],
        past: Sequence[int],
        lengths: Sequence[int],
        slots: Sequence[int],
        *,
        rotary: Rotary | None,
        table: AngleTable | None,
        slopes: Tensor | None = None,
    ) -> None:
        # a mask of booleans would be changed in every block
        super().__init__(like, additive=True, rotary=rotary, slopes=slopes)
        self.place = (*slots, *past)
        self.held = max(past) + self.length
        self.fresh = not any(past)
        self.whole = list(slots) == list(range(self.rows))
        self._owed = list(starts) != list(past)
        self._table, self._end = table, max(map(operator.add, starts, lengths))
        self._oldest = [min(pair) for pair in zip(starts, past, strict=True)]
        self._ragged = any(length < self.length for length in lengths)
        table_4B = torch.tensor([starts, past, lengths, slots], device=like.device)
        self._starts_B1, self._past_B1, self._lengths_B1 = table_4B[:3, :, None]
        self.slots_B = table_4B[3]
        self._columns_T = torch.arange(self.length, device=like.device)
        self._masks: dict[int | None, Tensor] = {}
        self._cells: tuple[int, Tensor] | None = None

    def make_positions(self) -> Tensor:
        """Padding repeats the row's last position."""
        return self._starts_B1 + torch.minimum(self._columns_T, self._lengths_B1 - 1)

    def make_angles(self, rotary: Rotary, kind: str | None) -> tuple[Tensor, Tensor]:
        """From the table."""
        assert self._table is not None, "a model with angles comes with their table"
        cos_1KR, sin_1KR = self._table.span(self._like, 0, self._end, kind)
        return cos_1KR[0, self.positions_BT], sin_1KR[0, self.positions_BT]

    def make_live(self) -> Tensor | None:
        """False on padding behind a row's own positions."""
        return self._columns_T < self._lengths_B1 if self._ragged else None

    @property
    def ends_B(self) -> Tensor | None:
        """Positions of each row; None if all rows are as long as the chunk."""
        return self._lengths_B1[:, 0] if self._ragged else None

    def first_key(self, window: int | None) -> int:
        """The oldest position that any row may attend to; of keys held, those from there on are read."""
        return 0 if window is None else max(0, min(self._oldest) - window + 1)

    def mask(self, window: int | None) -> Tensor:
        """Attention mask ``[B, 1, T, K]`` over the keys from ``first_key(window)`` to ``held``; see ``as_mask``."""
        if window not in self._masks:
            keys_K = torch.arange(self.first_key(window), self.held, device=self._like.device)
            keys_BK = keys_K.expand(self.rows, -1)
            if self._owed:  # positions between have no key
                own = keys_K >= self._past_B1
                keys_BK = torch.where(own, keys_K - self._past_B1 + self._starts_B1, keys_K)
            rows_BT1 = (self._starts_B1 + self._columns_T)[..., None]
            seen_BTK = keys_BK[:, None] <= rows_BT1
            if window is not None:
                seen_BTK &= keys_BK[:, None] > rows_BT1 - window
            self._masks[window] = self.as_mask(seen_BTK[:, None], (rows_BT1 - keys_BK[:, None])[:, None])
        return self._masks[window]

    def cells(self, capacity: int) -> Tensor:
        """Where the chunk's keys go in buffers ``[S * capacity, ...]``: ``[B * T]``."""
        if self._cells is None or self._cells[0] != capacity:
            cells_BT = self.slots_B[:, None] * capacity + self._past_B1 + self._columns_T
            self._cells = capacity, cells_BT.flatten()
        return self._cells[1]


@final
class SlotState:
    """What one block keeps of many rows, one slot each.

    Args:
        kinds: As for ``BlockState``.
        slots: How many.
        capacity: Positions to make room for at first.

    Attributes:
        keys: Keys and values, ``[S, capacity, H, D]`` each; empty for a block without attention, or before any row.
        recurrent: Recurrent state, ``[S, ...]`` each; empty for a block without one, or before any row.
    """

    def __init__(self, kinds: Collection[StateKind], slots: int, capacity: int) -> None:
        self.kinds = kinds
        self.slots, self.capacity = slots, capacity
        self.keys: Tensors = ()
        self.recurrent: Tensors = ()

    def move(self, source: int, target: int, filled: int) -> None:
        """Move one row's state to another slot."""
        for buffer in self.keys:
            buffer[target, :filled] = buffer[source, :filled]
        for buffer in self.recurrent:
            buffer[target] = buffer[source]

    def reserve(self, positions: int) -> None:
        """Make room for so many positions of each row."""
        if positions > self.capacity:
            self.capacity = max(positions, 2 * self.capacity) if self.keys else positions
            self.keys = tuple(F.pad(held, (0, 0, 0, 0, 0, self.capacity - held.shape[1])) for held in self.keys)


@final
class SlotView(HeldView):
    """A view of some rows' state. Keys and values are written at once; the recurrent state when it is committed.

    Args:
        state: The block's state.
        plan: Where the rows stand.
        window: As for ``CacheView``.
    """

    def __init__(self, state: SlotState, plan: RaggedPlan, window: int | None) -> None:
        self._state, self._plan = state, plan
        self._taken: Tensors | None = None
        self.live_BT, self.ends_B = plan.live_BT, plan.ends_B
        self.mask = None
        if "keys" in state.kinds:
            state.reserve(plan.held)
            self._first = plan.first_key(window)
            self.mask = plan.mask(window)

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the chunk's keys and values behind those held; what each row may see, and more that the mask hides."""
        state, plan, cells = self._state, self._plan, self._plan.cells(self._state.capacity)
        if not state.keys:
            shapes = ((state.slots, state.capacity, x.shape[1], x.shape[3]) for x in (k_BHTD, v_BHTD))
            state.keys = tuple(k_BHTD.new_zeros(shape) for shape in shapes)
        seen = []
        for buffer, x_BHTD in zip(state.keys, (k_BHTD, v_BHTD), strict=True):
            buffer.flatten(0, 1).index_copy_(0, cells, x_BHTD.transpose(1, 2).flatten(0, 1))
            if plan.whole:
                read = buffer[: plan.rows, self._first : plan.held]
            else:
                read = buffer[:, self._first : plan.held].index_select(0, plan.slots_B)
            seen.append(read.transpose(1, 2))
        return seen[0], seen[1]

    @property
    def fresh(self) -> bool:
        """Whether the rows read their prompts, behind nothing."""
        return self._plan.fresh

    def past(self) -> Tensors | None:
        """The recurrent state of the rows; None before their first position."""
        plan = self._plan
        if plan.fresh:
            return None
        return tuple(
            held[: plan.rows] if plan.whole else held.index_select(0, plan.slots_B) for held in self._state.recurrent
        )

    def take(self, recurrence: Recurrence, rows: Tensors, states: tuple[Tensors, ...]) -> None:
        """Take note of the state that the chunk ends with."""
        self._taken = states[-1]

    def commit(self) -> None:
        """Make the chunk part of the recurrent state."""
        state, plan = self._state, self._plan
        if self._taken is None:
            return
        if plan.whole and plan.rows == state.slots:
            state.recurrent = self._taken
            return
        state.recurrent = state.recurrent or tuple(x.new_zeros(state.slots, *x.shape[1:]) for x in self._taken)
        for held, new in zip(state.recurrent, self._taken, strict=True):
            if plan.whole:
                held[: plan.rows] = new
            else:
                held.index_copy_(0, plan.slots_B, new)
