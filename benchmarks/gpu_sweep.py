"""A sweep of policies over shipped questions, as ``dynamax test`` makes it: frontier, and latency by CUDA events."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Trainer

from benchmarks.gpu_part import Box
from callbacks.frontier import table
from callbacks.observers import ExitLatency
from dynamax.backbones.sources import Source
from dynamax.data.tasks import TaskData
from dynamax.heads import LogitLens
from dynamax.heads.bank import Exit
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.modules.results import percentiles
from dynamax.policies.confidence import GateConfidence, MaxProb
from dynamax.tasks.shipped import Questions

OFFSET = 240
"""Questions that the demo's heads were trained on, which are not asked."""
FIRST, MOST = 2, 12
"""Questions of a first look, and of the longest."""
TOKENS = 24


def module(source: Source, depths: tuple[int, ...], *, heads: str | None, dtype: str, chat: bool) -> DecodingModule:
    """What to test: trained heads with their gates, else the model's own output matrix at every exit."""
    policies = [Sweep(MaxProb(0.8), [0.5, 0.8, 0.9])]
    if heads is not None:
        policies += [Sweep(GateConfidence(0.8, gate=gate), [0.5, 0.8]) for gate in ("MambaGate", "LinearGate")]
    exits = None if heads is not None else {depth: Exit(LogitLens) for depth in depths}
    return DecodingModule(source, policies, heads=heads, exits=exits, dtype=dtype, chat=chat, timed=MOST)


def sweep(box: Box, name: str, tested: DecodingModule, *, questions: int, tokens: int) -> float:
    """One test run, kept under a name; the seconds that a question took."""
    start = time.monotonic()
    found = box.measure(f"{name}, {questions} questions", lambda: run(box.device, tested, questions, tokens))
    if found is not None:
        times = f"{found['clock']}: {lines(found['latency_ms'])}"
        box.tabulate("\n".join([f"\n{name}, {questions} questions", table(tested.results).rstrip(), times]))
    return (time.monotonic() - start) / questions


def run(device: str, tested: DecodingModule, questions: int, tokens: int) -> dict[str, Any]:
    """Decode some questions with every policy beside the full model: the report, and the latency of every exit."""
    latency = ExitLatency(warmup=8 if device == "cuda" else 0)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "callbacks": [latency], "max_epochs": 1}
    trainer = Trainer(accelerator="gpu" if device == "cuda" else "cpu", devices=1, **options)
    task = Questions(offset=OFFSET, limit=questions, max_new_tokens=tokens)
    trainer.test(tested, datamodule=TaskData(task), verbose=False)
    clock = latency._clock
    assert clock is not None, "the run has ended, so it has begun"
    times = {
        kind: {
            str(depth): dict(zip(("p50", "p95", "n"), (*percentiles(ms), len(ms)), strict=True))
            for depth, ms in by.items()
            if ms
        }
        for kind, by in clock.read().items()
    }
    return {"report": tested.results.as_json(), "clock": type(clock).__name__, "latency_ms": times}


def lines(times: dict[str, dict[str, dict[str, float]]]) -> str:
    """Median milliseconds of a step that leaves at each depth."""
    ends = times.get("end", {})
    return ", ".join(
        f"depth {depth} {ends[depth]['p50']:.2f} ms ({ends[depth]['n']})" for depth in sorted(ends, key=int)
    )
