"""The state of one block, and what a block is given as its cache while one chunk passes.

A ``StepPlan`` decides where a chunk's keys go and which of them it may see; while blocks run, a view only moves
tensors; what it holds becomes part of the state when it is committed, after the span. Knows no debts, no other blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.backbones.plan import StepPlan

StateKind = Literal["keys", "recurrent"]
"""What a block may keep of the positions it has seen: keys and values, or a recurrent state."""

Tensors = tuple[Tensor, ...]
Recurrence = Callable[..., tuple[Tensor, tuple[Tensors, ...]]]
"""``(state or None, *rows) -> (output, states)``: continues a recurrence; rows have positions in dimension 1.

``states`` are those after every position where they cost nothing, else the last alone.
"""

REMEMBERED = 16
"""States that are held behind a snapshot; more would take room for nothing."""


@dataclass(frozen=True)
class Snapshot:
    """Where ``LayerState.crop`` can return to.

    Attributes:
        filled: Positions the block had been through.
        recurrent: Its recurrent state then; None without one.
    """

    filled: int
    recurrent: Tensors | None = None


class LayerState(ABC):
    """What one block keeps of the positions it has been through, or a part of that."""

    @abstractmethod
    def skip(self, start: int, count: int) -> None:
        """Let positions ``[start, start + count)`` go by unseen."""

    @abstractmethod
    def snapshot(self, filled: int) -> Snapshot:
        """Where ``crop`` can return to; the block has been through ``filled`` positions."""

    @abstractmethod
    def crop(self, length: int, snapshot: Snapshot) -> None:
        """Forget the positions from ``length`` on; ``length`` is at or after the snapshot's."""

    @abstractmethod
    def move_out(self) -> None:
        """Copy what lies in the tensors of captured spans (``captured.Place``), which others write into."""


@final
class KeyValueState(LayerState):
    """Keys and values of one attention block, in buffers ``[B, H, capacity, D]`` that grow by doubling.

    Nothing is removed: a window is a slice of the buffer, and a rollback only lets later positions write over it.

    Args:
        capacity: Positions to make room for at first.

    Attributes:
        holes: Positions whose keys were never written; no later position may attend to them.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.holes: frozenset[int] = frozenset()
        self._buffers: Tensors = ()
        self._place: Tensors | None = None

    @property
    def started(self) -> bool:
        """Whether any position was written."""
        return bool(self._buffers)

    def reserve(self, positions: int) -> None:
        """Make room for so many positions, before blocks run."""
        if positions <= self.capacity:
            return
        self.capacity = max(positions, 2 * self.capacity) if self._buffers else positions
        self._buffers = tuple(F.pad(held, (0, 0, 0, self.capacity - held.shape[2])) for held in self._buffers)

    def write(self, k_BHTD: Tensor, v_BHTD: Tensor, start: int) -> None:
        """Write the keys and values of positions from ``start`` on; there is room for them."""
        if not self._buffers:
            self._buffers = tuple(x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in (k_BHTD, v_BHTD))
        stop = start + k_BHTD.shape[2]
        self._buffers[0][:, :, start:stop] = k_BHTD
        self._buffers[1][:, :, start:stop] = v_BHTD

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions ``[start, stop)``, as views of the buffers."""
        assert self._buffers, "read before the first write"
        return self._buffers[0][:, :, start:stop], self._buffers[1][:, :, start:stop]

    def skip(self, start: int, count: int) -> None:
        """Leave holes."""
        self.reserve(start + count)
        self.holes |= frozenset(range(start, start + count))

    def snapshot(self, filled: int) -> Snapshot:
        """The fill level; keys are not copied."""
        return Snapshot(filled)

    def crop(self, length: int, snapshot: Snapshot) -> None:
        """Forget holes from ``length`` on; keys there are written over."""
        self.holes = frozenset(hole for hole in self.holes if hole < length)

    def move_into(self, buffers: Tensors, filled: int) -> None:
        """Hold the first ``filled`` positions in these buffers from now on."""
        if self._buffers is buffers:
            return
        for place, held in zip(buffers, self._buffers, strict=True):
            place[:, :, :filled] = held[:, :, :filled]
            place[:, :, filled:].zero_()  # what others left: a mask hides it, but not if it is infinite
        self._buffers = self._place = buffers
        self.capacity = buffers[0].shape[2]

    def move_out(self) -> None:
        """Copy the buffers."""
        if self._buffers is self._place:
            self._buffers = tuple(held.clone() for held in self._buffers)


@final
class RecurrentState(LayerState):
    """Convolution window and scan state of one block, in whatever form its recurrence gives them.

    It cannot be cropped. A snapshot keeps it by reference, and from then on the rows that advance the state are kept
    too, and the states that the recurrence gave. A rollback takes one of these; where there is none, it reads the rows
    behind the last one again, by the recurrence alone.

    Attributes:
        tensors: The state; None before the first position. They are replaced, never written into, but where captured
            spans hold it (``move_into``).
    """

    def __init__(self) -> None:
        self.tensors: Tensors | None = None
        self._place: Tensors | None = None
        self._snapshot: Snapshot | None = None
        self._recurrence: Recurrence | None = None
        self._noted: list[tuple[Tensors, tuple[Tensors, ...]]] = []

    def commit(self, recurrence: Recurrence, rows: Tensors, states: tuple[Tensors, ...]) -> None:
        """Take over the last of the states that ``recurrence`` made of ``rows``."""
        self.tensors = states[-1]
        if self._snapshot is not None:
            self._recurrence = recurrence
            held = sum(len(known) for _, known in self._noted)
            self._noted.append((rows, states if held + len(states) <= REMEMBERED else ()))

    def skip(self, start: int, count: int) -> None:
        """Nothing is read. A rollback can then return to a snapshot, but to no position after it."""
        self._snapshot = None

    def snapshot(self, filled: int) -> Snapshot:
        """The fill level and the state; rows are noted until the next snapshot."""
        self.move_out()
        self._snapshot, self._noted = Snapshot(filled, self.tensors), []
        return self._snapshot

    def crop(self, length: int, snapshot: Snapshot) -> None:
        """Return to the snapshot; if it is the newest, go on to the state at ``length``."""
        keep = length - snapshot.filled
        assert keep == 0 or snapshot is self._snapshot, "only positions after the newest snapshot can be kept"
        noted, unread = self._noted, []
        self.tensors = snapshot.recurrent
        self._snapshot, self._noted = snapshot, []
        for rows, states in noted:
            given = rows[0].shape[1]
            count = min(keep, given)
            if not count:
                break
            keep -= count
            kept = rows if count == given else tuple(row[:, :count] for row in rows)
            known = states[:count] if count == given or len(states) == given else ()
            self._noted.append((kept, known))
            unread = [] if known else [*unread, kept]
            self.tensors = known[-1] if known else self.tensors
        if unread:
            assert self._recurrence is not None, "rows were noted since the snapshot"
            joined = tuple(torch.cat(parts, 1) for parts in zip(*unread, strict=True))
            self.tensors = self._recurrence(self.tensors, *joined)[1][-1]
            self._noted[-1] = (self._noted[-1][0], (self.tensors,))

    @property
    def noting(self) -> bool:
        """Whether what advances the state is kept, for a rollback."""
        return self._snapshot is not None

    def move_into(self, place: Tensors) -> None:
        """Hold the state in these tensors from now on, until it is replaced."""
        if self.tensors is not place:
            assert self.tensors is not None, "there is no state before the first position"
            for held, new in zip(place, self.tensors, strict=True):
                held.copy_(new)
            self.tensors = self._place = place

    def move_out(self) -> None:
        """Copy the state."""
        if self.tensors is not None and self.tensors is self._place:
            self.tensors = tuple(held.clone() for held in self.tensors)


@final
class BlockState(LayerState):
    """All that one block keeps.

    Args:
        kinds: Which kinds of state it has: both, one, or none where it looks at each position alone.
        capacity: As for ``KeyValueState``.

    Attributes:
        keys: Keys and values; None for a block without attention.
        recurrent: Recurrent state; None for a block without one.
    """

    def __init__(self, kinds: Collection[StateKind], capacity: int) -> None:
        self.keys = KeyValueState(capacity) if "keys" in kinds else None
        self.recurrent = RecurrentState() if "recurrent" in kinds else None
        self._parts = tuple(part for part in (self.keys, self.recurrent) if part is not None)

    def skip(self, start: int, count: int) -> None:
        """All parts skip."""
        for part in self._parts:
            part.skip(start, count)

    def snapshot(self, filled: int) -> Snapshot:
        """The recurrent state's, which holds all that is needed."""
        return Snapshot(filled) if self.recurrent is None else self.recurrent.snapshot(filled)

    def crop(self, length: int, snapshot: Snapshot) -> None:
        """All parts forget."""
        for part in self._parts:
            part.crop(length, snapshot)

    @property
    def whole(self) -> bool:
        """Whether there is something of every position so far: keys without holes, and a recurrent state."""
        keys, recurrent = self.keys, self.recurrent
        with_keys = keys is None or (keys.started and not keys.holes)
        return with_keys and (recurrent is None or recurrent.tensors is not None)

    def move_out(self) -> None:
        """All parts move."""
        for part in self._parts:
            part.move_out()


class LayerView(ABC):
    """What a block is given as its cache while one chunk passes.

    transformers' attention calls ``update`` with keys and values; our recurrent mixers call ``advance``.

    Attributes:
        mask: Attention mask over the keys that ``update`` answers with; None where none is needed.
        live_BT: False on padding, for recurrent blocks; None if nothing is padded.
        ends_B: Where padding stands behind a row's positions, how many these are; None where it does not.
    """

    mask: Tensor | None
    live_BT: Tensor | None
    ends_B: Tensor | None = None

    @abstractmethod
    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """The keys and values that the chunk may see, its own included."""

    @abstractmethod
    def advance(self, recurrence: Recurrence, rows: Tensors) -> Tensor:
        """Continue the recurrent state over the chunk; the recurrence's output."""


class HeldView(LayerView):
    """A view of a state that is kept. The chunk is part of the recurrent state once it is committed."""

    @property
    @abstractmethod
    def fresh(self) -> bool:
        """Whether there is no recurrent state yet, or none at all."""

    @abstractmethod
    def past(self) -> Tensors | None:
        """The recurrent state that is held; None before the first position."""

    @abstractmethod
    def take(self, recurrence: Recurrence, rows: Tensors, states: tuple[Tensors, ...]) -> None:
        """Take note of the state that the chunk ends with."""

    @abstractmethod
    def commit(self) -> None:
        """Make the chunk part of the state."""

    @final
    def advance(self, recurrence: Recurrence, rows: Tensors) -> Tensor:
        """Continue from the state that is held."""
        output, states = recurrence(self.past(), *rows)
        self.take(recurrence, rows, states)
        return output


@final
class CacheView(HeldView):
    """A view of one group's state, whose rows go in step. Nothing counts until ``commit``.

    Args:
        state: The block's state.
        plan: Where the chunk stands.
        window: Positions each row sees, its own included; None for all.

    Attributes:
        state: The block's state.
    """

    def __init__(self, state: BlockState, plan: StepPlan, window: int | None) -> None:
        self.state = state
        self._keys, self._recurrent = state.keys, state.recurrent
        self._advanced: tuple[Recurrence, Tensors, tuple[Tensors, ...]] | None = None
        self.live_BT = plan.live_BT
        self.mask = None
        if self._keys is not None:
            self._start, self._stop, self._first = plan.past, plan.past + plan.length, plan.first_key(window)
            self._keys.reserve(self._stop)
            self.mask = plan.mask(window, self._keys.holes)

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the chunk's keys and values behind those held; all that the chunk may see."""
        assert self._keys is not None, "a block without keys asked for some"
        self._keys.write(k_BHTD, v_BHTD, self._start)
        return self._keys.read(self._first, self._stop)

    @property
    def fresh(self) -> bool:
        """Whether there is no recurrent state yet, or none at all."""
        return self._recurrent is None or self._recurrent.tensors is None

    def past(self) -> Tensors | None:
        """The recurrent state that is held; None before the first position."""
        assert self._recurrent is not None, "a block without a recurrent state advanced one"
        return self._recurrent.tensors

    def take(self, recurrence: Recurrence, rows: Tensors, states: tuple[Tensors, ...]) -> None:
        """Take note of the states that the chunk has passed."""
        self._advanced = (recurrence, rows, states)

    def commit(self) -> None:
        """Make the chunk part of the state."""
        if self._advanced is not None and self._recurrent is not None:
            self._recurrent.commit(*self._advanced)


@final
class NoCacheView(LayerView):
    """For one pass over a text from its first position: nothing is held and nothing is kept.

    Args:
        plan: Where the chunk stands.
        window: As for ``CacheView``.
        kinds: What the block would keep.
    """

    def __init__(self, plan: StepPlan, window: int | None, kinds: Collection[StateKind]) -> None:
        self.live_BT = plan.live_BT
        self.mask = plan.mask(window) if "keys" in kinds else None

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """The chunk's own keys and values."""
        return k_BHTD, v_BHTD

    def advance(self, recurrence: Recurrence, rows: Tensors) -> Tensor:
        """Begin from nothing."""
        return recurrence(None, *rows)[0]
