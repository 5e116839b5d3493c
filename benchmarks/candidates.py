"""What candidate tokens are worth at each exit: how sure, how often right, and how dear beside the whole matrix.

    python -m benchmarks.candidates [--heads FOLDER] [--precision float16] [--train 40] [--answers 30] [--tokens 60]
                                    [--limit 256] [--recent 16] [--likely 16] [--threads 1] [--out FILE]

SmolLM2 answers questions greedily; exits are read along these answers. Without ``--heads``, four tuned lenses are
fitted in closed form (ridge regression to the state at the top) to ``--train`` answers, which are not scored.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.precision import set_precision
from dynamax.backbones.sources import SmolLM2
from dynamax.data.generated import questions
from dynamax.decoding.full import Full
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.engine import Engine
from dynamax.heads import TunedLens
from dynamax.heads.bank import Exit, ExitBank
from dynamax.metrics.environment import environment
from dynamax.metrics.exits import auroc
from dynamax.policies import CandidateMargin, CandidateProb, Margin, MaxProb
from dynamax.types import Evidence

DEPTHS = (15, 19, 23, 27)
Text = tuple[Tensor, int]
"""Tokens of prompt and answer, and the last position of the prompt."""


def answers(engine: Engine, count: int, tokens: int) -> list[Text]:
    """Greedy answers to questions from all of the shipped files."""
    known = list(questions())
    full, found = Full(engine.backbone), []
    for question in known[:: max(1, len(known) // count)][:count]:
        prompt_1T = engine.encode(question.question)
        said = [step.token_B for step in full.decode(prompt_1T, max_new_tokens=tokens, eos_token_id=[2])]
        found.append((torch.cat([prompt_1T, torch.stack(said, 1)[:, :-1]], 1), prompt_1T.shape[1] - 1))
    return found


@torch.no_grad()
def fitted(backbone: HFBackbone, texts: Iterable[Text], *, strength: float = 30.0) -> ExitBank:
    """Tuned lenses by ridge regression from the normed state of an exit to that of the top."""
    bank = ExitBank({depth: Exit(TunedLens) for depth in DEPTHS}, backbone.site)
    read: dict[int, list[Tensor]] = {depth: [] for depth in (*DEPTHS, backbone.spec.depth)}
    for tokens_1T, start in texts:
        for depth, h_1TD in backbone.walk(backbone.embed(tokens_1T), read):
            read[depth].append(backbone.normalize(h_1TD)[0, start:])
    top_ND = torch.cat(read.pop(backbone.spec.depth)).double()
    for depth, parts in read.items():
        u_ND = torch.cat(parts).double()
        u_NE = torch.cat([u_ND, torch.ones_like(u_ND[:, :1])], 1)
        penalty_EE = strength * u_ND.square().mean() * torch.eye(u_NE.shape[1], dtype=u_NE.dtype)
        map_ED = torch.linalg.solve(u_NE.T @ u_NE + penalty_EE, u_NE.T @ (top_ND - u_ND))
        lens: Any = bank.lens(depth)
        lens.shift.weight.copy_(map_ED[:-1].T)
        lens.shift.bias.copy_(map_ED[-1])
    return bank


class Scores:
    """What one exit said at all positions, by column."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Tensor]] = {}

    def candidates(self, evidence: Evidence, top_T: Tensor, policies: tuple[CandidateProb, CandidateMargin]) -> None:
        """Read an exit over its candidates."""
        prob, margin = policies
        self._add("candidate margin", margin.score(evidence))
        self._add("candidate prob", prob.score(evidence))
        own_TV, best_T = evidence.answer.isfinite(), evidence.answer.argmax(-1)
        self._add("candidates", own_TV.sum(-1))
        self._add("top among", own_TV.gather(-1, top_T[:, None])[:, 0])
        self._add("candidate right", best_T == top_T)
        self._add("best candidate", best_T)

    def matrix(self, evidence: Evidence, top_T: Tensor) -> None:
        """Read an exit in full."""
        self._add("right", evidence.token == top_T)
        self._add("best", evidence.token)
        self._add("max prob", MaxProb(0.5).score(evidence))
        self._add("margin", Margin(0.5).score(evidence))

    def _add(self, name: str, said_T: Tensor) -> None:
        self.columns.setdefault(name, []).append(said_T[1:].double())  # the first is decided at the top

    def summary(self) -> dict[str, float]:
        """Shares and AUROCs, each score against agreement of its own token with the top."""
        said = {name: torch.cat(parts) for name, parts in self.columns.items()}
        said["same token"] = (said["best"] == said["best candidate"]).double()
        scores = {"max prob": "right", "margin": "right", "candidate prob": "candidate right"}
        scores["candidate margin"] = "candidate right"
        shares = ("right", "candidate right", "same token", "top among", "candidates")
        figures = {name: said[name].mean().item() for name in shares}
        return figures | {f"auroc {name}": auroc(said[name], said[label]).item() for name, label in scores.items()}


@torch.inference_mode()
def times(backbone: HFBackbone, rows: int, *, rounds: int = 60) -> dict[str, float]:
    """Milliseconds of a reading of one position, after a step that has filled the caches with other weights."""
    site, cache = backbone.site(DEPTHS[0]), backbone.new_cache()
    tokens_C = torch.randperm(backbone.spec.vocab)[:rows]
    spent: dict[str, list[float]] = {"matrix": [], "candidates": []}
    for _ in range(rounds):
        for name, tokens in (("matrix", None), ("candidates", tokens_C)):
            for _, h_11D in backbone.walk(backbone.embed(torch.tensor([[5]]), cache), [backbone.spec.depth], cache):
                u_11D = site.normalize(h_11D)
                spent[name].append(seconds(lambda u=u_11D, t=tokens: site.project(u, t)))
    return {name: 1000 * statistics.median(each) for name, each in spent.items()}


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(report: dict[str, Any]) -> str:
    """The figures as text."""
    columns = list(next(iter(report["exits"].values())))
    lines = ["exit  " + "  ".join(columns)]
    for depth, row in report["exits"].items():
        lines.append(f"{depth:<6}" + "  ".join(f"{row[name]:>{len(name)}.3f}" for name in columns))
    spent = report["ms"]
    share = spent["candidates"] / spent["matrix"]
    lines.append(f"a reading: matrix {spent['matrix']:.2f} ms, candidates {spent['candidates']:.2f} ms ({share:.2f})")
    return "\n".join(lines)


def main() -> None:
    """Answer, fit, read, print a table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=Path, default=None)
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--out", type=Path, default=None)
    numbers = {"train": 40, "answers": 30, "tokens": 60, "limit": 256, "recent": 16, "likely": 16, "frequent": 2048}
    numbers |= {"threads": 1}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = measured(args)
    print(table(report))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    source = SmolLM2()
    backbone = source.load(dtype="float32", device="cpu")
    set_precision(backbone, args.precision)
    texts = answers(Engine(backbone, source.tokenizer()), args.train + args.answers, args.tokens)
    random.Random(0).shuffle(texts)
    trained, held = texts[: args.train], texts[args.train :]
    bank = fitted(backbone, trained) if args.heads is None else ExitBank.load(args.heads, backbone.site)
    options = {name: getattr(args, name) for name in ("limit", "recent", "likely", "frequent")}
    policies = CandidateProb(0.5, **options), CandidateMargin(0.5, **options)
    scores = {depth: Scores() for depth in bank.depths}
    with torch.inference_mode():
        for tokens_1T, start in held:
            known = TeacherForcedPass(backbone, bank, tokens_1T, start=start)
            top_T = known.logits_TV.argmax(-1)
            for evidence in known.exits:  # before one of them is read in full
                scores[evidence.depth].candidates(evidence, top_T, policies)
            for evidence in known.exits:
                scores[evidence.depth].matrix(evidence, top_T)
    rows = {depth: each.summary() for depth, each in scores.items()}
    return {
        "environment": environment("cpu", dtype="float32", batch=1),
        "options": {name: str(value) for name, value in vars(args).items()},
        "exits": rows,
        "ms": times(backbone, round(statistics.mean(row["candidates"] for row in rows.values()))),
    }


if __name__ == "__main__":
    main()
