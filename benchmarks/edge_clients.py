"""How many clients one cloud serves, with edges that answer what their exits are sure of, and without.

    python -m benchmarks.edge_clients --heads NAME=FOLDER [NAME=MODEL:DEPTHS ...] --questions-file FILE
                                      [--at DEPTH] [--threshold 0.8] [--clients 1,2,4,8,16,32] [--answers 3]
                                      [--tokens 32] [--rtt 20] [--mbit 100] [--precision auto] [--out FILE]

Each client asks for one answer after the other. The cloud has one core, all clients and the network another.

- ``edges``: answers of a real edge are recorded, with what it sent, asked, and computed in between; then each client
  replays them over its own connection to ``dynamax serve cloud``, and sleeps where the edge computed.
- ``cloud only``: the whole model with as many rows side by side (``Scheduler``), in one process: nothing is sent, and
  one round trip is added to each answer.

Printed: seconds an answer, by number of clients; from them the number at which an answer takes a given time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.edge_cloud import free, process, slow, source_of
from benchmarks.frontier import asked_questions
from benchmarks.ways_to_leave import opened
from dynamax.backbones.parts import Part, part_in
from dynamax.decoding.batching import Scheduler
from dynamax.decoding.full import Full
from dynamax.engine import Engine
from dynamax.metrics.environment import environment
from dynamax.policies import MaxProb
from dynamax.serving.edge import Collaborative
from dynamax.serving.link import Link
from dynamax.serving.opening import EdgeOptions, open_edge
from dynamax.serving.split import places, split

CLOUD_CORE, CLIENT_CORE = 0, 1
LEVELS = (0.5, 1.0, 2.0, 4.0)
"""Seconds an answer, at which clients are counted."""


@dataclass
class Event:
    """What an edge did next.

    Attributes:
        pause: Seconds that it computed before.
        h_TW: Positions that it sent; None where it asked for a token.
    """

    pause: float
    h_TW: Tensor | None


@dataclass
class Recorded:
    """An answer, as a link saw it.

    Attributes:
        wanted: Positions that prompt and answer may have.
        events: What was done, in turn.
        rest: Seconds that the edge computed after the last event.
        tokens: Tokens of the answer.
    """

    wanted: int
    events: list[Event] = field(default_factory=list)
    rest: float = 0.0
    tokens: int = 0


class Recorder:
    """Stands before a link and writes down what goes over it."""

    def __init__(self, link: Link) -> None:
        self._link, self.start, self.exact = link, link.start, link.exact
        self.answer = Recorded(0)
        self._since = 0.0

    def begin(self, wanted: int = 0) -> None:
        """As of a link."""
        self.answer, self._since = Recorded(wanted), time.perf_counter()
        self._link.begin(wanted)

    def end(self) -> None:
        """As of a link."""
        self.answer.rest = time.perf_counter() - self._since
        self._link.end()

    def send(self, h_TW: Tensor) -> None:
        """As of a link; what is sent is kept."""
        now = time.perf_counter()
        self.answer.events.append(Event(now - self._since, h_TW))
        self._link.send(h_TW)
        self._since = time.perf_counter()

    def next(self, drafts: Sequence[int] = (), timeout: float | None = None) -> tuple[list[int], int]:
        """As of a link."""
        self.answer.events.append(Event(time.perf_counter() - self._since, None))
        found = self._link.next(drafts, timeout)
        self._since = time.perf_counter()
        return found


def record(edge: Path, port: int, prompts: Sequence[Tensor], ends: Sequence[int], args: Any) -> list[Recorded]:  # noqa: ANN401
    """Answers of an edge; the first is read twice, and the second time counts."""
    given = EdgeOptions(str(edge), cloud=f"127.0.0.1:{port}", wire=args.wire, timeout=120)
    engine, _, link = open_edge(given, args.precision)
    assert link is not None, "a cloud was named"
    seen = Recorder(link)
    decoder = Collaborative(engine.backbone, engine.exits, MaxProb(args.threshold), link=seen)  # type: ignore[arg-type]
    found = []
    for prompt_1T in (prompts[0], *prompts):
        count = len(list(decoder.decode(prompt_1T, max_new_tokens=args.tokens, eos_token_id=ends)))
        seen.answer.tokens = count
        found.append(seen.answer)
    link.close()
    return found[1:]


def replay(link: Link, answer: Recorded) -> float:
    """One answer once more; its seconds."""
    begin = time.perf_counter()
    link.begin(answer.wanted)
    for event in answer.events:
        time.sleep(event.pause)
        if event.h_TW is None:
            link.next()
        else:
            link.send(event.h_TW)
    time.sleep(answer.rest)
    link.end()
    return time.perf_counter() - begin


def edges(count: int, port: int, part: Part, answers: list[Recorded], args: Any) -> list[float]:  # noqa: ANN401
    """Seconds of each answer, with so many clients at once; the first of each client is not counted."""
    seconds: list[float] = []

    def client(number: int) -> None:
        link = Link(f"127.0.0.1:{port}", part, format=args.wire, timeout=120)
        for place in range(args.answers + 1):
            spent = replay(link, answers[(number + place) % len(answers)])
            if place:
                seconds.append(spent)
        link.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def cloud_only(count: int, engine: Engine, prompts: Sequence[Tensor], ends: tuple[int, ...], args: Any) -> list[float]:  # noqa: ANN401
    """The same of the whole model, as many rows side by side."""
    scheduler = Scheduler(Full(engine.backbone), count)
    seconds: list[float] = []
    begun: dict[int, tuple[int, int, float]] = {}

    def submit(client: int, place: int) -> None:
        options: dict[str, Any] = {"max_new_tokens": args.tokens, "eos_token_id": ends}
        ticket = scheduler.submit(prompts[(client + place) % len(prompts)], **options)
        begun[ticket] = client, place, time.perf_counter()

    for client in range(count):
        submit(client, 0)
    while scheduler.busy:
        for told in scheduler.step():
            if told.ended:
                client, place, begin = begun.pop(told.ticket)
                if place:
                    seconds.append(time.perf_counter() - begin + args.rtt / 1000)
                if place < args.answers:
                    submit(client, place + 1)
    return seconds


def clients_at(level: float, curve: dict[int, float]) -> float | None:
    """How many clients wait so long for an answer, between those that were measured; None if it lies outside."""
    counts = sorted(curve)
    for less, more in zip(counts, counts[1:], strict=False):
        if curve[less] <= level <= curve[more]:
            return less + (more - less) * (level - curve[less]) / (curve[more] - curve[less])
    return None


def one_model(name: str, given: str, args: Any) -> dict[str, Any]:  # noqa: ANN401
    """Both curves."""
    torch.set_num_threads(1)
    whole = opened(given, args.precision)
    assert whole.exits is not None, "heads or exits were given"
    questions = asked_questions(args)[: args.prompts]
    prompts, ends = [whole.encode(question) for question in questions], whole.options().eos_token_id
    counts = [int(count) for count in args.clients.split(",")]
    cut = places(whole.exits, whole.backbone.spec.depth, args.at, None)
    source = source_of(given)
    alone: dict[int, float] = {}
    os.sched_setaffinity(0, {CLOUD_CORE})
    for count in counts:
        alone[count] = statistics.mean(cloud_only(count, whole, prompts, ends, args))
        print(f"{name}, cloud only, {count} clients: {alone[count]:.3f} s an answer", flush=True)
    both: dict[int, float] = {}
    load: dict[int, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        edge, cloud = split(source, whole.exits, cut, Path(scratch) / "parts")
        del whole
        os.sched_setaffinity(0, {CLIENT_CORE})
        listen = ["--part", str(cloud), "--address", f"127.0.0.1:{free()}", "--log", "false"]
        with process("serve", "cloud", *listen, "--precision", args.precision, "--sessions", str(max(counts))) as port:
            server = next(p for p in psutil.Process().children() if "cloud" in p.cmdline())
            for thread in server.threads():
                psutil.Process(thread.id).cpu_affinity([CLOUD_CORE])
            answers = record(edge, port, prompts, ends, args)
            part = part_in(edge)
            assert part is not None, "split wrote it"
            for count in counts:
                with slow(port, args.rtt, args.mbit) as net:
                    begin, spent, mine = time.perf_counter(), server.cpu_times(), time.process_time()
                    both[count] = statistics.mean(edges(count, net.port, part, answers, args))
                    wall = time.perf_counter() - begin
                    used = sum(server.cpu_times()[:2]) - sum(spent[:2])
                    load[count] = used / wall, (time.process_time() - mine) / wall
                cores = f"the cloud's core {load[count][0]:.0%}, the clients' {load[count][1]:.0%}"
                print(f"{name}, edges, {count} clients: {both[count]:.3f} s an answer; {cores}", flush=True)
    asks = sum(event.h_TW is None for each in answers for event in each.events)
    asked = asks / sum(each.tokens for each in answers)
    found = {"cut": list(cut.edge), "asked": asked, "cloud only": alone, "edges": both, "load": load, "at": {}}
    for level in LEVELS:
        few, many = clients_at(level, alone), clients_at(level, both)
        if few and many:
            found["at"][level] = {"cloud only": few, "edges": many, "ratio": many / few}
            print(f"{name}, at {level:g} s an answer: {few:.1f} clients, with edges {many:.1f}, {many / few:.2f} times")
    return found


def main() -> None:
    """Measure, print, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", required=True)
    parser.add_argument("--questions-file", type=Path, default=None)
    parser.add_argument("--skip", type=int, default=240)
    parser.add_argument("--at", type=int, default=None, help="depth of the edge's last exit; left out, the last one's")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--answers", type=int, default=3, help="answers of each client that count")
    parser.add_argument("--clients", default="1,2,4,8,16,32")
    parser.add_argument("--rtt", type=float, default=20.0, help="milliseconds there and back")
    parser.add_argument("--mbit", type=float, default=100.0, help="million bits a second")
    parser.add_argument("--threshold", type=float, default=0.8, help="of MaxProb")
    parser.add_argument("--wire", default="float16")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name not in ("heads", "questions_file", "out")}
    facts = environment("cpu", dtype="float32", batch=1)
    report: dict[str, Any] = {"environment": facts, "options": options, "models": {}}
    if args.out is not None and args.out.is_file():
        report["models"] = json.loads(args.out.read_text())["models"]
    for given in args.heads:
        name, _, where = given.partition("=")
        report["models"][name] = {"options": options, **one_model(name, where, args)}
        if args.out is not None:
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
