"""Steps compiled by inductor beside the same steps as they were recorded, in turn in one process.

    python -m benchmarks.compiled [--model smollm2] [--precision float16] [--chunks 1 2 4 8] [--steps 30] [--rounds 5]
                                  [--threads N] [--out FILE]

All blocks, batch 1, chunks of some positions each, over a context that grows. The floor is the matrix products of the
blocks, as they are called in the compiled steps. Two times are told for compiling: the first has nothing on disk, the
second finds what the first left there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import bare
from benchmarks.decode import products as packed_products
from benchmarks.models import CONTESTANTS, load
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.precision import set_precision
from dynamax.metrics.environment import environment
from dynamax.types import Span

Row = dict[str, float]


def loaded(args: argparse.Namespace, *, compiled: bool) -> tuple[HFBackbone, Any]:
    """The model and how its weights are held; random weights are the same at every call."""
    torch.manual_seed(0)
    backbone, _ = load(args.model, dtype="float32", device="cpu", prompts=1)
    return backbone, set_precision(backbone, args.precision, compiled=compiled)


@torch.inference_mode()
def measured(models: dict[str, HFBackbone], size: int, args: argparse.Namespace) -> Row:
    """Milliseconds a chunk of ``size`` positions, the median; and the largest difference of the hidden states."""
    span = Span(0, models["compiled"].spec.depth)
    products = bare(packed_products(models["compiled"], span.stop)[:-1], size)
    times: dict[str, list[float]] = {name: [] for name in (*models, "products")}
    gap = 0.0
    for number in range(args.rounds + 1):  # one to warm up
        caches = {name: model.new_cache(size * args.steps) for name, model in models.items()}
        for step in range(args.steps):
            tokens_1T, said = torch.arange(100 + step, 100 + step + size)[None], dict[str, Tensor]()
            for name in times if step % 2 else reversed(times):
                begin = time.perf_counter()
                if name in models:
                    model, cache = models[name], caches[name]
                    said[name] = model.run(model.embed(tokens_1T, cache), span, cache)
                else:
                    products()
                if number:
                    times[name].append(1000 * (time.perf_counter() - begin))
            if size * step < 40:  # random weights carry rounding on from step to step
                off = (said["recorded"] - said["compiled"]).abs().max() / said["recorded"].abs().max()
                gap = max(gap, float(off))
    return {name: statistics.median(known) for name, known in times.items()} | {"difference": gap}


def table(found: dict[int, Row]) -> str:
    """The rows as text."""
    heads = (("positions", 9), ("recorded", 10), ("compiled", 10), ("ratio", 7), ("products", 10), ("x step", 8))
    lines = ["".join(f"{name:>{width}}" for name, width in (*heads, ("difference", 12)))]
    single = next(iter(found.values()))["compiled"]
    for size, row in found.items():
        lines.append(
            f"{size:>9}{row['recorded']:>10.2f}{row['compiled']:>10.2f}{row['recorded'] / row['compiled']:>7.2f}"
            f"{row['products']:>10.2f}{row['compiled'] / single:>8.2f}{row['difference']:>12.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONTESTANTS, default="smollm2")
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        seconds = [loaded(args, compiled=True)[1].compiling for _ in range(2)]
        (recorded, _), (compiled, precision) = loaded(args, compiled=False), loaded(args, compiled=True)
        models = {"recorded": recorded, "compiled": compiled}
        found = {size: measured(models, size, args) for size in args.chunks}
    print(table(found))
    print(f"seconds to pack and compile: {seconds[0]:.1f}, {seconds[1]:.1f} with what is on disk")
    if args.out is not None:
        known = environment("cpu", dtype="float32", batch=1, precision=precision)
        options = {name: getattr(args, name) for name in ("model", "precision", "chunks", "steps", "rounds")}
        report = {"environment": known, "options": options, "seconds to compile": seconds, "ms": found}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
