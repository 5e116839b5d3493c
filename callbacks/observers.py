"""What a run found at each exit: how right it is, how many tokens leave there, and how long they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import common
from dynamax.decoding.probe import Clock, clock
from dynamax.errors import UserError
from dynamax.modules.decoding import DecodingModule
from dynamax.modules.heads import HeadsModule
from dynamax.modules.results import percentiles

EIGHTHS = " ▏▎▍▌▋▊▉█"
WIDTH = 5
"""Letters of a full bar."""
TIMES = {"mark": "exit reached\nand read", "end": "step that\nleaves here", "prefill": "prefill"}
"""What a clock measures, and the head of its column."""


class ExitAccuracy(Callback):
    """Shows and logs how right each exit is, at the end of ``fit``, ``validate`` and ``test``.

    The figures are how often its lens predicts the full model's token, and how well each gate's score separates these
    positions from the others (AUROC). After training they are those of the last validation. Logs ``exits/agreement``
    and ``exits/auroc_<gate>`` with the depth as the logger's step.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the figures of the last validation."""
        bank = common.watched(pl_module, HeadsModule, self).bank
        logged = {name: float(figure) for name, figure in trainer.callback_metrics.items()}
        found = []
        for depth in bank.depths:
            aurocs = {gate: logged.get(f"val/auroc/{depth}/{gate}") for gate in bank.gates(depth)}
            found.append((depth, logged.get(f"val/agreement/{depth}"), aurocs))
        self._show(trainer, found, "held-out documents")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, if validation is all that runs."""
        if trainer.state.fn == "validate":
            self.on_fit_end(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what was found along the full model's answers."""
        exits = common.watched(pl_module, DecodingModule, self).results.exits
        found = [(each.depth, each.agreement, each.gate_auroc) for each in exits]
        self._show(trainer, found, "the full model's own answers")

    def _show(
        self, trainer: Trainer, found: Sequence[tuple[int, float | None, Mapping[str, float | None]]], over: str
    ) -> None:
        gates = sorted({gate for *_, aurocs in found for gate in aurocs})
        lines = []
        for depth, agreement, aurocs in found:
            named = {f"exits/auroc_{gate}": auroc for gate, auroc in aurocs.items()}
            common.log(trainer, {"exits/agreement": agreement, **named}, step=depth)
            cells = ["" if (auroc := aurocs.get(gate)) is None else f"{auroc:.3f}" for gate in gates]
            lines.append(("", f"exit {depth}", ["" if agreement is None else f"{agreement:.1%}", *cells]))
        if trainer.is_global_zero:
            heads = ["lens\nagrees", *(f"{gate}\nAUROC" for gate in gates)]
            print(common.table(f"Exits over {over}", heads, lines))


class ExitDepth(Callback):
    """Shows and logs, for each policy and threshold of a test, where tokens left.

    Logs ``depth/<policy>/share_at_<d>`` and ``depth/<policy>/blocks_per_token``; the logger's step counts
    the policy's thresholds.
    """

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the shares, and print a line for each policy and threshold, with a column for each depth."""
        rows = common.watched(pl_module, DecodingModule, self).results.frontier
        depths = sorted({depth for row in rows for depth in row.depth_counts})
        lines = []
        for step, row in common.by_step(rows):
            share, blocks = shares(row.depth_counts), row.blocks_per_token
            named = {f"depth/{row.policy}/share_at_{depth}": part for depth, part in share.items()}
            common.log(trainer, {**named, f"depth/{row.policy}/blocks_per_token": blocks}, step=step)
            cells = [*(bar(share.get(depth, 0.0)) for depth in depths), f"{blocks:.1f}" if blocks else ""]
            lines.append((row.policy, common.threshold(row.threshold), cells))
        if trainer.is_global_zero:
            heads = [*(f"{depth}{' ' * (WIDTH + 1)}" for depth in depths), "blocks\na token"]
            print(common.table("Share of tokens that leave at each depth", heads, lines))


def shares(counts: Mapping[int, int]) -> dict[int, float]:
    """Share of tokens that left at each depth, shallowest first.

    >>> shares({30: 3, 15: 1})
    {15: 0.25, 30: 0.75}
    """
    total = sum(counts.values())
    return {depth: count / total for depth, count in sorted(counts.items())}


def bar(share: float) -> str:
    """A share in words and as a bar.

    >>> bar(0.5)
    ' 50% ██▌  '
    """
    if not share:
        return "  ·  " + " " * WIDTH
    whole, part = divmod(round(share * WIDTH * 8), 8)
    filled = "█" * whole + (EIGHTHS[part] if part else "")
    return f"{share:4.0%} {filled:<{WIDTH}}"


class ExitLatency(Callback):
    """Times decoding steps of a test, all policies together: CUDA events on a GPU, wall clock on a CPU, prefill apart.

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
        common.watched(pl_module, DecodingModule, self).probes.append(self._clock)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the clock, once; log, and print median and 95th percentile of each kind at each depth."""
        assert self._clock is not None
        times = self._clock.read()
        kinds = [kind for kind in TIMES if kind in times]
        lines = []
        for depth in sorted({depth for by_depth in times.values() for depth in by_depth}):
            cells = []
            for kind in kinds:
                ms = times[kind].get(depth, ())
                if not ms:
                    cells.append("")
                    continue
                p50, p95 = percentiles(ms)
                common.log(trainer, {f"latency/{kind}_p50_ms": p50, f"latency/{kind}_p95_ms": p95}, step=depth)
                cells.append(f"{p50:.2f} / {p95:.2f} ({len(ms)})")
            lines.append(("", f"{depth} blocks", cells))
        if trainer.is_global_zero and times:
            title = f"Latency, ms: median / p95 (steps); {type(self._clock).__name__} on {pl_module.device}"
            print(common.table(title, [TIMES[kind] for kind in kinds], lines))
