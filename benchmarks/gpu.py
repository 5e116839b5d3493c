"""What a GPU shows: decode speed of SmolLM2 and of Codestral-7B's shape, and the latency of every exit by CUDA events.

python -m benchmarks.gpu [--out benchmarks/results/gpu.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import measured, memory, table
from benchmarks.models import CONTESTANTS, load
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.probe import CudaEvents
from dynamax.heads.bank import Exit, ExitBank
from dynamax.policies.schedule import AtDepth

RUNS = [("smollm2", "float32"), ("smollm2", "bfloat16"), ("codestral-7b", "bfloat16")]


def latencies(model: str, dtype: str, *, tokens: int = 64) -> dict[str, dict[str, float]]:
    """Milliseconds of a step that leaves at each depth: median and 95th percentile, by CUDA events."""
    backbone, (prompt_1T,) = load(model, dtype=dtype, device="cuda", prompts=1)
    depths = CONTESTANTS[model].depths
    bank = ExitBank({depth: Exit() for depth in depths}, backbone.site)
    found = {}
    for depth in (*depths, backbone.spec.depth):
        decoder = EarlyExit(backbone, bank, AtDepth(depth)) if depth in depths else Full(backbone)
        clock = CudaEvents(warmup=8)
        for _ in decoder.decode(prompt_1T, max_new_tokens=tokens, probe=clock):
            pass
        times = torch.tensor(clock.read()["end"][depth])
        p50, p95 = times.quantile(torch.tensor([0.5, 0.95])).tolist()
        found[str(depth)] = {"p50": p50, "p95": p95, "n": len(times)}
    return found


def main() -> None:
    """Measure, print tables, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; none was found")
    report: dict[str, Any] = {}
    for model, dtype in RUNS:
        options = argparse.Namespace(model=model, device="cuda", dtype=dtype, prompts=6, tokens=64, rounds=3)
        found = measured(options)
        found["exit_latency_ms"] = latencies(model, dtype)
        rows = table(found["ms"], CONTESTANTS[model].depths, found["depth"])
        print(f"{model} {dtype}", rows, memory(found), sep="\n")
        report[f"{model}, {dtype}"] = found
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
