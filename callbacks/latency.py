"""How long the way to each exit takes: CUDA events on a GPU, wall clock on a CPU, prefill apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import common
from dynamax.decoding.probe import Clock, clock
from dynamax.errors import UserError
from dynamax.modules.results import percentiles

Times = Mapping[str, Mapping[int, Sequence[float]]]

KINDS = {
    "mark": "exit reached\nand read",
    "end": "step that\nleaves here",
    "prefill": "prefill",
}


class ExitLatency(Callback):
    """Times decoding steps of a test, for every policy together.

    For each depth: the time from the start of a step until the exit there has been read, and the time of
    a whole step that leaves there. Debts paid on the way are part of both. Logs
    ``latency/<kind>_p50_ms`` and ``_p95_ms`` with the depth as the logger's step.

    Args:
        warmup: Decode steps to drop at the start.
    """

    def __init__(self, warmup: int = 8) -> None:
        if warmup < 0:
            raise UserError(f"ExitLatency was given warmup {warmup}; it must be 0 or more decode steps.")
        self.warmup = warmup
        self._clock: Clock | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start watching, with the clock that is right for the device."""
        self._clock = clock(pl_module.device, warmup=self.warmup)
        common.decoding(pl_module, self).add_probe(self._clock)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the clock, once; log and print."""
        assert self._clock is not None
        times = self._clock.read()
        for kind, by_depth in times.items():
            for depth, ms in by_depth.items():
                p50, p95 = percentiles(ms)
                common.log(trainer, {f"latency/{kind}_p50_ms": p50, f"latency/{kind}_p95_ms": p95}, step=depth)
        if trainer.is_global_zero and times:
            print(table(times, f"{type(self._clock).__name__} on {pl_module.device}"))


def table(times: Times, source: str) -> str:
    """The latencies: a line for each depth, median and 95th percentile of each kind."""
    kinds = [kind for kind in KINDS if kind in times]
    depths = sorted({depth for by_depth in times.values() for depth in by_depth})
    lines = []
    for depth in depths:
        taken = [times[kind].get(depth, ()) for kind in kinds]
        cells = ["{:.2f} / {:.2f} ({})".format(*percentiles(ms), len(ms)) if ms else "" for ms in taken]
        lines.append(("", f"{depth} blocks", cells))
    return common.table(f"Latency, ms: median / p95 (steps); {source}", [KINDS[kind] for kind in kinds], lines)
