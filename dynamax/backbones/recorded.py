"""Small steps without transformers' Python between the operations: blocks are recorded (``dynamax.recording``).

This holds for every family, since it is transformers' own code that is recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from dynamax.backbones.plan import Plan
from dynamax.backbones.state import HeldView, LayerView, Recurrence, Tensors
from dynamax.recording import MOST_POSITIONS, NotRecordableError, Programs, Recorder, held_by

BEFORE_RECORDING = 12
"""Steps of a kind that pass before one is recorded, if it has several rows: such a kind may never come again."""


@final
class RecordedView(LayerView):
    """A view whose calls a recorder writes down as a whole: what they do depends on positions.

    Args:
        view: The view that does the work.
        recorder: Writes.
    """

    def __init__(self, view: HeldView, recorder: Recorder) -> None:
        self._view, self._recorder = view, recorder
        self.mask, self.live_BT, self.ends_B = view.mask, view.live_BT, view.ends_B

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values, by the view."""
        return self._recorder.call("view.update", self._view.update, k_BHTD, v_BHTD)

    def advance(self, recurrence: Recurrence, rows: Tensors) -> Tensor:
        """The recurrence is recorded; the state it begins from, and those it passes, are the view's."""
        past = self._recorder.call("view.past", self._view.past)
        output, states = recurrence(past, *rows)
        self._recorder.call("view.take", self._view.take, recurrence, rows, states)
        return output


@final
class Recordings(Programs):
    """The programs of a model's blocks, by kind of step.

    Args:
        model: Its weights are what stays.

    Attributes:
        ready: Programs in use, by block, rows, positions, and what the step has (mask, padding, state).
        given_up: Blocks that are not recorded, and why.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__("h, cos, sin, positions, mask, live, ends, view")
        self._weights = frozenset(held_by(model))
        self._came: Counter[tuple[object, ...]] = Counter()

    def suits(self, plan: Plan) -> bool:
        """Whether a chunk is small enough, and nobody asks for gradients."""
        return plan.length <= MOST_POSITIONS and not torch.is_grad_enabled()

    def run(
        self,
        index: int,
        h_BTD: Tensor,
        plan: Plan,
        view: HeldView,
        angles: tuple[Tensor, Tensor] | None,
        block: Callable[[Tensor, LayerView], Tensor],
    ) -> Tensor:
        """One block over one chunk: by its program if there is one, else by the block itself.

        Args:
            index: Of the block.
            h_BTD: Its input.
            plan: Where the chunk stands.
            view: Its state.
            angles: Its rotary angles.
            block: Runs it as it is.
        """
        key = (index, plan.rows, plan.length, view.mask is None, view.live_BT is None, view.ends_B is None, view.fresh)
        cos, sin = angles or (None, None)
        program = self.ready.get(key)
        if program is not None:
            return program(h_BTD, cos, sin, plan.positions_BT, view.mask, view.live_BT, view.ends_B, view)
        if index in self.given_up or self.recorded_at(key, plan.place):
            return block(h_BTD, view)
        if plan.rows > 1 and self._came[key] < BEFORE_RECORDING:
            self._came[key] += 1
            return block(h_BTD, view)
        given = (h_BTD.clone(), cos, sin, plan.positions_BT, view.mask, view.live_BT, view.ends_B)
        names = ("h", "cos", "sin", "positions", "mask", "live", "ends")
        inputs = {name: tensor for name, tensor in zip(names, given, strict=True) if tensor is not None}
        recorder = Recorder(inputs, self._weights)
        try:
            with recorder:
                out_BTD = block(given[0], RecordedView(view, recorder))
            self.note(key, plan.place, recorder.finish(out_BTD))
        except NotRecordableError as reason:
            self.given_up[index] = str(reason)
            return block(h_BTD, view)
        return out_BTD
