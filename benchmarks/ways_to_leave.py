"""Every way of leaving early in one table: what it keeps and what it saves, along known texts and decoding freely.

    python -m benchmarks.ways_to_leave --heads NAME=FOLDER [NAME=MODEL:15,19,23,27 ...] --questions-file FILE
                                       [--calibrate 80] [--questions 80] [--timed 8] [--rounds 1] [--tokens 64]
                                       [--precision auto] [--frequent 2048] [--only WAY ...] [--cache FOLDER]
                                       [--out FILE]

``NAME=FOLDER`` gives the confidence of each gate in the folder, JEI-DNN's rule over UncertaintyGate, MaxProb,
CandidateProb, and cascades of a gate with these two; ``NAME=MODEL:DEPTHS`` the logit lens alone (CALM). An exit at the
top skips no block; CandidateProb leaves there without the whole output matrix.

1. The full model answers all questions. Every exit is scored at every position of the answers; with ``--cache`` the
   scores are kept and used again.
2. What asking an exit costs and what leaving there saves is timed on the model itself.
3. For each way and each wanted share of same tokens, exits and thresholds are chosen on the answers for calibration,
   where they would save most time. Nothing is chosen where nothing would be saved: full decoding goes on.
4. On the other answers: the share of same tokens of all, read in one pass, where candidates come from the full model's
   steps; blocks, bytes and time of ``--timed`` of them, decoded step by step in turn with full decoding along the full
   model's answer, and once more freely. ``timed same`` is the share of same tokens of the former, where candidates come
   from the exits' own steps.

``oracle`` leaves at the first exit that is right, asks nothing, and saves by the times of 2. Models that ``--out``
already holds stay in it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.early_exit_costs import Answer, costs, in_turn
from benchmarks.frontier import answered, asked_questions
from dynamax.calibration.search import Calibration, thresholds
from dynamax.decoding.cost import CostModel
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.engine import Engine, load
from dynamax.metrics.environment import environment
from dynamax.policies import CandidateProb, Cascade, GateConfidence, JEIGate, MaxProb, OnlyAt
from dynamax.policies.base import ScorePolicy, TerminationPolicy
from dynamax.policies.joint import exit_distribution

LEVELS = (0.99, 0.98, 0.95, 0.90)
FIRST = (0.3, 0.5, 0.7, 0.8, 0.9)
"""Shares of positions that the first policy of a cascade stops."""

Scores = dict[str, Tensor]
"""By name, ``[exits, positions]``: what a policy scores; and whether its token is the full model's (``NAME right``)."""


@torch.no_grad()
def scores_of(engine: Engine, answers: Sequence[Answer], frequent: int) -> Scores:
    """What every exit says at all positions after the first of each answer."""
    assert engine.exits is not None, "heads or exits were given"
    found: dict[str, list[Tensor]] = {}
    for prompt_1T, said_1T in answers:
        text = engine.read(torch.cat([prompt_1T, said_1T[:, :-1]], 1), start=prompt_1T.shape[1] - 1)
        rows: list[dict[str, Tensor]] = []
        policy = CandidateProb(0.0, frequent=frequent)
        few = [(policy.score(each), each.answer.argmax(-1) == said_1T[0]) for each in text.exits]
        for evidence, (prob_T, right_T) in zip(text.exits, few, strict=True):  # before one of them is read in full
            row = {"CandidateProb": prob_T, "CandidateProb right": right_T}
            row |= {"MaxProb": evidence.probs.amax(-1), "right": evidence.token == said_1T[0]}
            rows.append(row | {name: evidence.confidence(name) for name in engine.exits.gates(evidence.depth)})
        for name in rows[0]:
            found.setdefault(name, []).append(torch.stack([row[name][1:].double() for row in rows]))
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


@dataclass
class Way:
    """A way of leaving.

    Attributes:
        scored: The score that thresholds are chosen for.
        right: Whether the token is right, by name.
        policy: From thresholds by depth, and that of the first policy of a cascade, to the policy.
        reads: What asking reads, in the words of ``costs``, and what is read when a token leaves.
        first: The gate that a cascade asks before.
        joint: Whether the score is JEI-DNN's over the exits that are asked.
    """

    scored: str
    right: str
    policy: Callable[[dict[int, float], float], TerminationPolicy]
    reads: tuple[str, str]
    first: str | None = None
    joint: bool = False


def ways(scores: Scores, frequent: int) -> dict[str, Way]:
    """All that a folder of heads allows."""
    gates = [name for name in scores if name.endswith("Gate")]
    few = partial(CandidateProb, frequent=frequent)
    ends: dict[str, Callable[[dict[int, float]], ScorePolicy]] = {"MaxProb": MaxProb, "CandidateProb": few}
    found = {
        name: Way(
            name, "right" if name == "MaxProb" else f"{name} right", lambda at, _, kind=kind: kind(at), (name, name)
        )
        for name, kind in ends.items()
    }
    for gate in gates:
        found[gate] = Way(gate, "right", lambda at, _, gate=gate: GateConfidence(at, gate=gate), (gate, "MaxProb"))
        if gate == "UncertaintyGate":
            made = lambda at, _, gate=gate: JEIGate(at, gate=gate)  # noqa: E731
            found["JEI-DNN"] = Way(gate, "right", made, (gate, "MaxProb"), joint=True)
            continue
        for name, kind in ends.items():
            made = lambda at, low, gate=gate, kind=kind: Cascade([GateConfidence(low, gate=gate), kind(at)])  # noqa: E731
            found[f"{gate}, then {name}"] = Way(name, found[name].right, made, (name, name), first=gate)
    return found


@dataclass
class Choice:
    """Exits and thresholds of a way.

    Attributes:
        saves: Microseconds a token, on the answers for calibration.
        exits: Places of the exits that are asked.
        levels: Thresholds by depth.
        low: Threshold of the first policy of a cascade; 0 for another way.
    """

    saves: float = 0.0
    exits: tuple[int, ...] = ()
    levels: dict[int, float] = field(default_factory=dict)
    low: float = 0.0


def departures(
    way: Way, scores: Scores, choice: Choice, depths: Sequence[int], prices: dict[str, Any]
) -> tuple[float, float, float]:
    """Share of same tokens, mean blocks but for the top's, and microseconds saved a token, of a choice."""
    pick = list(choice.exits)
    score_EN = exit_distribution(scores[way.scored][pick])[1] if way.joint else scores[way.scored][pick]
    passes_EN = (
        torch.ones_like(score_EN, dtype=torch.bool) if way.first is None else scores[way.first][pick] >= choice.low
    )
    limits_E1 = torch.tensor([choice.levels.get(depths[i], np.inf) for i in pick], dtype=score_EN.dtype)[:, None]
    leave_EN = passes_EN & (score_EN >= limits_E1)
    arrive_EN = leave_EN.int().cumsum(0) - leave_EN.int() == 0
    leave_EN &= arrive_EN
    wrong = float((leave_EN & (scores[way.right][pick] == 0)).sum()) / score_EN.shape[1]
    asked, ends = way.reads
    saves = blocks = 0.0
    for place, leave_N, arrive_N, pass_N in zip(pick, leave_EN, arrive_EN, passes_EN & arrive_EN, strict=True):
        price = prices[str(depths[place])]
        left, came, second = (float(each.double().mean()) for each in (leave_N, arrive_N, pass_N))
        saves += left * price[f"saved with {ends}"] - came * price["pass"]
        if way.first is not None:
            saves -= came * price[way.first] + (second - left) * price[asked]
        elif asked == "UncertaintyGate":  # it reads all logits, which leaving then need not
            saves += left * price["MaxProb"] - came * price[asked]
        else:
            saves -= (came - left if asked == ends else came) * price[asked]
        blocks += left * depths[place]
    return 1 - wrong, blocks + (1 - float(leave_EN.any(0).double().mean())) * depths[-1], saves


def chosen(way: Way, scores: Scores, depths: Sequence[int], prices: dict[str, Any]) -> dict[float, Choice]:
    """For each wanted share of same tokens, the choice that saves most; one that saves nothing asks no exit."""
    best = {wanted: Choice() for wanted in LEVELS}
    count = len(depths) - 1
    right_EN = scores[way.right].numpy() > 0
    lows = [0.0] if way.first is None else np.quantile(scores[way.first].numpy(), FIRST).tolist()
    for low in lows:
        for exits in (each for size in range(1, count + 1) for each in combinations(range(count), size)):
            given = (
                exit_distribution(scores[way.scored][list(exits)])[1] if way.joint else scores[way.scored][list(exits)]
            )
            passes_EN = np.ones(given.shape, dtype=bool)
            if way.first is not None:
                passes_EN = scores[way.first][list(exits)].numpy() >= low
            if not passes_EN.any(1).all():  # at one of them nothing gets to the second policy
                continue
            maps: list[Any] = [None] * count
            for place, score_N, pass_N in zip(exits, given.numpy(), passes_EN, strict=True):
                maps[place] = Calibration(score_N[pass_N], right_EN[place][pass_N])
            for levels in thresholds(maps, depths, exits):
                choice = Choice(0.0, exits, levels, low)
                same, _, choice.saves = departures(way, scores, choice, depths, prices)
                for wanted in LEVELS:
                    if same >= wanted and choice.saves > best[wanted].saves:
                        best[wanted] = choice
    return best


def oracle(scores: Scores, depths: Sequence[int], prices: dict[str, Any]) -> dict[str, float]:
    """Leaving at the first exit that is right, for nothing."""
    free = {
        key: {name: 0.0 if not name.startswith("saved") else value for name, value in row.items()}
        for key, row in prices.items()
    }
    way = Way("right", "right", lambda *_: MaxProb(1.0), ("MaxProb", "MaxProb"))
    every = Choice(0.0, tuple(range(len(depths) - 1)), dict.fromkeys(depths[:-1], 1.0))
    same, blocks, saves = departures(way, scores, every, depths, free)
    full = statistics.median(row["full"] for row in prices.values())
    return {"same": same, "blocks": blocks, "time": 1 - saves / full}


def speeds(
    engine: Engine, policies: dict[str, TerminationPolicy], answers: Sequence[Answer], rounds: int
) -> dict[str, dict[str, float]]:
    """Blocks, bytes and time a token over those of full decoding: along the answers (forced), and freely.

    All rounds take the same steps, so the fastest of each is the least disturbed. ``full again`` shows the noise.
    """
    decoders = {name: engine.decoder(policy, EarlyExit) for name, policy in policies.items()}
    models = {name: CostModel(engine.backbone, decoder.exits) for name, decoder in decoders.items()}
    decoders["full again"] = engine.decoder(None, Full)
    everyone = {"full": engine.decoder(None, Full)} | decoders
    models |= dict.fromkeys(("full", "full again"), CostModel(engine.backbone))
    in_turn(everyone, answers[:1])  # steps of each kind are recorded
    again = [in_turn(everyone, answers) for _ in range(rounds)]
    forced = [
        {name: [min(each) for each in zip(*(row[name][0] for row in rows), strict=True)] for name in everyone}
        for rows in zip(*again, strict=True)
    ]
    ends = engine.options().eos_token_id
    free: dict[str, list[tuple[float, float, float, bool]]] = {name: [] for name in everyone}
    order = random.Random(0)
    for prompt_1T, said_1T in answers:
        for name in order.sample(list(everyone), len(everyone)):
            said, begin, spent, blocks, moved = [], 0.0, 0.0, 0, 0.0
            steps = everyone[name].decode(prompt_1T, max_new_tokens=said_1T.shape[1], eos_token_id=ends)
            begin = time.perf_counter()
            for place, step in enumerate(steps):
                if place:
                    spent += time.perf_counter() - begin
                    blocks += sum(step.work.calls)
                    moved += models[name].step(step, prompt_1T.shape[1] + place - 1).bytes
                said.append(int(step.token_B))
                begin = time.perf_counter()
            length = max(1, len(said) - 1)
            free[name].append((1000 * spent / length, blocks / length, moved / length, said == said_1T[0].tolist()))
    found: dict[str, dict[str, float]] = {}
    ms, _, bytes_full, _ = (statistics.mean(column) for column in zip(*free["full"], strict=True))
    for name in decoders:
        ratios = [sum(row["full"]) / sum(row[name]) for row in forced]
        own = [statistics.mean(column) for column in zip(*free[name], strict=True)]
        found[name] = {
            "speed-up": sum(sum(row["full"]) for row in forced) / sum(sum(row[name]) for row in forced),
            "timed same": statistics.mean(same for row in again[0] for same in row[name][1]),
            "least": min(ratios),
            "most": max(ratios),
            "free speed-up": ms / own[0],
            "free blocks": own[1],
            "free bytes": own[2] / bytes_full,
            "free same answers": own[3],
        }
    return found


def opened(given: str, precision: str) -> Engine:
    """``FOLDER`` of heads, or ``MODEL:DEPTHS``."""
    model, _, listed = given.rpartition(":")
    if model and listed.replace(",", "").isdigit():
        return load(model, exits=[int(depth) for depth in listed.split(",")], device="cpu", precision=precision)
    return load(given, device="cpu", precision=precision)


def kept(folder: Path | None, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - what is made
    """What was made before, from its file in the folder; else made now, and kept there. None keeps nothing."""
    file = None if folder is None else folder / f"{name}.pt"
    if file is not None and file.is_file():
        return torch.load(file)
    made = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(made, file)
    return made


def one_model(name: str, given: str, asked: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """All ways of leaving that one folder of heads allows."""
    engine = opened(given, args.precision)
    assert engine.exits is not None, "heads or exits were given"
    depths = [*engine.exits.depths, engine.backbone.spec.depth]
    answers = kept(
        args.cache,
        f"answers-{engine.backbone.spec.fingerprint}",
        lambda: [tuple(each) for each in answered(engine, asked[: args.calibrate + args.questions], args.tokens)],
    )
    answers = [Answer(*each) for each in answers]
    scores = kept(args.cache, name, lambda: scores_of(engine, answers, args.frequent))
    if args.only_scores:
        return {}
    border = sum(each.said_1T.shape[1] - 1 for each in answers[: args.calibrate])
    first = {key: value[:, :border] for key, value in scores.items()}
    second = {key: value[:, border:] for key, value in scores.items()}
    timed = answers[args.calibrate :][: args.timed]
    with torch.inference_mode():
        prices = costs(
            engine, sorted(answers[: args.calibrate], key=lambda each: -each.said_1T.shape[1])[:2], args.frequent
        )
    rows: dict[str, Any] = {}
    policies: dict[str, TerminationPolicy] = {}
    for kind, way in ways(scores, args.frequent).items():
        if args.only is not None and kind not in args.only:
            continue
        for wanted, choice in chosen(way, first, depths, prices).items():
            row: dict[str, Any] = {"same": 1.0, "blocks": float(depths[-1])}
            if choice.exits:
                asks = [depths[place] for place in choice.exits]
                limits = {depth: choice.levels.get(depth, 1.0) for depth in asks}
                same, blocks, saves = departures(way, second, choice, depths, prices)
                row = {"same": same, "blocks": blocks, "forecast us": saves, "exits": asks, "thresholds": limits}
                row |= {"first": choice.low} if way.first is not None else {}
                policies[f"{kind} {wanted}"] = OnlyAt(way.policy(limits, choice.low), asks)
            rows.setdefault(kind, {})[str(wanted)] = row
    with torch.inference_mode():
        found = speeds(engine, policies, timed, args.rounds) if policies else {}
    for kind, row in rows.items():
        for wanted in row:
            row[wanted] |= found.get(f"{kind} {wanted}", {})
    return {
        "depths": depths,
        "frequent": args.frequent,
        "right": second["right"].mean(1).tolist(),
        "positions": {"calibration": border, "test": second["right"].shape[1]},
        "oracle": oracle(second, depths, prices),
        "costs us": prices,
        "full again": found.get("full again"),
        "rows": rows,
    }


def table(report: dict[str, Any]) -> str:
    """A line a way: same tokens, blocks, bytes and time at each wanted share; and of the free answers."""
    lines = [
        "At each wanted share: same tokens / blocks / speed-up along known answers; free: bytes, same answers, speed-up"
    ]
    for name, found in report["models"].items():
        best = found["oracle"]
        right = " / ".join(f"{share:.3f}" for share in found["right"])
        lines.append(f"{name}: exits {found['depths'][:-1]}, right {right}")
        lines.append(f"  {'oracle':28} {best['same']:.3f} / {best['blocks']:5.2f} / {1 / best['time']:.2f}")
        for kind, row in found["rows"].items():
            cells = []
            for one in row.values():
                if "exits" not in one:
                    cells.append(f"{'full decoding':>38}")
                    continue
                cell = f"{one['same']:.3f} /{one['blocks']:5.1f} /{one['speed-up']:5.2f}"
                cells.append(
                    f"{cell}; {one['free bytes']:4.2f},{one['free same answers']:4.0%},{one['free speed-up']:5.2f}"
                )
            lines.append(f"  {kind:28} " + " | ".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Score, choose, time, print the table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", required=True)
    parser.add_argument("--questions-file", type=Path, default=None)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--only-scores", action="store_true", help="fill the cache, and stop before anything is timed")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", nargs="+", default=None, metavar="WAY", help="only some ways, by their names")
    numbers = {"calibrate": 80, "questions": 80, "timed": 8, "rounds": 1, "tokens": 64, "skip": 240, "frequent": 2048}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    asked = asked_questions(args)
    report: dict[str, Any] = {
        "environment": environment("cpu", dtype="float32", batch=1),
        "options": {name: getattr(args, name) for name in (*numbers, "precision")},
        "models": {},
    }
    if args.out is not None and args.out.is_file():
        report["models"] = json.loads(args.out.read_text())["models"]
    for given in args.heads:
        name, _, where = given.partition("=")
        report["models"][name] = one_model(name, where, asked, args)
        if args.out is not None:  # so that a run that is stopped keeps the models that are done
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    if not args.only_scores:
        print(table(report))


if __name__ == "__main__":
    main()
