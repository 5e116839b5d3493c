"""An edge and a cloud over slow networks, beside the cloud alone and a split that sends everything anew.

    python -m benchmarks.edge_cloud --heads NAME=FOLDER [NAME=MODEL:DEPTHS ...] --questions-file FILE [--coqa FILE]
                                    [--prompts 4] [--tokens 32] [--rtt 5,20,80] [--mbit 10,100] [--wire float16]
                                    [--thresholds 0.8,0.9] [--precision auto] [--out FILE]

The cloud is a process of its own (``dynamax serve cloud``), the edge is this one, both with one thread. Between them
stands ``SlowLink``, which delays bytes and lets so many a second pass. Ways:

- ``cloud only``: ``dynamax serve edge --backbone`` behind the same link; text goes up, tokens come down in a stream.
- ``naive split``: for every token the states of the whole text go up again, in float32, and are waited for.
- ``standalone``, ``collaborative`` at some thresholds of MaxProb and at none that is ever met, ``drafting``.

For each: seconds an answer, of these the edge's own, the cloud's passes and what is left, communication; bytes of
states a token; tokens asked of the cloud; same tokens, along the whole model's answers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import torch
from torch import Tensor

from benchmarks.frontier import asked_questions
from benchmarks.slow_link import SlowLink
from benchmarks.ways_to_leave import opened
from dynamax.backbones.sources import FolderSource
from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.engine import Engine, find_source
from dynamax.metrics.environment import environment
from dynamax.policies import MaxProb, Never, TerminationPolicy
from dynamax.serving.edge import Collaborative, Drafting, Standalone
from dynamax.serving.link import Link
from dynamax.serving.opening import EdgeOptions, open_edge
from dynamax.serving.split import places, split
from dynamax.tasks.coqa import CoQA

THREADS = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def process(*arguments: str) -> Iterator[int]:
    """A command of ours that listens, as long as it is needed; its port."""
    command = [sys.executable, "-m", "dynamax", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=THREADS
    ) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        found = re.search(r":(\d+)[/,]", line)
        assert found is not None, f"{' '.join(arguments)} said {line!r}"
        try:
            yield int(found[1])
        finally:
            running.terminate()


@contextmanager
def slow(port: int, rtt: float, mbit: float) -> Iterator[SlowLink]:
    """A network before a port."""
    made = SlowLink(port, rtt=rtt / 1000, mbit=mbit)
    try:
        yield made
    finally:
        made.close()


Row = dict[str, float]


def edge_row(decoder: Decoder, link: Link | None, prompts: Sequence[Tensor], count: int, ends: Sequence[int]) -> Row:
    """What answers took, and what went over the wire."""
    rows: list[Row] = []
    for prompt_1T in prompts:
        begin = time.perf_counter()
        said = len(list(decoder.decode(prompt_1T, max_new_tokens=count, eos_token_id=ends)))
        total = time.perf_counter() - begin
        row = {"seconds": total, "edge": total, "cloud": 0.0, "communication": 0.0, "tokens": said}
        row |= {"bytes a token": 0.0, "asked": 0.0}
        if link is not None:
            traffic = link.traffic
            row["edge"] = total - traffic.waited
            row["cloud"] = traffic.cloud
            row["communication"] = traffic.waited - traffic.cloud
            row["bytes a token"], row["asked"] = traffic.sent / said, traffic.asked / said
        rows.append(row)
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


@torch.inference_mode()
def naive_row(engine: Engine, link: Link, prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> Row:
    """The split without a context in the cloud: for each token all states go up, and the edge waits."""
    rows: list[Row] = []
    backbone, sent = engine.backbone, 0
    assert backbone.held is not None, "an edge's part"
    for prompt_1T, said_1T in zip(prompts, answers, strict=True):
        begin, waited, cloud, sent = time.perf_counter(), 0.0, 0.0, 0
        cache, states = backbone.new_cache(), []
        feed_1T = prompt_1T
        for place in range(said_1T.shape[1]):
            states.append(backbone.run(backbone.embed(feed_1T, cache), backbone.held, cache)[0])
            opening = time.perf_counter()  # a naive cloud has no sessions, so to open one is not counted
            link.begin(prompt_1T.shape[1] + said_1T.shape[1])
            while not link.opened:
                time.sleep(0.001)
            asked = time.perf_counter()
            begin += asked - opening
            link.send(torch.cat(states))
            link.next()
            waited += time.perf_counter() - asked
            cloud, sent = cloud + link.traffic.cloud, sent + link.traffic.sent
            feed_1T = said_1T[:, place : place + 1]
        total, count = time.perf_counter() - begin, said_1T.shape[1]
        row = {"seconds": total, "edge": total - waited, "cloud": cloud, "communication": waited - cloud}
        rows.append({**row, "tokens": count, "bytes a token": sent / count, "asked": 1.0})
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


def alone_row(port: int, name: str, questions: Sequence[str], count: int) -> Row:
    """The whole model behind the link, asked by HTTP, token by token."""
    seconds, tokens = [], []
    with httpx2.Client(timeout=300) as client:
        client.get(f"http://127.0.0.1:{port}/health")
        for question in questions:
            turns = [{"role": "user", "content": question}]
            asked = {"model": name, "messages": turns, "max_tokens": count, "temperature": 0, "stream": True}
            begin = time.perf_counter()
            with client.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=asked) as reply:
                tokens.append(sum('"dynamax"' in line for line in reply.iter_lines()))
            seconds.append(time.perf_counter() - begin)
    mean = statistics.mean(seconds)
    return {"seconds": mean, "tokens": statistics.mean(tokens), "asked": 1.0, "bytes a token": 0.0}


def same_tokens(
    engine: Engine, policy: TerminationPolicy, prompts: Sequence[Tensor], answers: Sequence[Tensor]
) -> float:
    """Share of same tokens along the whole model's answers, the first left out, by one process with all blocks."""
    decoder, right, count = EarlyExit(engine.backbone, engine.exits, policy), 0, 0
    for prompt_1T, said_1T in zip(prompts, answers, strict=True):
        steps = list(decoder.decode(prompt_1T, max_new_tokens=said_1T.shape[1], forced_BT=said_1T))
        right += sum(int(step.token_B) == int(token) for step, token in zip(steps[1:], said_1T[0, 1:], strict=True))
        count += said_1T.shape[1] - 1
    return right / max(1, count)


def passages(file: Path) -> list[str]:
    """Long prompts: passages of CoQA, each with its questions and answers up to the last question."""
    return [each.prompt for each in CoQA(file, last_turn_only=True).examples()]


def source_of(given: str) -> Path:
    """Where the model of ``NAME=GIVEN`` is."""
    source, _ = find_source(given.rpartition(":")[0] if re.search(r":[\d,]+$", given) else given)
    assert isinstance(source, FolderSource), "a model in a folder"
    return source.folder()


def one_model(name: str, given: str, args: argparse.Namespace) -> dict[str, Any]:
    """All ways over all networks."""
    whole = opened(given, args.precision)
    assert whole.exits is not None, "heads or exits were given"
    questions = (passages(args.coqa) if args.coqa else asked_questions(args))[: args.prompts]
    prompts = [whole.encode(question) for question in questions]
    ends = whole.options().eos_token_id
    full = Full(whole.backbone)
    answers = [
        torch.tensor([[int(step.token_B) for step in full.decode(each, max_new_tokens=args.tokens, eos_token_id=ends)]])
        for each in prompts
    ]
    levels = [float(level) for level in args.thresholds.split(",")]
    same = {f"collaborative {level}": same_tokens(whole, MaxProb(level), prompts, answers) for level in levels}
    cut = places(whole.exits, whole.backbone.spec.depth, args.at, None)
    model = source_of(given)
    found: dict[str, Any] = {"cut": list(cut.edge), "depth": whole.backbone.spec.depth, "networks": {}, "same": same}
    with tempfile.TemporaryDirectory() as scratch:
        edge, cloud = split(model, whole.exits, cut, Path(scratch) / "parts")
        del whole, full
        listen = ["--precision", args.precision]
        with (
            process(
                "serve", "cloud", "--part", str(cloud), "--address", "127.0.0.1:0", "--log", "false", *listen
            ) as far,
            process(
                "serve",
                "edge",
                *("--backbone", str(model), "--name", "whole", "--address", f"127.0.0.1:{free()}"),
                *listen,
            ) as web,
        ):
            for rtt, mbit in ((float(r), float(m)) for r in args.rtt.split(",") for m in args.mbit.split(",")):
                with slow(far, rtt, mbit) as net, slow(web, rtt, mbit) as net_web:
                    rows = network(edge, net.port, net_web.port, questions, prompts, answers, ends, levels, args)
                found["networks"][f"{rtt:g} ms, {mbit:g} Mbit/s"] = rows
                print(f"{name}, {rtt:g} ms, {mbit:g} Mbit/s\n{table(rows, same)}", flush=True)
    return found


def network(
    edge: Path,
    port: int,
    web: int,
    questions: Sequence[str],
    prompts: Sequence[Tensor],
    answers: Sequence[Tensor],
    ends: Sequence[int],
    levels: Sequence[float],
    args: argparse.Namespace,
) -> dict[str, Row]:
    """All ways over one network; the first answer of each is not counted."""
    rows: dict[str, Row] = {}
    for wire in dict.fromkeys(("float32", args.wire)):
        given = EdgeOptions(str(edge), cloud=f"127.0.0.1:{port}", wire=wire, timeout=120)
        engine, _, link = open_edge(given, args.precision)
        assert link is not None, "a cloud was named"
        made: dict[str, Decoder] = {}
        parts = engine.backbone, engine.exits
        if wire == "float32":
            made["drafting"] = Drafting(*parts, MaxProb(args.draft), link=link)
            made["collaborative, never alone"] = Collaborative(*parts, Never(), link=link)
            made["standalone"] = Standalone(*parts, MaxProb(levels[0]))
        if wire == args.wire:
            made |= {f"collaborative {level}": Collaborative(*parts, MaxProb(level), link=link) for level in levels}
        for name, decoder in made.items():
            edge_row(decoder, link, prompts[:1], args.tokens, ends)
            rows[name] = edge_row(decoder, None if name == "standalone" else link, prompts, args.tokens, ends)
        if wire == "float32":
            rows["naive split"] = naive_row(engine, link, prompts, answers)
        link.close()
    alone_row(web, "whole", questions[:1], args.tokens)
    rows["cloud only"] = alone_row(web, "whole", questions, args.tokens)
    return rows


def free() -> int:
    """A port that nobody listens at."""
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def table(rows: dict[str, Row], same: dict[str, float]) -> str:
    """A line a way."""
    names = ("seconds", "edge", "cloud", "communication", "bytes a token", "asked")
    lines = [f"  {'':28}" + "".join(f"{name:>15}" for name in (*names, "same"))]
    for way, row in rows.items():
        cells = [f"{row[name]:>15.3f}" if name in row else " " * 15 for name in names]
        share = f"{same[way]:>15.3f}" if way in same else " " * 15
        lines.append(f"  {way:28}{''.join(cells)}{share}")
    return "\n".join(lines)


def main() -> None:
    """Split, listen, answer, print the tables, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", required=True)
    parser.add_argument("--questions-file", type=Path, default=None)
    parser.add_argument("--coqa", type=Path, default=None, help="coqa-dev-v1.0.json: long prompts instead of questions")
    parser.add_argument("--skip", type=int, default=240)
    parser.add_argument("--at", type=int, default=None, help="depth of the edge's last exit; left out, the last one's")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rtt", default="5,20,80", help="milliseconds there and back")
    parser.add_argument("--mbit", default="10,100", help="million bits a second")
    parser.add_argument("--thresholds", default="0.8,0.9", help="of MaxProb")
    parser.add_argument("--draft", type=float, default=0.5, help="threshold of MaxProb above which the edge drafts")
    parser.add_argument("--wire", default="float16")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    options = {
        name: value for name, value in vars(args).items() if name not in ("heads", "questions_file", "coqa", "out")
    }
    report: dict[str, Any] = {
        "environment": environment("cpu", dtype="float32", batch=1),
        "options": options,
        "models": {},
    }
    if args.out is not None and args.out.is_file():
        report["models"] = json.loads(args.out.read_text())["models"]
    for given in args.heads:
        name, _, where = given.partition("=")
        report["models"][name] = one_model(name, where, args)
        if args.out is not None:
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
