"""What may watch a decoder: clocks, wall time on a CPU, CUDA events on a GPU. They know depths and nothing else."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence

import torch


class Probe:
    """Watches a decoder. Does nothing itself; clocks are below."""

    def begin(self, *, prefill: bool) -> None:
        """A step begins."""

    def mark(self, depth: int) -> None:
        """The step has completed ``depth`` blocks, and the exit there has been read."""

    def end(self, depth: int) -> None:
        """The step has its token, from ``depth`` blocks."""


class Clock(Probe, ABC):
    """Times steps and the way up to each depth.

    A time at depth ``d`` runs from the beginning of the step to the moment the exit there has been
    read and decided. Prefill steps are kept apart; the first ``warmup`` decode steps are dropped.

    Args:
        warmup: Decode steps to drop.
    """

    def __init__(self, *, warmup: int = 2) -> None:
        self.warmup = warmup
        self._seen = 0
        self._prefill = False

    def begin(self, *, prefill: bool) -> None:
        """A step begins."""
        self._prefill = prefill
        self._seen += 0 if prefill else 1
        self._stamp("begin", 0)

    def mark(self, depth: int) -> None:
        """An exit has been read."""
        self._stamp("mark", depth)

    def end(self, depth: int) -> None:
        """The step is over."""
        self._stamp("end", depth)

    @property
    def dropped(self) -> bool:
        """Whether the step under way belongs to the warm-up."""
        return not self._prefill and self._seen <= self.warmup

    @abstractmethod
    def _stamp(self, kind: str, depth: int) -> None: ...

    @abstractmethod
    def read(self) -> dict[str, dict[int, list[float]]]:
        """Milliseconds so far, as ``{"prefill" | "mark" | "end": {depth: times}}``."""


class WallClock(Clock):
    """``time.perf_counter``; right on a CPU, where a call returns when its work is done."""

    def __init__(self, *, warmup: int = 2) -> None:
        super().__init__(warmup=warmup)
        self._times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._begin = 0.0

    def _stamp(self, kind: str, depth: int) -> None:
        now = time.perf_counter()
        if kind == "begin":
            self._begin = now
        elif not self.dropped:
            bucket = "prefill" if self._prefill else kind
            if not (self._prefill and kind == "mark"):
                self._times[bucket][depth].append(1000 * (now - self._begin))

    def read(self) -> dict[str, dict[int, list[float]]]:
        """Milliseconds so far."""
        return {kind: dict(by_depth) for kind, by_depth in self._times.items()}


class CudaEvents(Clock):
    """CUDA events, recorded in the stream as the work goes in; one synchronisation, when read."""

    def __init__(self, *, warmup: int = 2) -> None:
        super().__init__(warmup=warmup)
        self._pairs: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = []
        self._begin: torch.cuda.Event | None = None

    def _stamp(self, kind: str, depth: int) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if kind == "begin":
            self._begin = event
        elif not self.dropped and not (self._prefill and kind == "mark"):
            assert self._begin is not None
            self._pairs.append(("prefill" if self._prefill else kind, depth, self._begin, event))

    def read(self) -> dict[str, dict[int, list[float]]]:
        """Milliseconds so far; waits for the device once."""
        torch.cuda.synchronize()
        times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for kind, depth, begin, end in self._pairs:
            times[kind][depth].append(begin.elapsed_time(end))
        return {kind: dict(by_depth) for kind, by_depth in times.items()}


def clock(device: torch.device | str, *, warmup: int = 2) -> Clock:
    """The honest clock for a device."""
    return CudaEvents(warmup=warmup) if torch.device(device).type == "cuda" else WallClock(warmup=warmup)


class Together(Probe):
    """Several probes watching one decoder."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = tuple(probes)

    def begin(self, *, prefill: bool) -> None:
        """A step begins."""
        for probe in self.probes:
            probe.begin(prefill=prefill)

    def mark(self, depth: int) -> None:
        """An exit has been read."""
        for probe in self.probes:
            probe.mark(depth)

    def end(self, depth: int) -> None:
        """The step is over."""
        for probe in self.probes:
            probe.end(depth)
