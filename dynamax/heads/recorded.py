"""Gates without Python between their operations: what a gate does for a few positions is recorded and repeated.

The scores are bit for bit those of the gate's own code, which is what was recorded (``dynamax.recording``). Gates whose
memory grows, and gates that ask the evidence for more than the hidden state, are not recorded and run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from dynamax.heads.base import Gate
from dynamax.recording import MOST_POSITIONS, Line, NotRecordableError, Programs, Recorder, held_by
from dynamax.types import Evidence, Memory


@final
class RecordedEvidence(Evidence):
    """Evidence whose hidden state is known; everything else differs from step to step.

    Args:
        evidence: What is recorded.
        recorder: Writes.
        alone: Whether the exit has no other gate.
    """

    def __init__(self, evidence: Evidence, recorder: Recorder, *, alone: bool) -> None:
        self.depth, self.total, self.hidden = evidence.depth, evidence.total, evidence.hidden
        self._evidence, self._recorder, self._alone = evidence, recorder, alone

    def derive(self, function: Callable[..., Tensor], *options: object) -> Tensor:
        """As a whole, since another gate may have asked for the same; its operations, if there is no other."""
        if self._alone:
            return function(self.hidden, *options)
        return self._recorder.call("evidence.derive", self._evidence.derive, function, *options)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - never returns
        raise NotRecordableError(f"it reads {name.lstrip('_')}")


@final
class RecordedMemory(Memory):
    """A memory that writes down what depends on positions.

    Args:
        memory: What is recorded.
        recorder: Writes.
    """

    def __init__(self, memory: Memory, recorder: Recorder) -> None:
        super().__init__(memory.pad_B, memory.read, dict(memory.values))
        self._memory, self._recorder = memory, recorder

    def live(self, length: int) -> Tensor | None:
        """The mask, by the memory; None is the same at every step."""
        return None if self.pad_B is None else self._recorder.call("memory.live", self._memory.live, length)


@final
class GateRecordings(Programs):
    """The programs of the gates of all exits.

    Attributes:
        ready: Programs in use, by exit and gate, and by kind of step.
        given_up: Gates that are not recorded, by exit and name, and why.
    """

    def __init__(self) -> None:
        super().__init__("evidence, memory")
        self._places: dict[tuple[int, str], list[tuple[object, ...]]] = {}
        self._alone: set[int] = set()
        self._held: dict[tuple[int, str], list[Tensor]] = {}

    def __reduce__(self) -> tuple[type[GateRecordings], tuple[()]]:
        return type(self), ()  # a copy has weights of its own

    def begin(self, gates: Mapping[tuple[int, str], Gate]) -> None:
        """A decoding run begins: forget the programs of gates that have other tensors than when they were recorded."""
        depths = [depth for depth, _ in gates]
        self._alone = {depth for depth in depths if depths.count(depth) == 1}
        for part, gate in gates.items():
            tensors = [*gate.parameters(), *gate.buffers()]
            places = [place(each) for each in tensors]
            if part not in self._places or places != self._places[part]:
                self.forget(part)
                self._places[part] = places
                self._held[part] = [each.detach() for each in tensors]  # so that no other tensor takes their places

    def score(self, part: tuple[int, str], gate: Gate, evidence: Evidence, memory: Memory | None = None) -> Tensor:
        """A gate's score: by its program if there is one, else by the gate itself.

        Args:
            part: Depth of the exit, and the gate's name.
            gate: The gate.
            evidence: What it judges.
            memory: What it remembers; None for a gate that is not recurrent.
        """
        hidden = evidence.hidden
        if torch.is_grad_enabled():
            return gate.score(evidence, memory)
        kind = (part, hidden.shape, hidden.dtype, memory is None or (not memory.values, memory.pad_B is None))
        program = self.ready.get(kind)
        if program is not None:
            return program(evidence, memory)
        if part in self.given_up or gate.keys or hidden.shape[:-1].numel() > MOST_POSITIONS:
            return gate.score(evidence, memory)
        at = object() if memory is None else memory.read
        if self.recorded_at(kind, at):
            return gate.score(evidence, memory)
        return self._record(kind, at, gate, evidence, memory)

    def _record(
        self, kind: tuple[Any, ...], at: Hashable, gate: Gate, evidence: Evidence, memory: Memory | None
    ) -> Tensor:
        past = {} if memory is None else memory.values
        inputs = {"evidence.hidden": evidence.hidden, **{f"past[{name!r}]": tensor for name, tensor in past.items()}}
        recorder = Recorder(inputs, held_by(gate))
        noted = None if memory is None else RecordedMemory(memory, recorder)
        if memory is not None:
            recorder.program.lines.append(Line("past = memory.values"))
        try:
            with recorder:
                score = gate.score(RecordedEvidence(evidence, recorder, alone=kind[0][0] in self._alone), noted)
            if noted is not None:
                recorder.assign("memory.values", noted.values)
            self.note(kind, at, recorder.finish(score))
        except NotRecordableError as reason:
            self.given_up[kind[0]] = str(reason)
            return gate.score(evidence, memory)
        if memory is not None and noted is not None:
            memory.values = noted.values
        return score


def place(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's values are, of what kind, and how often they were changed in place."""
    changes = object() if tensor.is_inference() else tensor._version  # nobody counts those of inference tensors
    return tensor.data_ptr(), tensor.dtype, tensor.shape, changes
