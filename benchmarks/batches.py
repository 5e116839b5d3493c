"""Tokens a second of requests side by side, at full depth and where each row leaves alone.

    python -m benchmarks.batches [--model assets/llama] [--exit 3] [--rows 1 2 4 8 16 32 64] [--requests 128]
                                 [--tokens 48] [--agreement 0.98] [--rounds 3] [--precision float16] [--threads N]
                                 [--out FILE]

Prompts are the shipped questions, of different lengths; answers end where the model ends them. Contenders take turns:

- ``in step``: prompts in padded batches, which run until their last row has ended;
- ``full``: the scheduler, which gives the row of an answer that has ended to the next request;
- ``Exact`` and ``Propagate``: the same with one exit that MaxProb asks, by the rule for skipped state. The threshold is
  the lowest at which, along the full model's answers to other questions, so many tokens are the same.

Reading the prompts is part of the time, and of all contenders' alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.backbones.skipped_state import Exact, Propagate, SkippedState
from dynamax.data.generated import questions, until
from dynamax.decoding.base import Decoder
from dynamax.decoding.batching import Scheduler
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.engine import Engine, load
from dynamax.metrics.environment import environment
from dynamax.policies import MaxProb

LEVELS = [level / 20 for level in range(4, 20)]
Found = tuple[list[list[int]], float]
"""Tokens of each answer, and seconds of all."""


def side_by_side(decoder: Decoder, prompts: list[Tensor], rows: int, tokens: int, ends: tuple[int, ...]) -> Found:
    """Answers by a scheduler."""
    begin, scheduler = time.perf_counter(), Scheduler(decoder, rows)
    said = {scheduler.submit(each, max_new_tokens=tokens, eos_token_id=ends): [] for each in prompts}
    while scheduler.busy:
        for told in scheduler.step():
            said[told.ticket].append(int(told.step.token_B))
    return list(said.values()), time.perf_counter() - begin


def in_step(decoder: Decoder, prompts: list[Tensor], rows: int, tokens: int, ends: tuple[int, ...]) -> Found:
    """Answers by padded batches, prompts of about the same length together."""
    begin, said = time.perf_counter(), [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: prompts[place].shape[1])
    for first in range(0, len(order), rows):
        places = order[first : first + rows]
        longest = prompts[places[-1]].shape[1]
        pads = [longest - prompts[place].shape[1] for place in places]
        prompt_BT = torch.cat([F.pad(prompts[place], (pad, 0)) for place, pad in zip(places, pads, strict=True)])
        pad_B = torch.tensor(pads) if any(pads) else None
        steps = decoder.decode(prompt_BT, max_new_tokens=tokens, eos_token_id=ends, pad_B=pad_B)
        columns_BT = torch.stack([step.token_B for step in steps], 1)
        for place, row in zip(places, columns_BT.tolist(), strict=True):
            said[place] = until(row, ends)
    return said, time.perf_counter() - begin


def same_tokens(decoder: Decoder, prompts: list[Tensor], answers: list[list[int]]) -> tuple[float, float]:
    """Share of same tokens along the full model's answers, and mean depth; first tokens left out."""
    same, depths = [], []
    for prompt_1T, answer in zip(prompts, answers, strict=True):
        steps = decoder.decode(prompt_1T, max_new_tokens=len(answer), forced_BT=torch.tensor([answer]))
        for step, token in list(zip(steps, answer, strict=True))[1:]:
            same.append(int(step.token_B) == token)
            depths.append(step.depth)
    return statistics.mean(same), statistics.mean(depths)


def calibrated(
    engine: Engine, rule: type[SkippedState], prompts: list[Tensor], answers: list[list[int]], wanted: float
) -> tuple[Decoder, dict[str, float]]:
    """The decoder with the lowest threshold at which the share of same tokens is reached."""
    for level in LEVELS:
        decoder = engine.decoder(MaxProb(level), partial(EarlyExit, skipped_state=rule()))
        share, depth = same_tokens(decoder, prompts, answers)
        if share >= wanted:
            return decoder, {"threshold": level, "same_tokens": share, "depth": depth}
    raise SystemExit(f"No threshold of {rule.__name__} keeps {wanted:.0%} of the tokens at this exit.")


def measure(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each contender at each number of rows, and what the thresholds came to."""
    ends = engine.options().eos_token_id
    encoded = [engine.encode(each.question) for each in questions()[: args.requests + 48]]
    asked, other = encoded[: args.requests], encoded[args.requests :]
    full = engine.decoder(None, Full)
    answers, _ = side_by_side(full, other, 8, args.tokens, ends)
    contenders: dict[str, Any] = {"in step": partial(in_step, full), "full": partial(side_by_side, full)}
    exits = {}
    for rule in (Exact, Propagate):
        decoder, exits[rule.__name__] = calibrated(engine, rule, other, answers, args.agreement)
        contenders[rule.__name__] = partial(side_by_side, decoder)
        print(rule.__name__, {name: round(value, 3) for name, value in exits[rule.__name__].items()}, flush=True)
    wanted, _ = side_by_side(full, asked, 1, args.tokens, ends)
    speeds: dict[int, dict[str, float]] = {}
    for rows in args.rows:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(args.rounds + 1):
            for name, run in contenders.items():
                said, seconds = run(asked, rows, args.tokens, ends)
                if turn:  # the first one is slow: steps of its kind are new
                    times[name].append(sum(map(len, said)) / seconds)
                elif name in ("in step", "full"):
                    print(name, f"answers as alone: {sum(map(list.__eq__, said, wanted))} of {len(wanted)}", flush=True)
        speeds[rows] = {name: statistics.median(each) for name, each in times.items()}
        line = "  ".join(f"{name} {speed:7.1f}" for name, speed in speeds[rows].items())
        ratios = "  ".join(f"{name} {speeds[rows][name] / speeds[rows]['full']:.2f}" for name in exits)
        print(f"{rows:3d} rows, tokens a second: {line}   over full: {ratios}", flush=True)
    return {"exits": exits, "tokens_per_second": speeds}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/llama")
    parser.add_argument("--exit", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--agreement", type=float, default=0.98)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = load(args.model, exits=[args.exit], precision=args.precision, device="cpu")
    found = measure(engine, args)
    if args.out is not None:
        known = environment("cpu", dtype="float32", batch=0, precision=engine.precision)
        del known["batch"]
        options = {name: value for name, value in vars(args).items() if name != "out"}
        args.out.write_text(json.dumps({"environment": known, "options": options, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
