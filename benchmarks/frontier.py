"""How deep and how dear each way of leaving is at the same share of the full model's tokens.

    python -m benchmarks.frontier --heads NAME=FOLDER [NAME=FOLDER ...] [--calibrate 60] [--questions 60]
                                  [--tokens 64] [--skip 240] [--questions-file FILE] [--out FILE]

Every folder of heads gives contenders: the confidence of each of its gates, JEI-DNN's rule over each, and the lens'
own probability. All read the same answers of the full model, position by position (with exact state an exit changes
nothing for later positions). For each contender and each wanted share of same tokens, the exits that are asked and the
threshold are chosen on one half of the answers, by least cost; the figures are of the other half. ``oracle`` leaves at
the first exit that is right and costs no reading on the way.

Cost is weights read for a token over those of full decoding: blocks, lenses, gates, and the output matrix once for each
time it is read. ECE is that of the scores, all exits together, against being right, over 15 bins of equal size.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.early_exit_costs import Answer
from dynamax.calibration.reliability import calibration_error
from dynamax.data.generated import questions
from dynamax.engine import Engine, load
from dynamax.heads.bank import ExitBank
from dynamax.heads.gates import UncertaintyGate
from dynamax.metrics.environment import environment
from dynamax.policies.joint import exit_distribution

LEVELS = (0.99, 0.98, 0.95, 0.90)
GRID = 200
"""Thresholds that are tried: quantiles of the scores."""

Rule = Callable[[Tensor], Tensor]
"""Scores of the gates at the exits that are asked, ``s_EN``, to what is compared with the threshold."""


@dataclass
class Contender:
    """A way of leaving.

    Attributes:
        score_EN: The gate's confidence, or the lens' greatest probability, at each exit.
        right_EN: Whether the lens says the full model's token there.
        rule: What the threshold is compared with.
        asked: Weights read to ask each exit.
        leaving: Weights read beside when a token leaves at each exit.
    """

    score_EN: Tensor
    right_EN: Tensor
    rule: Rule
    asked: list[int]
    leaving: list[int]


def plain(score_EN: Tensor) -> Tensor:
    """The scores themselves."""
    return score_EN


def joint(score_EN: Tensor) -> Tensor:
    """JEI-DNN's chance to leave."""
    return exit_distribution(score_EN)[1]


def contenders(name: str, engine: Engine, answers: Sequence[Answer]) -> dict[str, Contender]:
    """All ways of leaving that a folder of heads gives."""
    bank = engine.exits
    assert bank is not None, "heads were given"
    spec, said, right = engine.backbone.spec, {}, []
    gates = [gate for gate in bank.gates(bank.depths[0]) if all(gate in bank.gates(depth) for depth in bank.depths)]
    for prompt_1T, said_1T in answers:
        text = engine.read(torch.cat([prompt_1T, said_1T[:, :-1]], 1), start=prompt_1T.shape[1] - 1)
        for gate in gates:
            said.setdefault(gate, []).append(torch.stack([each.confidence(gate)[1:] for each in text.exits]))
        said.setdefault("MaxProb", []).append(torch.stack([each.probs.amax(-1)[1:] for each in text.exits]))
        right.append(torch.stack([each.token[1:] == said_1T[0, 1:] for each in text.exits]))
    score = {gate: torch.cat(parts, 1).double() for gate, parts in said.items()}
    right_EN = torch.cat(right, 1)
    lens = [spec.vocab * spec.width + held(bank.lens(depth)) for depth in bank.depths]
    found: dict[str, Contender] = {}
    for gate in gates:
        own = [held(bank.gates(depth)[gate]) for depth in bank.depths]
        reads = isinstance(bank.gates(bank.depths[0])[gate], UncertaintyGate)
        asked = [a + b for a, b in zip(own, lens, strict=True)] if reads else own
        leaving = [0] * len(lens) if reads else lens
        found[f"{name}: {gate}"] = Contender(score[gate], right_EN, plain, asked, leaving)
        found[f"{name}: JEIGate({gate})"] = Contender(score[gate], right_EN, joint, asked, leaving)
    found[f"{name}: MaxProb"] = Contender(score["MaxProb"], right_EN, plain, lens, [0] * len(lens))
    return found


def held(module: torch.nn.Module) -> int:
    """Weights of a head."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Price:
    """Weights of what every token reads.

    Attributes:
        below: Of the blocks below each exit, and of all blocks.
        matrix: Of the output matrix.
    """

    below: list[int]
    matrix: int

    @classmethod
    def of(cls, engine: Engine, bank: ExitBank) -> Price:
        """Those of a model."""
        blocks = [engine.backbone.block_cost(index).active for index in range(engine.backbone.spec.depth)]
        spec = engine.backbone.spec
        return cls([sum(blocks[:depth]) for depth in (*bank.depths, spec.depth)], spec.vocab * spec.width)

    @property
    def full(self) -> int:
        """Of plain full decoding."""
        return self.below[-1] + self.matrix


def outcome(
    one: Contender, price: Price, depths: Sequence[int], exits: Sequence[int], level: float
) -> dict[str, float]:
    """Same tokens, blocks and cost when these exits (indices) are asked with one threshold."""
    pick = list(exits)
    leaves_EN = one.rule(one.score_EN[pick]) >= level
    gone_EN = leaves_EN.int().cumsum(0) > 0
    first_EN = leaves_EN & (gone_EN.int().cumsum(0) == 1)
    share_E = first_EN.double().mean(1)
    stay = float(1 - share_E.sum())
    same = stay + float((first_EN & one.right_EN[pick]).double().mean(1).sum())
    arrive_E = 1 - torch.cat([torch.zeros(1, dtype=share_E.dtype), share_E.cumsum(0)[:-1]])
    cost = stay * price.full
    blocks = stay * depths[-1]
    for index, share, arrive in zip(pick, share_E.tolist(), arrive_E.tolist(), strict=True):
        cost += arrive * one.asked[index] + share * (price.below[index] + one.leaving[index])
        blocks += share * depths[index]
    return {"same": same, "blocks": blocks, "cost": cost / price.full}


def chosen(one: Contender, price: Price, depths: Sequence[int], wanted: float) -> tuple[tuple[int, ...], float] | None:
    """Exits and threshold of least cost at the wanted share of same tokens; None if full decoding is cheaper."""
    best, found = 1.0, None
    count = len(one.score_EN)
    for size in range(1, count + 1):
        for exits in combinations(range(count), size):
            levels = np.quantile(one.rule(one.score_EN[list(exits)]).numpy(), np.linspace(0, 1, GRID)).tolist()
            for level in sorted(set(levels)):
                figures = outcome(one, price, depths, exits, level)
                if figures["same"] >= wanted and figures["cost"] < best:
                    best, found = figures["cost"], (exits, level)
    return found


def half(one: Contender, part: slice) -> Contender:
    """A contender over some of the positions."""
    return Contender(one.score_EN[:, part], one.right_EN[:, part], one.rule, one.asked, one.leaving)


def oracle(one: Contender, price: Price, depths: Sequence[int]) -> dict[str, float]:
    """Leaving at the first exit that is right, readings free."""
    free = Contender(one.right_EN.double(), one.right_EN, plain, [0] * len(one.asked), [price.matrix] * len(one.asked))
    return outcome(free, price, depths, range(len(one.asked)), 1.0)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    report: dict[str, Any] = {"environment": environment("cpu", dtype="float32", batch=1), "rows": {}}
    asked = asked_questions(args)
    for given in args.heads:
        name, _, folder = given.partition("=")
        engine = load(folder, device="cpu", precision="auto")
        bank = engine.exits
        assert bank is not None, "heads were given"
        answers = answered(engine, asked[: args.calibrate + args.questions], args.tokens)
        lengths = [each.said_1T.shape[1] - 1 for each in answers]
        border = sum(lengths[: args.calibrate])
        price, depths = Price.of(engine, bank), [*bank.depths, engine.backbone.spec.depth]
        with torch.inference_mode():
            found = contenders(name, engine, answers)
        test = {kind: half(one, slice(border, None)) for kind, one in found.items()}
        first = next(iter(test.values()))
        report["rows"][f"{name}: oracle"] = {"levels": {"right": oracle(first, price, depths)}}
        report["agreement"] = report.get("agreement", {}) | {name: first.right_EN.double().mean(1).tolist()}
        for kind, one in found.items():
            flat = test[kind].score_EN.flatten().numpy(), test[kind].right_EN.flatten().numpy()
            row: dict[str, Any] = {"ece": calibration_error(*flat), "levels": {}}
            for wanted in LEVELS:
                choice = chosen(half(one, slice(border)), price, depths, wanted)
                figures = {"same": 1.0, "blocks": float(depths[-1]), "cost": 1.0}
                if choice is not None:
                    figures = outcome(test[kind], price, depths, *choice)
                    figures |= {"exits": [depths[index] for index in choice[0]], "threshold": choice[1]}
                row["levels"][str(wanted)] = figures
            report["rows"][kind] = row
        report["positions"] = {"calibration": border, "test": sum(lengths) - border}
    return report


def answered(engine: Engine, asked: list[str], tokens: int) -> list[Answer]:
    """The full model's answers, natural stopping, 16 side by side; those of fewer than four tokens are left out."""
    found = engine.generate(asked, max_new_tokens=tokens, do_sample=False, rows=16)
    pairs = [(engine.encode(text), torch.tensor([answer.tokens])) for text, answer in zip(asked, found, strict=True)]
    return [Answer(prompt_1T, said_1T) for prompt_1T, said_1T in pairs if said_1T.shape[1] >= 4]


def asked_questions(args: argparse.Namespace) -> list[str]:
    """What is asked: shipped questions that no head was trained on, or the lines of a file."""
    if args.questions_file is not None:
        found = args.questions_file.read_text("utf-8").splitlines()
    else:
        found = [each.question for each in questions()[args.skip :]]
    random.Random(0).shuffle(found)
    return found


def table(report: dict[str, Any]) -> str:
    """A row a contender: same tokens, blocks and cost at each level."""
    lines = [f"{'':38}{'ECE':>6}" + "".join(f"{f'at {level}: same':>17}{'blocks':>8}{'cost':>7}" for level in LEVELS)]
    for name, row in report["rows"].items():
        cells = [f"{one['same']:>17.3f}{one['blocks']:>8.2f}{one['cost']:>7.3f}" for one in row["levels"].values()]
        ece = f"{row['ece']:>6.3f}" if "ece" in row else " " * 6
        lines.append(f"{name:38}{ece}{''.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    """Read, choose, print the table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", required=True)
    parser.add_argument("--questions-file", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    numbers = {"calibrate": 60, "questions": 60, "tokens": 64, "skip": 240}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    report = measured(args)
    print(table(report))
    if args.out is not None:
        report["options"] = {name: getattr(args, name) for name in numbers}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
