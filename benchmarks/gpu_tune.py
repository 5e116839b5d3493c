"""Part ``tune``: text that SmolLM2 writes itself, and early-exit tuning on it, in one time box.

    python -m benchmarks.gpu --only tune [--minutes 8] [--parts FOLDER]

A third of the time goes to text. A few steps are timed, and as many are planned as fill the rest, so that the learning
rate ends at 0 in time. The adapter, its lenses and ``tuning.json`` (before and after, on held-out answers) go to
``runs/tune-gpu``. Model and heads as for the part ``frontier``; without heads exits are read by the logit lens.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from benchmarks.gpu_frontier import found, rehearsed
from benchmarks.gpu_part import ROOT, Box
from dynamax.backbones.sources import Source
from dynamax.data.generated import SelfGenerated
from dynamax.data.written import WrittenText
from dynamax.modules.adapter import LowRank
from dynamax.modules.tuning import TuningModule
from dynamax.objectives.tuning import ExitTuning

FOLDER = Path("runs/tune-gpu")
WRITING = 0.33
"""Share of the time in which text is written."""
TRAINING = 0.8
"""Share of what is left then that steps may fill; reading the model before and after takes the rest."""
TIMED = 8
"""Steps that are timed, twice: the first ones warm up."""


def run(box: Box) -> None:
    """Write, time, tune."""
    seed_everything(0, verbose=False)
    source, heads, depths = rehearsed() if box.rehearse and box.parts is None else found(box.parts)
    place = Path(tempfile.mkdtemp(prefix="rehearsal-")) if box.rehearse else ROOT / FOLDER
    data = text(source, place / "text", box)
    end = box.left() * (1 - WRITING)
    data.prepare_data()
    tokens = written = 0
    for number in range(len(data.train)):
        if box.left() < end and written:
            break
        tokens += data.train.write(number)
        written += 1
    box.put("text", {"tokens": tokens, "pieces": written, "documents": sum(map(data.train.size, range(written)))})
    known = data.train.plan[:written]
    data.train.plan = known  # what is not written by now would be written between steps
    pace = timed(source, heads, depths, data, box)
    steps = max(2, int(TRAINING * box.left() / pace)) if not box.rehearse else 4
    box.put("pace", {"seconds a step": pace, "steps planned": steps, "rows": data.rows})
    tuned = module(source, heads, depths, steps, export=str(place / "model"))
    trainer(box, steps).fit(tuned, datamodule=data)
    report = json.loads((place / "model" / tuned.report).read_text())
    box.put("tuning", {name: report[name] for name in ("before", "after", "steps", "tokens", "seconds", "curve")})
    box.tabulate(table(report))
    if box.rehearse:
        shutil.rmtree(place)


def text(source: Source, folder: Path, box: Box) -> WrittenText:
    """Answers of the model itself, to the questions of ``configs/tune/smollm2.yaml``."""
    batch, documents, longest = (8, 16, 12) if box.rehearse else (512, 65536, 96)
    asked = SelfGenerated(
        questions=240, passages=0, documents=documents, max_new_tokens=longest, batch=batch, chat=not box.rehearse
    )
    dtype = "float32" if box.rehearse else "bfloat16"
    options: dict[str, Any] = {"dtype": dtype, "device": box.device, "rows": 8 if box.rehearse else 64}
    return WrittenText(source, [asked], folder=str(folder), validation_documents=batch, **options)


def module(
    source: Source, heads: str | None, depths: tuple[int, ...], steps: int, *, export: str | None
) -> TuningModule:
    """The recipe of ``configs/tune/smollm2.yaml``."""
    loss = ExitTuning(distil=1.0, hold=2.0, exits_at_once=1, dropout=0.02)
    options: dict[str, Any] = {"learning_rate": 1e-3, "warmup": max(1, steps // 20), "export": export}
    return TuningModule(source, list(depths), LowRank(rank=16, alpha=32.0), loss, heads=heads, **options)


def trainer(box: Box, steps: int) -> Trainer:
    """One device, no files of its own."""
    return Trainer(
        accelerator="cpu" if box.rehearse else "gpu",
        devices=1,
        precision="32-true" if box.rehearse else "bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def timed(source: Source, heads: str | None, depths: tuple[int, ...], data: WrittenText, box: Box) -> float:
    """Seconds of a step, warmed up."""
    count = 2 if box.rehearse else TIMED
    spent = []
    for steps in (count, 2 * count):
        tried = module(source, heads, depths, steps, export=None)
        trainer(box, steps).fit(tried, datamodule=data)
        spent.append(tried.record.seconds)
    return max(1e-3, (spent[1] - spent[0]) / count)


def table(report: dict[str, Any]) -> str:
    """Agreement with the original's top, and the loss, before and after, by depth."""
    lines = [f"{report['steps']} steps, {report['tokens']:,} tokens, {report['seconds']:.0f} s of training"]
    for depth, before in report["before"].items():
        after = report["after"][depth]
        agrees = f"agrees with the original's top {before['fidelity']:.3f} -> {after['fidelity']:.3f}"
        lines.append(f"  depth {depth}: {agrees}, loss {before['loss']:.3f} -> {after['loss']:.3f}")
    return "\n".join(lines)
