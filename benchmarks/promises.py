"""How often thresholds break what was promised of them, over many random splits of held-out documents.

    python -m benchmarks.promises --heads FOLDER --prompts FILE [FILE ...] [--field question] [--policy MaxProb | GATE]
                                  [--epsilon 0.05] [--delta 0.1] [--splits 200] [--tokens 64] [--every N]
                                  [--scores FILE] [--out FILE]

The model answers every prompt at full depth, greedily, and every exit is scored at every position; with ``--scores``
the scores are kept in a file and used again. Each split draws a quarter of the documents for the search, three eighths
for the test of the promise, and three eighths to see what happens. ``ltt, tokens`` takes each token for a document of
its own, as if tokens of one answer did not depend on one another: how often that breaks is what it costs not to split
by document, and its blocks beside those of ``ltt`` are what splitting by document costs.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dynamax.calibration.promise import Level, losses
from dynamax.calibration.risk import promised
from dynamax.calibration.scores import Reads, Scores, scored, texts
from dynamax.calibration.search import Searched, best_path, departures, price
from dynamax.data.text import Document
from dynamax.engine import Engine, load
from dynamax.metrics.environment import environment
from dynamax.policies import GateConfidence, MaxProb
from dynamax.policies.base import ScorePolicy

Prices = Callable[[Sequence[int]], np.ndarray]
"""Exits that are asked, to the cost of a token by where it leaves."""

CONTENDERS: tuple[tuple[str, str, Level], ...] = (
    ("ltt", "ltt", "document"),
    ("ucb", "ucb", "document"),
    ("crc", "crc", "document"),
    ("naive", "naive", "document"),
    ("ltt, tokens", "ltt", "token"),
)


def prompts_of(files: Sequence[Path], field: str) -> list[str]:
    """Prompts of JSONL, CSV or text files."""
    found: list[str] = []
    for file in files:
        if file.suffix == ".jsonl":
            found += [json.loads(line)[field] for line in file.read_text("utf-8").splitlines()]
        elif file.suffix == ".csv":
            with file.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
            key = next(name for name in rows[0] if name.lower() == field.lower())
            found += [row[key] for row in rows]
        else:
            found += file.read_text("utf-8").splitlines()
    return list(dict.fromkeys(found))


def read(engine: Engine, policy: ScorePolicy, prompts: list[str], tokens: int) -> list[Scores]:
    """Scores of the full model's answers."""
    answers = engine.generate(prompts, max_new_tokens=tokens, do_sample=False, rows=16)
    asked = [engine.encode(prompt)[0].tolist() for prompt in prompts]
    documents = [Document(a + b.tokens, len(a)) for a, b in zip(asked, answers, strict=True)]
    return [scored(text, policy) for text in texts(engine, documents)]


def kept(file: Path | None, engine: Engine, policy: ScorePolicy, args: argparse.Namespace) -> list[Scores]:
    """Scores from a file, or anew and then kept in it."""
    if file is None or not file.is_file():
        scores = read(engine, policy, prompts_of(args.prompts, args.field)[:: args.every], args.tokens)
        if file is not None:
            arrays: dict[str, Any] = {f"score{i}": each.score_ET for i, each in enumerate(scores)}
            arrays |= {f"right{i}": each.right_ET for i, each in enumerate(scores)}
            np.savez(file, reads=np.array(json.dumps(scores[0].reads)), **arrays)
        return scores
    with np.load(file) as known:
        held = json.loads(str(known["reads"]))
        reads = tuple(Reads(logits, rows, tuple(gates), few) for logits, rows, gates, few in held)
        count = sum(name.startswith("right") for name in known)
        return [Scores(known[f"score{i}"], known[f"right{i}"], reads) for i in range(count)]


def split_once(
    scores: Sequence[Scores],
    depths: Sequence[int],
    total: int,
    prices: Callable[[Sequence[int]], np.ndarray],
    args: argparse.Namespace,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Risk, blocks and cost on the last part of one random split, by contender."""
    order = np.random.default_rng(seed).permutation(len(scores))
    search, test, see = np.split(order, [len(order) // 4, len(order) // 4 + 3 * len(order) // 8])
    parts = [Searched.of([scores[i] for i in part]) for part in (search, test, see)]
    found: dict[str, dict[str, float]] = {}
    blocks_E = np.array([*depths, total], dtype=float)
    for name, method, level in CONTENDERS:
        path = best_path(parts[0], depths, args.epsilon, level, prices)
        levels = [] if path is None else path.levels
        exits = () if path is None else path.exits
        place = None
        if levels:
            wrong = [departures(parts[1], depths, exits, one)[0] for one in levels]
            lost_DC = np.stack([losses(wrong_N, parts[1].starts_D, level) for wrong_N in wrong], 1)
            place = promised(lost_DC, args.epsilon, args.delta, method, binary=level == "token")  # type: ignore[arg-type]
        if place is None:
            found[name] = {"risk": 0.0, "blocks": float(total), "cost": 1.0, "given": 0.0}
            continue
        wrong_N, place_N = departures(parts[2], depths, exits, levels[place])
        found[name] = {
            "risk": float(losses(wrong_N, parts[2].starts_D, level).mean()),
            "blocks": float(blocks_E[[*exits, len(depths)]][place_N].mean()),
            "cost": float(prices(exits)[place_N].mean()),
            "given": 1.0,
        }
    return found


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    engine = load(args.heads, device="cpu", precision="auto")
    assert engine.exits is not None, "heads were given"
    policy: ScorePolicy = MaxProb(0.5) if args.policy == "MaxProb" else GateConfidence(0.5, gate=args.policy)
    scores = kept(args.scores, engine, policy, args)
    depths, total = engine.exits.depths, engine.backbone.spec.depth
    full = price(engine, policy, scores[0].reads, ())[-1]
    known = {
        exits: price(engine, policy, scores[0].reads, exits) / full
        for size in range(len(depths) + 1)
        for exits in combinations(range(len(depths)), size)
    }
    runs = [split_once(scores, depths, total, lambda exits: known[tuple(exits)], args, i) for i in range(args.splits)]
    rows: dict[str, Any] = {}
    for name, _, _ in CONTENDERS:
        mine = [run[name] for run in runs]
        rows[name] = {key: float(np.mean([each[key] for each in mine])) for key in ("risk", "blocks", "cost", "given")}
        rows[name]["broken"] = float(np.mean([each["risk"] > args.epsilon for each in mine]))
        rows[name]["worst"] = max(each["risk"] for each in mine)
    return {
        "environment": environment("cpu", dtype="float32", batch=1),
        "options": {name: getattr(args, name) for name in ("policy", "epsilon", "delta", "splits", "tokens")},
        "documents": len(scores),
        "tokens": sum(each.right_ET.shape[1] for each in scores),
        "right": np.concatenate([each.right_ET for each in scores], 1).mean(1).tolist(),
        "rows": rows,
    }


def table(report: dict[str, Any]) -> str:
    """The rows as text."""
    options = report["options"]
    lines = [
        f"{report['documents']} documents, {report['tokens']} tokens; {options['splits']} splits; epsilon "
        f"{options['epsilon']}, delta {options['delta']}",
        f"{'':14}{'broken':>8}{'mean risk':>11}{'worst':>8}{'given':>8}{'blocks':>8}{'cost':>8}",
    ]
    for name, row in report["rows"].items():
        lines.append(
            f"{name:14}{row['broken']:>8.1%}{row['risk']:>11.2%}{row['worst']:>8.2%}{row['given']:>8.0%}"
            f"{row['blocks']:>8.2f}{row['cost']:>8.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Read, split, print the table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", default=[])
    parser.add_argument("--field", default="question")
    parser.add_argument("--policy", default="MaxProb")
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--every", type=int, default=1, help="use only every Nth prompt")
    parser.add_argument("--scores", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    report = measured(args := parser.parse_args())
    print(table(report))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
