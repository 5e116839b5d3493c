"""When exits pay: what reading an exit costs, what leaving there saves, and the policies that are fastest.

    python -m benchmarks.early_exit --heads FOLDER [--precision float16] [--threads N] [--agreement 0.985]
                                    [--calibrate 50] [--questions 16] [--tokens 48] [--skip 240] [--out FILE]

1. Costs. Decoders that differ in one thing take their steps in turn: full decoding; an exit that is passed and not
   read; one whose gates, candidates or output matrix are read; one where every second token leaves.
2. Thresholds. On the full model's answers to some questions, each kind of policy gets the exit and the thresholds
   that would save most time at the wanted share of same tokens, by these costs. A perfect gate knows what is right.
3. Speed. On other questions these policies decode along the full model's answers, step by step in turn with full
   decoding, and once more freely. The heads (the demo's) were trained on the first ``--skip`` questions alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynamax.data.generated import questions
from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.engine import Engine, load
from dynamax.metrics.environment import environment
from dynamax.policies import AllOf, CandidateProb, Cascade, GateConfidence, MaxProb, Never, OnlyAt, TerminationPolicy
from dynamax.types import Evidence

GATES = ("LinearGate", "MambaGate")
SHARES = [index / 50 for index in range(1, 46)]
"""Shares of positions that a first gate lets through, and of those, shares that leave."""


class Answer(NamedTuple):
    """A prompt ``tokens_1T``, and what the full model says, ``tokens_1T``."""

    prompt_1T: Tensor
    said_1T: Tensor


class EverySecond(TerminationPolicy):
    """Leaves at every second step."""

    gates = ()

    def __call__(self, evidence: Evidence) -> Tensor:
        """All rows at odd steps, none at even ones."""
        return evidence.hidden.new_full((len(evidence.hidden),), bool(evidence.step % 2), dtype=torch.bool)


def in_turn(decoders: dict[str, Decoder], answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Decode along each answer, all decoders a step each in turn, in random order.

    Returns:
        For each answer and decoder, milliseconds of its steps after the first, and whether tokens are the answer's.
    """
    order, rows = random.Random(0), []
    for prompt_1T, said_1T in answers:
        given = {"max_new_tokens": said_1T.shape[1], "forced_BT": said_1T}
        running = {name: decoder.decode(prompt_1T, **given) for name, decoder in decoders.items()}
        row = {name: ([], [], []) for name in running}
        for place, token in enumerate(said_1T[0].tolist()):
            for name in order.sample(list(running), len(running)):
                begin = time.perf_counter()
                step = next(running[name])
                spent = 1000 * (time.perf_counter() - begin)
                if place:
                    for known, value in zip(row[name], (spent, int(step.token_B) == token, step.depth), strict=True):
                        known.append(value)
        rows.append(row)
        for steps in running.values():
            steps.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    return rows


def extra(rows: list[dict[str, Any]], name: str, base: str) -> float:
    """Microseconds a step that one decoder takes more than another: the median of pairs of steps, over all answers."""
    pairs = [(a, b) for row in rows for a, b in zip(row[name][0], row[base][0], strict=True)]
    return 1000 * statistics.median(a - b for a, b in pairs)


def costs(engine: Engine, answers: list[Answer]) -> dict[str, Any]:
    """Microseconds, by depth: of passing an exit, of each reading, and what leaving saves."""
    bank = engine.exits
    assert bank is not None, "heads were given"
    never, second = Never(), EverySecond()
    tried: dict[str, TerminationPolicy] = {"pass": never, "CandidateProb": AllOf([CandidateProb(0.0), never])}
    tried["MaxProb"] = AllOf([MaxProb(0.0), never])
    tried["leave with MaxProb"] = AllOf([second, MaxProb(0.0)])
    tried["leave with CandidateProb"] = AllOf([second, CandidateProb(0.0)])
    found: dict[str, Any] = {}
    for depth in bank.depths:
        mine = tried | {name: AllOf([GateConfidence(0.0, gate=name), never]) for name in bank.gates(depth)}
        decoders = {name: engine.decoder(OnlyAt(policy, [depth]), EarlyExit) for name, policy in mine.items()}
        decoders["full"] = engine.decoder(None, Full)
        in_turn(decoders, answers[:1])  # steps of each kind are recorded
        rows = in_turn(decoders, answers)
        row = {name: extra(rows, name, "pass") for name in mine if name != "pass" and not name.startswith("leave")}
        row["pass"] = extra(rows, "pass", "full")
        for kind in ("MaxProb", "CandidateProb"):
            spent = [means(each[f"leave with {kind}"][0]) - means(each["pass"][0]) for each in rows]
            row[f"saved with {kind}"] = -2000 * statistics.median(spent)  # every second step leaves
        row["full"] = 1000 * statistics.median(ms for each in rows for ms in each["full"][0])
        found[str(depth)] = row
    return found


def means(times: list[float]) -> float:
    """The mean of both medians: of the even steps and of the odd ones, which pay the debt or leave."""
    return (statistics.median(times[::2]) + statistics.median(times[1::2])) / 2


def readings(engine: Engine, answers: list[Answer]) -> dict[int, dict[str, Tensor]]:
    """What each exit says at all positions after the first of each answer, by depth and score."""
    found: dict[int, dict[str, list[Tensor]]] = {}
    for prompt_1T, said_1T in answers:
        text = engine.read(torch.cat([prompt_1T, said_1T[:, :-1]], 1), start=prompt_1T.shape[1] - 1)
        top_T = said_1T[0]
        few = [(CandidateProb(0.0).score(evidence), evidence.answer.argmax(-1) == top_T) for evidence in text.exits]
        for evidence, (prob_T, right_T) in zip(text.exits, few, strict=True):  # before one of them is read in full
            row = {"CandidateProb": prob_T, "CandidateProb right": right_T, "MaxProb": MaxProb(0.0).score(evidence)}
            row |= {name: evidence.confidence(name) for name in GATES} | {"MaxProb right": evidence.token == top_T}
            for name, said_T in row.items():
                found.setdefault(evidence.depth, {}).setdefault(name, []).append(said_T[1:].float())
    return {depth: {name: torch.cat(parts) for name, parts in row.items()} for depth, row in found.items()}


class Choice(NamedTuple):
    """A policy, the microseconds a token that it would save, and its share of positions that leave."""

    saves: float
    policy: TerminationPolicy
    leaves: float


def choose(said: dict[int, dict[str, Tensor]], cost: dict[str, Any], wanted: float) -> dict[str, Choice]:
    """For each kind of policy that asks one exit, the one that would save most at the wanted share of same tokens."""
    best: dict[str, Choice] = {}
    for depth, row in said.items():
        price = cost[str(depth)]
        for first in GATES:
            score_N, size = row[first], len(row[first])
            gate = price["pass"] + price[first]
            for share in SHARES:
                low = quantile(score_N, share)
                past_N = score_N >= low
                wrong = (past_N & (row["MaxProb right"] == 0)).sum().item() / size
                leaves = past_N.float().mean().item()
                if 1 - wrong >= wanted:
                    policy = OnlyAt(GateConfidence(low, gate=first), [depth])
                    keep(best, first, Choice(leaves * price["saved with MaxProb"] - gate, policy, leaves))
                for kind, second in (("MaxProb", MaxProb), ("CandidateProb", CandidateProb)):
                    for inner in SHARES:
                        high = quantile(row[kind][past_N], inner)
                        left_N = past_N & (row[kind] >= high)
                        wrong = (left_N & (row[f"{kind} right"] == 0)).sum().item() / size
                        if 1 - wrong < wanted:
                            continue
                        left = left_N.float().mean().item()
                        saves = left * price[f"saved with {kind}"] - (leaves - left) * price[kind] - gate
                        policy = OnlyAt(Cascade([GateConfidence(low, gate=first), second(high)]), [depth])
                        keep(best, f"{first}, {kind}", Choice(saves, policy, left))
    return best


def keep(best: dict[str, Choice], name: str, choice: Choice) -> None:
    """Keep the better one."""
    if name not in best or choice.saves > best[name].saves:
        best[name] = choice


def quantile(score_N: Tensor, share: float) -> float:
    """A threshold that a share of the scores reaches, rounded down to what a configuration would say."""
    return int(1000 * torch.quantile(score_N, 1 - share).item()) / 1000


def everywhere(said: dict[int, dict[str, Tensor]], wanted: float) -> dict[str, TerminationPolicy]:
    """Policies that ask all exits with one threshold: the lowest that keeps the wanted share of same tokens."""
    found: dict[str, TerminationPolicy] = {}
    makers: dict[str, Callable[[float], TerminationPolicy]] = {"MaxProb": MaxProb}
    makers |= {name: lambda level, name=name: GateConfidence(level, gate=name) for name in GATES}
    for name, make in makers.items():
        for level in (index / 200 for index in range(80, 201)):
            stays_N, wrong = torch.ones(len(said[min(said)][name]), dtype=torch.bool), 0
            for row in said.values():
                leaves_N = stays_N & (row[name] >= level)
                wrong += (leaves_N & (row["MaxProb right"] == 0)).sum().item()
                stays_N &= ~leaves_N
            if 1 - wrong / len(stays_N) >= wanted:
                found[f"{name}, all exits"] = make(level)
                break
    return found


def perfect(said: dict[int, dict[str, Tensor]], cost: dict[str, Any]) -> dict[str, float]:
    """Microseconds a token that a gate would save that knows which exits are right and costs nothing."""
    bound = {}
    stays_N, saved = torch.ones(len(said[min(said)]["MaxProb right"]), dtype=torch.bool), 0.0
    for depth, row in said.items():
        right_N, price = row["MaxProb right"] > 0, cost[str(depth)]
        bound[str(depth)] = right_N.float().mean().item() * price["saved with MaxProb"] - price["pass"]
        saved += (stays_N & right_N).float().mean().item() * price["saved with MaxProb"]
        saved -= stays_N.float().mean().item() * price["pass"]
        stays_N &= ~right_N
    return bound | {"all exits": saved}


def speeds(
    engine: Engine, plain: Any, decoders: dict[str, Decoder], answers: list[Answer], rounds: int
) -> dict[str, Any]:  # noqa: ANN401, E501
    """Each decoder beside full decoding: same tokens, mean depth, milliseconds a token, and ratios answer by answer."""
    full = {"full": engine.decoder(None, Full), "full again": engine.decoder(None, Full)}
    in_turn(full | decoders, answers[:1])
    rows, generate_ms = [], []
    for _ in range(rounds):
        for answer in answers:
            rows += in_turn(full | decoders, [answer])
            generate_ms.append(generated(plain, answer))
    found: dict[str, Any] = {}
    for name in [*full, *decoders]:
        steps = [each for row in rows for each in zip(*row[name], strict=True)]
        ratios = [sum(row["full"][0]) / sum(row[name][0]) for row in rows]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "same tokens": statistics.mean(same for _, same, _ in steps),
            "depth": statistics.mean(depth for _, _, depth in steps),
            "ms": statistics.mean(ms for ms, _, _ in steps),
            "total": sum(sum(row["full"][0]) for row in rows) / sum(sum(row[name][0]) for row in rows),
            "ratio": middle,
            "quarter": low,
            "three quarters": high,
            "over generate": statistics.median(
                ms / statistics.mean(row[name][0]) for ms, row in zip(generate_ms, rows, strict=True)
            ),
        }
    ends = engine.options().eos_token_id
    for name, decoder in decoders.items():
        free = [says(decoder, prompt_1T, said_1T.shape[1], ends).equal(said_1T) for prompt_1T, said_1T in answers]
        found[name]["same answers"] = statistics.mean(free)
    return found


def generated(plain: Any, answer: Answer) -> float:  # noqa: ANN401 - a model of transformers
    """Milliseconds a token of transformers' generate, the prompt's own time taken off."""
    spent = []
    for count in (answer.said_1T.shape[1], 1):
        length = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        begin = time.perf_counter()
        plain.generate(answer.prompt_1T, attention_mask=torch.ones_like(answer.prompt_1T), **length)
        spent.append(1000 * (time.perf_counter() - begin))
    return (spent[0] - spent[1]) / (answer.said_1T.shape[1] - 1)


def says(decoder: Decoder, prompt_1T: Tensor, tokens: int, ends: Any) -> Tensor:  # noqa: ANN401 - as options have it
    """The tokens of an answer, ``tokens_1T``."""
    steps = decoder.decode(prompt_1T, max_new_tokens=tokens, eos_token_id=ends)
    return torch.stack([step.token_B for step in steps], 1)


def answered(engine: Engine, asked: Iterable[str], tokens: int) -> list[Answer]:
    """The full model's answers, natural stopping; those of fewer than four tokens are left out."""
    full, ends = engine.decoder(None, Full), engine.options().eos_token_id
    prompts = [torch.as_tensor(engine.encode(each)).reshape(1, -1) for each in asked]
    found = [Answer(prompt_1T, says(full, prompt_1T, tokens, ends)) for prompt_1T in prompts]
    return [each for each in found if each.said_1T.shape[1] >= 4]


def exits_table(report: dict[str, Any]) -> str:
    """Break-even of each exit: what it costs to ask, and how many tokens must leave for that."""
    lines = ["exit  pass  LinearGate  MambaGate  CandidateProb  MaxProb  saved: matrix  candidates  right  break-even"]
    for depth, row in report["costs"].items():
        needed = (row["pass"] + row["LinearGate"]) / row["saved with MaxProb"]
        lines.append(
            f"{depth:<4}{row['pass']:>6.0f}{row['LinearGate']:>12.0f}{row['MambaGate']:>11.0f}"
            f"{row['CandidateProb']:>15.0f}{row['MaxProb']:>9.0f}{row['saved with MaxProb']:>15.0f}"
            f"{row['saved with CandidateProb']:>12.0f}{report['right'][depth]:>7.1%}{needed:>12.1%}"
        )
    lines.append("a perfect gate that costs nothing would save, microseconds a token: ")
    lines[-1] += ", ".join(f"{name}: {saved:.0f}" for name, saved in report["perfect"].items())
    return "\n".join(lines)


def speeds_table(report: dict[str, Any]) -> str:
    """The policies beside full decoding."""
    lines = [f"{'':28}{'same':>7}{'answers':>8}{'depth':>7}{'ms':>7}{'ratio':>7}{'25 %':>7}{'75 %':>7}{'generate':>9}"]
    for name, row in report["speeds"].items():
        answers = "" if "same answers" not in row else f"{row['same answers']:.0%}"
        lines.append(
            f"{name:28}{row['same tokens']:>7.1%}{answers:>8}{row['depth']:>7.2f}{row['ms']:>7.2f}{row['ratio']:>7.3f}"
            f"{row['quarter']:>7.3f}{row['three quarters']:>7.3f}{row['over generate']:>9.2f}"
        )
    lines += [
        f"{name}: {row['policy']}, {'no estimate' if row['saves'] is None else format(row['saves'], '.0f') + ' us expected'}"
        for name, row in report["chosen"].items()
    ]
    return "\n".join(lines)


def said_of(policy: TerminationPolicy) -> str:
    """A policy with its thresholds."""
    inner = policy.policy if isinstance(policy, OnlyAt) else policy
    parts = inner.policies if isinstance(inner, Cascade) else (inner,)
    levels = ", ".join(f"{part.label} {part.threshold}" for part in parts)
    return levels if policy.depths is None else f"{levels} at {', '.join(map(str, policy.depths))}"


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    engine, plain = load(args.heads, precision=args.precision, device="cpu"), load(args.heads, device="cpu")
    asked = [each.question for each in questions()[args.skip :]]
    random.Random(0).shuffle(asked)
    calibration = answered(engine, asked[args.questions :][: args.calibrate], args.tokens)
    held = answered(engine, asked[: args.questions], args.tokens)
    with torch.inference_mode():
        cost = costs(engine, sorted(calibration, key=lambda each: -each.said_1T.shape[1])[:4])
        said = readings(engine, calibration)
    chosen = choose(said, cost, args.agreement)
    policies = everywhere(said, args.agreement) | {name: choice.policy for name, choice in chosen.items()}
    decoders = {name: engine.decoder(policy, EarlyExit) for name, policy in policies.items()}
    with torch.inference_mode():
        found = speeds(engine, plain.backbone.model, decoders, held, args.rounds)
    return {
        "environment": environment("cpu", dtype="float32", batch=1, precision=engine.precision),
        "options": {name: str(value) for name, value in vars(args).items() if name not in ("out", "heads")},
        "positions": len(next(iter(said.values()))["MaxProb"]),
        "costs": cost,
        "right": {str(depth): row["MaxProb right"].mean().item() for depth, row in said.items()},
        "perfect": perfect(said, cost),
        "chosen": {
            name: {
                "policy": said_of(policy),
                "saves": chosen[name].saves if name in chosen else None,
                "leaves": chosen[name].leaves if name in chosen else None,
            }
            for name, policy in policies.items()
        },
        "speeds": found,
    }


def main() -> None:
    """Measure, print tables, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=Path, required=True)
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--agreement", type=float, default=0.985)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    numbers = {"calibrate": 50, "questions": 16, "tokens": 48, "skip": 240, "rounds": 1}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = measured(args)
    print(exits_table(report))
    print(speeds_table(report))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
