"""What asking an exit costs while a model decodes: gates and lenses, in microseconds beside a block.

    python -m benchmarks.gates [--model smollm2] [--precision float16] [--tokens 64] [--rounds 3]
                               [--threads 1] [--out FILE]

Each contender has exits at half the depth and above, is asked at all of them and leaves nowhere (threshold 1). Timed is
what lies between two spans of blocks of one step: everything that the exit does, and the decision. A block is a step at
full depth, over the number of blocks. Weights of the heads are random; contenders decode in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import CONTESTANTS, load
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.precision import set_precision
from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.heads import AttentionGate, FFNGate, LinearGate, MambaGate, MLPGate, TunedLens
from dynamax.heads.bank import Exit, ExitBank
from dynamax.metrics.environment import environment
from dynamax.policies import AnyOf, CandidateProb, GateConfidence, MaxProb, Never, TerminationPolicy
from dynamax.testing import stir

GATES = {gate.__name__: gate for gate in (LinearGate, MLPGate, FFNGate, MambaGate, AttentionGate)}


def depths_of(backbone: HFBackbone) -> list[int]:
    """Four exits, the first in the middle."""
    total = backbone.spec.depth
    return [total // 2 + index * total // 8 for index in range(4)]


def contenders(backbone: HFBackbone) -> dict[str, Decoder]:
    """Decoders by name."""
    exits = {depth: Exit(TunedLens, list(GATES.values())) for depth in depths_of(backbone)}
    bank = ExitBank(exits, backbone.site)
    stir(bank)
    policies: dict[str, TerminationPolicy] = {"nothing": Never()}
    policies |= {name: GateConfidence(1.0, gate=name) for name in GATES}
    policies["MambaGate, LinearGate"] = AnyOf([policies["MambaGate"], policies["LinearGate"]])
    policies["MaxProb"] = MaxProb(1.0)
    policies["CandidateProb"] = CandidateProb(1.0)
    return {name: EarlyExit(backbone, bank, policy) for name, policy in policies.items()}


class Stopwatch:
    """Times what happens between the spans of a backbone's walks, in steps of one position."""

    def __init__(self, backbone: HFBackbone) -> None:
        self.times: list[float] = []
        self._walk, self._top = backbone.walk, backbone.spec.depth
        backbone.walk = self.walk  # pyright: ignore[reportAttributeAccessIssue]

    def walk(self, *values: Any, **options: Any) -> Iterator[tuple[int, Tensor]]:  # noqa: ANN401 - as the backbone's
        """The backbone's walk, with a look at the clock before and after each exit."""
        for depth, h_BTD in self._walk(*values, **options):
            before = time.perf_counter()
            yield depth, h_BTD
            if h_BTD.shape[1] == 1 and depth < self._top:
                self.times.append(time.perf_counter() - before)


def measure(backbone: HFBackbone, prompt_1T: Tensor, *, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of each reading of an exit, by contender; and of a block."""
    full, asked, watch = Full(backbone), contenders(backbone), Stopwatch(backbone)
    reading: dict[str, list[float]] = {name: [] for name in asked}
    block: list[float] = []
    for _ in range(rounds):
        start = 0.0
        for index, _ in enumerate(full.decode(prompt_1T, max_new_tokens=tokens)):
            if index:
                block.append((time.perf_counter() - start) / backbone.spec.depth)
            start = time.perf_counter()
        for name, decoder in asked.items():
            watch.times.clear()
            list(decoder.decode(prompt_1T, max_new_tokens=tokens))
            reading[name] += watch.times[4 * len(depths_of(backbone)) :]  # the first steps are recorded
    return {name: summary(times) for name, times in {"block": block, **reading}.items()}


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles, in microseconds."""
    low, middle, high = (1e6 * each for each in statistics.quantiles(times, n=4))
    return {"median": middle, "quarter": low, "three quarters": high, "n": len(times)}


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as text, with the share of a block."""
    lines = [f"{'asked at an exit':24}{'median us':>10}{'25 %':>9}{'75 %':>9}{'of a block':>12}"]
    for name, row in rows.items():
        share = row["median"] / rows["block"]["median"]
        lines.append(
            f"{name:24}{row['median']:>10.1f}{row['quarter']:>9.1f}{row['three quarters']:>9.1f}{share:>12.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONTESTANTS, default="smollm2")
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    backbone, prompts = load(args.model, dtype="float32", device="cpu", prompts=1)
    set_precision(backbone, args.precision)
    rows = measure(backbone, prompts[0], tokens=args.tokens, rounds=args.rounds)
    print(table(rows))
    if args.out is not None:
        options = {name: getattr(args, name) for name in ("model", "precision", "tokens", "rounds", "threads")}
        report = {"environment": environment("cpu", dtype="float32", batch=1), "options": options, "us": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
