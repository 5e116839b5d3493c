"""When exits pay: what reading an exit costs, what leaving there saves, and the policies that are fastest.

    python -m benchmarks.early_exit --heads FOLDER [--precision float16] [--compile] [--threads N] [--agreement 0.985]
                                    [--rounds 2] [--calibrate 40] [--questions 12] [--tokens 48] [--skip 240]
                                    [--out FILE]

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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.early_exit_costs import Answer, choose, costs, everywhere, in_turn, perfect, readings
from dynamax.data.generated import questions
from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.engine import Engine, load
from dynamax.metrics.environment import environment
from dynamax.policies import Cascade, OnlyAt, TerminationPolicy


def speeds(
    engine: Engine,
    plain: Any,  # noqa: ANN401 - a model of transformers
    decoders: dict[str, Decoder],
    answers: list[Answer],
    rounds: int,
) -> dict[str, Any]:
    """Each decoder beside full decoding: same tokens, mean depth, milliseconds a token, and ratios answer by answer."""
    full = {"full": engine.decoder(None, Full), "full again": engine.decoder(None, Full)}
    in_turn(full | decoders, answers[:1])
    rows, generate_ms = [], []
    for answer in answers:  # the same steps in each round: the fastest of each is the least disturbed
        again = [in_turn(full | decoders, [answer])[0] for _ in range(rounds)]
        fastest = {
            name: [min(each) for each in zip(*(row[name][0] for row in again), strict=True)] for name in again[0]
        }
        rows.append({name: (times, *again[0][name][1:]) for name, times in fastest.items()})
        generate_ms.append(min(generated(plain, answer) for _ in range(rounds)))
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
    for name, row in report["chosen"].items():
        expected = "" if row["saves"] is None else f", {row['saves']:.0f} us a token expected"
        lines.append(f"{name}: {row['policy']}{expected}")
    return "\n".join(lines)


def said_of(policy: TerminationPolicy) -> str:
    """A policy with its thresholds."""
    inner = policy.policy if isinstance(policy, OnlyAt) else policy
    parts = inner.policies if isinstance(inner, Cascade) else (inner,)
    levels = ", ".join(f"{part.label} {part.threshold}" for part in parts)
    return levels if policy.depths is None else f"{levels} at {', '.join(map(str, policy.depths))}"


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    engine = load(args.heads, precision=args.precision, compile=args.compile, device="cpu")
    plain = load(args.heads, device="cpu")
    asked = [each.question for each in questions()[args.skip :]]
    random.Random(0).shuffle(asked)
    calibration = answered(engine, asked[args.questions :][: args.calibrate], args.tokens)
    held = answered(engine, asked[: args.questions], args.tokens)
    with torch.inference_mode():
        cost = costs(engine, sorted(calibration, key=lambda each: -each.said_1T.shape[1])[:2])
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
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--agreement", type=float, default=0.985)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    numbers = {"calibrate": 40, "questions": 12, "tokens": 48, "skip": 240, "rounds": 2}
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
