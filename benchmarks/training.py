"""Training heads from the store beside training with the backbone in the loop; reading prompts beside transformers.

    python -m benchmarks.training [--store runs/store] [--lengths 64 256 512] [--rounds 3] [--threads N] [--out FILE]

1. Prompts. SmolLM2 reads prompts of each length into an empty cache and gives the last logits: by transformers, and by
   ours as loaded, at float32 and at float16 weights, in turn. Tokens a second, the median.
2. Heads. The demo's run trains its heads for one epoch of lenses and one of gates, on the store that ``make demo``
   left. Then the same with the backbone in the loop: before each batch the model, at float16 weights, runs over the
   batch's tokens to the top, as it must where nothing was stored. Tokens a second of the training steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from dynamax import Engine, load
from dynamax.metrics.environment import environment
from dynamax.types import Span

PRECISIONS = {"ours, as loaded": None, "ours, float32": "float32", "ours, float16": "float16"}
OVERLAY = """
trainer:
  max_epochs: 2
  enable_progress_bar: false
  logger: false
  callbacks:
  - class_path: benchmarks.training.Meter
    init_args: {{out: {out}, backbone: {backbone}}}
model:
  class_path: HeadsModule
  init_args:
    phases:
      lenses: {{objective: {configs}/objective/lens-distillation.yaml, epochs: 1}}
      gates: {{objective: {configs}/objective/gate-agreement.yaml}}
data: {{class_path: HiddenStates, init_args: {{folder: {store}}}}}
"""


class Meter(Callback):
    """Counts tokens and seconds of training steps, by epoch.

    Args:
        out: File for the counts.
        backbone: Whether the backbone runs over each batch before the step.
    """

    def __init__(self, out: str, backbone: bool) -> None:
        self.out, self.counts = Path(out), dict[int, list[float]]()
        self.engine = load("SmolLM2", precision="float16", device="cpu") if backbone else None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Run the backbone, if there is one."""
        self._begin = time.perf_counter()
        if self.engine is not None:
            with torch.inference_mode():
                run = self.engine.backbone.run(
                    self.engine.backbone.embed(batch.tokens_BT), Span(0, self.engine.backbone.spec.depth)
                )
                self.engine.backbone.unembed(run).topk(16)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Count, and write."""
        counts = self.counts.setdefault(trainer.current_epoch, [0, 0.0])
        counts[0] += int(batch.live_BT.sum())
        counts[1] += time.perf_counter() - self._begin
        self.out.write_text(json.dumps(self.counts))


def trained(store: Path, threads: int, *, backbone: bool) -> dict[str, float]:
    """Tokens a second of both phases."""
    with tempfile.TemporaryDirectory() as folder:
        out, overlay = Path(folder) / "counts.json", Path(folder) / "overlay.yaml"
        known = {"out": out, "backbone": str(backbone).lower(), "store": store.resolve()}
        overlay.write_text(OVERLAY.format(**known, configs=Path("configs").resolve()))
        command = [sys.executable, "-m", "dynamax", "fit", "-c", "configs/demo/fit.yaml", "-c", str(overlay)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": "."})
        counts = json.loads(out.read_text())
    return {phase: tokens / spent for phase, (tokens, spent) in zip(("lenses", "gates"), counts.values(), strict=True)}


@torch.inference_mode()
def read(lengths: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Tokens a second of prompts, by length and contender."""
    engines: dict[str, Engine] = {name: load("SmolLM2", precision=p, device="cpu") for name, p in PRECISIONS.items()}
    model: Any = engines["ours, as loaded"].backbone

    def ours(engine: Engine, tokens_1T: Tensor) -> None:
        backbone, cache = engine.backbone, engine.backbone.new_cache(tokens_1T.shape[1])
        h_BTD = backbone.run(backbone.embed(tokens_1T, cache), Span(0, backbone.spec.depth), cache)
        backbone.unembed(h_BTD[:, -1:])

    calls: dict[str, Callable[[Tensor], object]] = {
        "transformers": lambda tokens_1T: model.model(tokens_1T, use_cache=True, logits_to_keep=1)
    }
    calls |= {name: lambda tokens_1T, engine=engine: ours(engine, tokens_1T) for name, engine in engines.items()}
    found: dict[str, dict[str, float]] = {}
    for length in lengths:
        tokens_1T = torch.randint(100, 40_000, (1, length), generator=torch.Generator().manual_seed(0))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds + 1):  # one to warm up
            for name, call in calls.items():
                begin = time.perf_counter()
                call(tokens_1T)
                if number:
                    times[name].append(time.perf_counter() - begin)
        found[str(length)] = {name: length / statistics.median(known) for name, known in times.items()}
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("runs/store"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {"prompts, tokens a second": read(args.lengths, args.rounds)}
    heads = {
        name: trained(args.store, args.threads, backbone=name == "in the loop") for name in ("store", "in the loop")
    }
    found["heads, tokens a second"] = heads
    print(json.dumps(found, indent=1))
    if args.out is not None:
        known = environment("cpu", dtype="float32", batch=1)
        options = {"lengths": args.lengths, "rounds": args.rounds}
        args.out.write_text(json.dumps({"environment": known, "options": options, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
