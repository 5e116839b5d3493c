"""Small steps as CUDA graphs: spans of blocks are captured once, and replayed at every step.

A graph repeats kernels on the tensors that it was captured with (``graphs``). So whatever a span reads and writes lies
in tensors that stay where they are: its input, the position, and for each block a ``Place``, where the state of one run
at a time lies: keys and values in buffers of fixed capacity, of which a mask hides what is not yet written, and the
recurrent state, which the graph replaces in place.

A run's state moves into the places with its first small step, and out if another run's moves in. In between nothing is
copied but the hidden states of the chunk. While a rollback is possible (``RecurrentState.noting``), the recurrent state
is copied out after every step and in before it, once each: somebody may still hold it. Two runs that take turns copy
all of their state at every turn. The graph itself writes each recurrent state once more than the recurrence does, and
attention reads whole buffers, whatever is filled and whatever a window hides.

Which steps are replayed is decided before the step, by shapes: see ``CapturedSpans.suits``. All others run as they are,
on the same state. One thread at a time.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor

from dynamax.backbones.graphs import Recorder
from dynamax.backbones.plan import AngleTable, Plan, Rotary, StepPlan
from dynamax.backbones.state import BlockState, CacheView, LayerView, Recurrence, Tensors

if TYPE_CHECKING:
    from dynamax.backbones.base import Backbone

CAPACITY = 1024
"""Positions that the places have room for at first; 131 KB each for a 7B model with eight key heads in bfloat16."""


@final
class StaticPlan(Plan):
    """A chunk whose place is in a tensor.

    Args:
        like: As for ``Plan``.
        start_1: Position of its first row.
        capacity: Positions that buffers have room for.
        additive: As for ``Plan``.
        rotary: As for ``Plan``.
        table: Its angles; None only where there are none.
        slopes: As for ``Plan``.
    """

    def __init__(
        self,
        like: Tensor,
        start_1: Tensor,
        capacity: int,
        *,
        additive: bool,
        rotary: Rotary | None,
        table: AngleTable | None,
        slopes: Tensor | None = None,
    ) -> None:
        super().__init__(like, additive=additive, rotary=rotary, slopes=slopes)
        self.place = None
        self._start_1, self._capacity, self._table = start_1, capacity, table
        self._masks: dict[int | None, Tensor] = {}

    def make_positions(self) -> Tensor:
        """The same for all rows."""
        return (self._start_1 + torch.arange(self.length, device=self._start_1.device))[None]

    def make_live(self) -> None:
        """Nothing is padded."""

    def make_angles(self, rotary: Rotary, kind: str | None) -> tuple[Tensor, Tensor]:
        """Rows of the table."""
        assert self._table is not None, "a model with angles comes with their table"
        cos_1KR, sin_1KR = self._table.span(self._like, 0, min(self._capacity, self._table.context), kind)
        return cos_1KR.index_select(1, self.positions_BT[0]), sin_1KR.index_select(1, self.positions_BT[0])

    def mask(self, window: int | None) -> Tensor:
        """Which of all buffered keys each position may see, ``[1, 1, T, K]``."""
        if window not in self._masks:
            keys_K, rows_T1 = torch.arange(self._capacity, device=self._start_1.device), self.positions_BT[0][:, None]
            seen_TK = keys_K <= rows_T1
            if window is not None:
                seen_TK &= keys_K > rows_T1 - window
            self._masks[window] = self.as_mask(seen_TK[None, None], rows_T1 - keys_K)
        return self._masks[window]


@final
class Place:
    """Tensors of one block that graphs read and write, where the state of one run at a time lies.

    Args:
        like: A state of this block that has been through some positions.
        capacity: Positions to have room for.

    Attributes:
        keys: Buffers of keys and values, ``[B, H, capacity, D]``; empty for a block without attention.
        recurrent: The recurrent state; empty for a block without one.
    """

    def __init__(self, like: BlockState, capacity: int) -> None:
        keys = () if like.keys is None else like.keys.read(0, 1)
        self.keys = tuple(x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in keys)
        held = (like.recurrent and like.recurrent.tensors) or ()
        self.recurrent = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in held)
        self._tenant: weakref.ref[BlockState] | None = None  # a run that has ended need not move out

    def clear(self) -> None:
        """The state that lies here moves out."""
        tenant = self._tenant and self._tenant()
        if tenant:
            tenant.move_out()
        self._tenant = None

    def admit(self, state: BlockState, filled: int) -> None:
        """A state of ``filled`` positions moves in, if it is not here."""
        if self._tenant is None or self._tenant() is not state:
            self.clear()
            self._tenant = weakref.ref(state)
        if state.keys is not None:
            state.keys.move_into(self.keys, filled)
        if state.recurrent is not None:
            state.recurrent.move_into(self.recurrent)


@final
class StaticView(LayerView):
    """A view of what lies in a place.

    Args:
        place: The block's.
        plan: Where the chunk stands.
        window: As for ``CacheView``.

    Attributes:
        advanced: What ``HeldView.take`` takes; None for a block without a recurrent state.
    """

    def __init__(self, place: Place, plan: StaticPlan, window: int | None) -> None:
        self._place, self._positions_T = place, plan.positions_BT[0]
        self.mask = plan.mask(window) if place.keys else None
        self.live_BT = None
        self.advanced: tuple[Recurrence, Tensors, tuple[Tensors, ...]] | None = None

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the chunk's keys and values at its positions; the whole buffers."""
        keys, values = self._place.keys
        keys.index_copy_(2, self._positions_T, k_BHTD)
        values.index_copy_(2, self._positions_T, v_BHTD)
        return keys, values

    def advance(self, recurrence: Recurrence, rows: Tensors) -> Tensor:
        """Continue from the state, and write the new one in its place."""
        output, states = recurrence(self._place.recurrent, *rows)
        self.advanced = recurrence, rows, states
        for held, new in zip(self._place.recurrent, states[-1], strict=True):
            held.copy_(new)
        return output


class Captured(NamedTuple):
    """One span that was captured for chunks of one length.

    Attributes:
        given_BTD: Its input.
        replay: Runs it; its output, and for each block what its view was told (``StaticView.advanced``).
    """

    given_BTD: Tensor
    replay: Callable[[], tuple[Tensor, list[tuple[Recurrence, Tensors, tuple[Tensors, ...]] | None]]]


@final
class CapturedSpans:
    """The spans between some depths of a backbone, for chunks of some lengths.

    ``Backbone.run`` cuts longer spans at these depths. Each is captured when it first comes
    (``precision.capture_steps`` takes all of them), and again when the places grow: then whoever waits for an answer
    waits for that, too. Places grow to twice their capacity, or to what a run asks for.

    Args:
        backbone: The model, whose weights must not change afterwards.
        depths: Where spans begin and end, beside the bottom and the top.
        recorder: Captures.
        lengths: Positions of a chunk.
        rows: Rows of a chunk.
        capacity: Positions that places have room for at first.

    Attributes:
        depths: All depths where spans begin and end, ascending.
        capacity: Positions that places have room for.
        graphs: What was captured, by first block, end and length.
        replays: How often each of them was replayed.
    """

    def __init__(
        self,
        backbone: Backbone,
        depths: Collection[int],
        recorder: Recorder,
        *,
        lengths: Sequence[int],
        rows: int = 1,
        capacity: int = CAPACITY,
    ) -> None:
        self.depths = sorted({0, *depths, backbone.spec.depth})
        self._between = set(zip(self.depths, self.depths[1:], strict=False))
        self.capacity, self.lengths, self.rows = min(capacity, backbone.spec.context), frozenset(lengths), rows
        self.graphs: dict[tuple[int, int, int], Captured] = {}
        self.replays: Counter[tuple[int, int, int]] = Counter()
        self._backbone, self._rotary, self._recorder = backbone, backbone.rotary, recorder
        self._places: dict[int, Place] = {}
        self._table = None if self._rotary is None else AngleTable(self._rotary, backbone.spec.context)
        with torch.inference_mode(False):  # what stays must be written in either mode
            self._start_1 = torch.zeros(1, dtype=torch.long, device=next(backbone.parameters()).device)

    def suits(self, blocks: Sequence[int], plan: Plan, views: Sequence[LayerView]) -> bool:
        """Whether a step is replayed: a few positions without padding, behind others in a state without holes."""
        return (
            isinstance(plan, StepPlan)
            and plan.pad_B is None
            and plan.rows == self.rows
            and plan.length in self.lengths
            and 0 < plan.start == plan.past <= self._backbone.spec.context - plan.length
            and (blocks[0], blocks[-1] + 1) in self._between
            and not torch.is_grad_enabled()
            and all(isinstance(view, CacheView) and view.state.whole for view in views)
        )

    def run(self, h_BTD: Tensor, blocks: Sequence[int], plan: Plan, views: Sequence[LayerView]) -> Tensor:
        """``Backbone.run_blocks`` of a step that suits."""
        assert isinstance(plan, StepPlan), "the step suits"
        held = [view for view in views if isinstance(view, CacheView)]
        rooms = [view.state.keys.capacity for view in held if view.state.keys is not None]
        self._reserve(max([*rooms, 0 if self._rotary is None else plan.start + plan.length]))
        self._start_1.fill_(plan.start)
        key = (blocks[0], blocks[-1] + 1, plan.length)
        if key not in self.graphs:
            self.graphs[key] = self._capture(h_BTD, blocks, [view.state for view in held])
        for index, view in zip(blocks, held, strict=True):
            self._places[index].admit(view.state, plan.start)
        self.graphs[key].given_BTD.copy_(h_BTD)
        out_BTD, advanced = self.graphs[key].replay()
        self.replays[key] += 1
        for index, view, told in zip(blocks, held, advanced, strict=True):
            if told is None:
                continue
            recurrence, rows, states = told
            assert view.state.recurrent is not None
            if view.state.recurrent.noting:  # they are kept, and the graph writes over its own
                rows = tuple(row.clone() for row in rows)
                view.take(recurrence, rows, tuple(tuple(x.clone() for x in state) for state in states))
            else:
                view.take(recurrence, (), (self._places[index].recurrent,))
        return out_BTD.clone()

    def _reserve(self, capacity: int) -> None:
        """Have room for so many positions: new places, and nothing captured. States stay where they are until used."""
        if capacity > self.capacity:
            self.capacity = max(capacity, min(2 * self.capacity, self._backbone.spec.context))
            self.graphs.clear()
            self._places.clear()

    def _capture(self, h_BTD: Tensor, blocks: Sequence[int], states: Sequence[BlockState]) -> Captured:
        """Capture a span for chunks like this one. States that lie in its places move out, since they are used."""
        backbone = self._backbone
        with torch.inference_mode(False), torch.no_grad():
            for index, state in zip(blocks, states, strict=True):
                if index not in self._places:
                    self._places[index] = Place(state, self.capacity)
                self._places[index].clear()
            places = [self._places[index] for index in blocks]
            given_BTD = h_BTD.clone(memory_format=torch.contiguous_format)
            options: dict[str, Any] = {"rotary": self._rotary, "table": self._table}
            options |= {"additive": backbone.additive_masks, "slopes": backbone.slopes}

            def run() -> tuple[Tensor, list[Any]]:
                plan = StaticPlan(given_BTD, self._start_1, self.capacity, **options)
                views = [StaticView(p, plan, backbone.window(i)) for i, p in zip(blocks, places, strict=True)]
                return backbone.run_blocks(given_BTD, blocks, plan, views), [view.advanced for view in views]

            return Captured(given_BTD, self._recorder.record(run))
