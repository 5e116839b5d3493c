"""Lossless decoding with drafts from earlier text beside our own full decoding, question by question, in turn.

    python -m benchmarks.lossless [--model SmolLM2] [--questions 20] [--first 0] [--tokens 64] [--precision float16]
                                  [--compile] [--texts STORE] [--prompts FILE] [--threads N] [--out FILE]

The questions come with the project, or from a file (json lines with a field ``question``, or csv with ``Question``);
``--first`` leaves out those before it. ``--texts`` is what the table of successors knows before the first answer: name
questions that are not in it. Answers end where the model ends them. The first token, which is the prompt's, is
not timed. One decoder answers all questions, since it learns from answer to answer.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamax.decoding.base import Decoder
from dynamax.decoding.drafting import Speculative
from dynamax.decoding.drafts import PromptLookup, TokenTable
from dynamax.decoding.full import Full
from dynamax.engine import Engine, load
from dynamax.metrics.environment import environment


def answer(decoder: Decoder, prompt_1T: Tensor, tokens: int, ends: Any) -> tuple[list[int], float]:  # noqa: ANN401
    """The tokens, and the seconds after the first one."""
    said: list[int] = []
    begin = time.perf_counter()
    for step in decoder.decode(prompt_1T, max_new_tokens=tokens, eos_token_id=ends):
        said.append(int(step.token_B[0]))
        if len(said) == 1:
            begin = time.perf_counter()
    return said, time.perf_counter() - begin


def asked(file: Path | None, first: int, count: int) -> list[str]:
    """So many questions, drawn from those of the file, or those that come with the project, from ``first`` on."""
    place = files("dynamax").joinpath("data", "prompts", "questions.jsonl") if file is None else file
    if place.name.endswith(".csv"):
        found = [row["Question"] for row in csv.DictReader(place.read_text("utf-8").splitlines())]
    else:
        found = [json.loads(line)["question"] for line in place.read_text("utf-8").splitlines()]
    return random.Random(1).sample(found[first:], count)


def measure(engine: Engine, questions: list[str], tokens: int, texts: Path | None) -> dict[str, float]:
    """Speed-up over all answers; median and tenth percentile of those of more than eight tokens; how many are equal."""
    full, drafted = (
        engine.decoder(None, Full),
        engine.decoder(None, Speculative, sources=[PromptLookup(), TokenTable(texts)]),
    )
    ends, ratios, equal, spent = engine.options().eos_token_id, [], 0, [0.0, 0.0]
    for question in questions:
        prompt_1T = torch.as_tensor(engine.encode(question)).reshape(1, -1)
        wanted, slow = answer(full, prompt_1T, tokens, ends)
        said, fast = answer(drafted, prompt_1T, tokens, ends)
        equal += said == wanted
        spent = [spent[0] + slow, spent[1] + fast]
        if len(wanted) > 8:
            ratios.append(slow / fast)
    ratios.sort()
    return {
        "questions": len(questions),
        "equal": equal,
        "speed_up": spent[0] / spent[1],
        "median": statistics.median(ratios),
        "p10": ratios[len(ratios) // 10],
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--prompts", type=Path, default=None)
    parser.add_argument("--texts", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = load(args.model, precision=args.precision, compile=args.compile, device="cpu")
    found = measure(engine, asked(args.prompts, args.first, args.questions), args.tokens, args.texts)
    print(found)
    if args.out is not None:
        known = environment("cpu", dtype="float32", batch=1, precision=engine.precision)
        options = {
            "model": args.model,
            "tokens": args.tokens,
            "first": args.first,
            "table_filled": args.texts is not None,
        }
        options["prompts"] = "questions.jsonl" if args.prompts is None else args.prompts.name
        args.out.write_text(json.dumps({"environment": known, "options": options, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
