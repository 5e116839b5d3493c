"""The store on SmolLM2: cost of filling beside the bare forward pass, speed of reading, survival of kill -9.

    python -m benchmarks.store [--rounds 7] [--kills 3] [--dtype float32] [--out benchmarks/results/store.json]

Filling and the bare pass (all blocks, and float32 logits of every token) run in turn, on the same
batches of the shipped passages. Reading hands out padded batches of 8 documents in random order;
"cold" reads come after the system was asked to drop the files from its cache. A child process is
killed at random moments and started again until it is done; its store is compared with an
uninterrupted one byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dynamax.backbones.sources import Folder, SmolLM2
from dynamax.data.batch import LengthBuckets, collate
from dynamax.data.fill import StoreWriter, fill_store, locked
from dynamax.data.generated import passages
from dynamax.data.states import LOGITS, batches
from dynamax.data.store import Manifest, Store
from dynamax.data.text import Document, TextSource, windows
from dynamax.engine import Engine, load
from dynamax.metrics.environment import environment
from dynamax.types import Site, Span

EXITS = [15, 19, 23, 27]
GROUP = 4
READ_BYTES = 256 << 20
ROOT = Path(__file__).parents[1]


class PassageText(TextSource):
    """The shipped passages, some to a group."""

    def identity(self) -> dict[str, Any]:
        """See ``TextSource``."""
        return {"source": "PassageText"}

    def count(self) -> int:
        """See ``TextSource``."""
        return len(range(0, len(passages()), GROUP))

    def groups(self, engine: Engine, *, skip: int = 0) -> Iterator[list[Document]]:
        """See ``TextSource``."""
        texts = [passage.passage for passage in passages()]
        for start in range(GROUP * skip, len(texts), GROUP):
            group = texts[start : start + GROUP]
            yield [document for text in group for document in windows(text, engine, length=256)]


class StoreBench:
    """A backbone, its tokenizer, and folders that go away."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        source = SmolLM2() if args.model is None else Folder(args.model)
        self.engine = load(source, dtype=args.dtype, device=args.device)
        self.backbone = self.engine.backbone
        self.device, self.scratch = torch.device(args.device), scratch
        self.readout: Site | None = None
        if args.dtype != "float32":
            self.readout = source.output_stage(dtype="float32", device=args.device).site(self.backbone.spec.depth)

    def fill(self, name: str, **options: Any) -> Store:  # noqa: ANN401 - those of fill_store
        """Fill ``scratch/name``."""
        folder = self.scratch / name
        return fill_store(folder, self.engine, PassageText(), EXITS, readout=self.readout, progress=False, **options)

    @torch.inference_mode()
    def bare(self) -> None:
        """Blocks and float32 logits for the same batches, and nothing else."""
        site = self.readout or self.backbone.site(self.backbone.spec.depth)
        for group in PassageText().groups(self.engine):
            lengths = [len(document.tokens) for document in group]
            for batch in batches(lengths):
                longest = max(lengths[index] for index in batch)
                rows = [group[index].tokens + [0] * (longest - lengths[index]) for index in batch]
                live_BT = torch.tensor([[t < lengths[index] for t in range(longest)] for index in batch])
                tokens_BT = torch.tensor(rows, device=self.device)
                h_BTD = self.backbone.run(self.backbone.embed(tokens_BT), Span(0, self.backbone.spec.depth))
                h_ND = h_BTD[live_BT.to(self.device)]
                for part_ND in (h_ND if self.readout is None else h_ND.float()).split(
                    LOGITS // self.backbone.spec.vocab
                ):
                    site.project(site.normalize(part_ND[None]))
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def measure_writing(bench: StoreBench, rounds: int) -> dict[str, Any]:
    """A bare pass and filling, in turn; each round after the first counts."""
    bares, fills = [], []
    for number in range(rounds + 1):
        runs = [(bares, bench.bare), (fills, lambda name=f"round-{number}": bench.fill(name))]
        for times, run in runs if number % 2 else reversed(runs):
            times.append(seconds(run))
    store = bench.fill("round-0")
    (bare, bare_cpu), (fill, fill_cpu) = (
        [statistics.median(column) for column in zip(*times[1:], strict=True)] for times in (bares, fills)
    )
    pairs = zip(bares[1:], fills[1:], strict=True)
    return {
        "tokens": store.tokens,
        "bytes_per_token": store.bytes / store.tokens,
        "bare_tokens_per_s": store.tokens / bare,
        "filled_tokens_per_s": store.tokens / fill,
        "overhead_percent": 100 * (fill / bare - 1),
        "overhead_percent_processor_time": 100 * (fill_cpu / bare_cpu - 1),
        "overhead_percent_rounds": [round(100 * (filled[0] / bared[0] - 1), 2) for bared, filled in pairs],
    }


def measure_reading(bench: StoreBench, rounds: int) -> dict[str, Any]:
    """Documents and megabytes a second, warm and cold, from a store of some size."""
    folder = grown(bench.fill("round-0"), bench.scratch / "large")
    reads = {"warm": [read(folder)[0] for _ in range(rounds + 1)][1:]}
    reads["cold"] = [read(dropped(folder))[0] for _ in range(rounds)]
    _, documents, size = read(folder)
    return {
        "bytes": size,
        "documents": documents,
        **{f"{kind}_documents_per_s": documents / statistics.median(times) for kind, times in reads.items()},
        **{f"{kind}_mb_per_s": size / 1e6 / statistics.median(times) for kind, times in reads.items()},
    }


def grown(store: Store, folder: Path) -> Path:
    """A store with the same documents over and over."""
    documents = [store[index] for index in range(len(store))]
    with locked(folder):
        writer = StoreWriter(folder, Manifest(store.manifest.inputs))
        while sum(shard.bytes for shard in writer.manifest.shards) < READ_BYTES:
            writer.write(documents, (writer.manifest.next_group, writer.manifest.next_group + 1))
        writer.finish()
    return folder


def dropped(folder: Path) -> Path:
    """The folder, after asking the system to forget what it has cached of it."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return folder


def read(folder: Path) -> tuple[float, int, int]:
    """Seconds to hand out every document once in padded batches; how many, and their size on disk."""
    start = time.perf_counter()
    store = Store(folder)
    for batch in LengthBuckets(store.lengths().tolist(), batch_size=8, seed=0):
        collate([store[number] for number in batch], batch)
    return time.perf_counter() - start, len(store), store.bytes


def measure_kills(bench: StoreBench, args: argparse.Namespace) -> dict[str, Any]:
    """Kill a filling process ``args.kills`` times, let the last one end, compare with an uninterrupted store."""
    whole = bench.fill("uninterrupted", shard_bytes=1 << 20)
    folder, draw, left = bench.scratch / "killed", random.Random(args.seed), []
    own = ["--dtype", args.dtype, "--device", args.device, "--threads", str(args.threads)]
    model = [] if args.model is None else ["--model", args.model]
    command = [sys.executable, str(Path(__file__)), "--child", str(folder), *own, *model]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(args.kills):
        before = len(list(folder.glob("*/shard-*")))
        child = subprocess.Popen(command, env=environment)
        while child.poll() is None and len(list(folder.glob("*/shard-*"))) == before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 1.5))
        child.send_signal(signal.SIGKILL)
        if child.wait() == 0:
            break
        left.append(len(list(folder.glob("*/shard-*"))))
    subprocess.run(command, env=environment, check=True)
    return {"kills": len(left), "shards_after_kill": left, "shards": len(whole.manifest.shards),
            "same_bytes": contents(folder / whole.folder.name) == contents(whole.folder)}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store but its lock."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "lock"}


def table(report: dict[str, dict[str, Any]]) -> str:
    """The figures as text."""
    write, reading, kills = report["write"], report["read"], report["kill"]
    lines = [
        f"bare forward pass      {write['bare_tokens_per_s']:10,.0f} tokens/s",
        f"filling the store      {write['filled_tokens_per_s']:10,.0f} tokens/s, {write['bytes_per_token']:,.0f} bytes",
        f"overhead               {write['overhead_percent']:10.1f} % of the bare pass in wall time, "
        f"{write['overhead_percent_processor_time']:.1f} % in processor time (medians)",
        *(
            f"read, {kind}             {reading[f'{kind}_documents_per_s']:10,.0f} documents/s, "
            f"{reading[f'{kind}_mb_per_s']:,.0f} MB/s"
            for kind in ("warm", "cold")
        ),
        f"killed with kill -9    {kills['kills']:10} times, with {kills['shards_after_kill']} of {kills['shards']} "
        f"shards whole; the same bytes in the end: {'yes' if kills['same_bytes'] else 'NO'}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", default=None, help="a local model folder in place of SmolLM2")
    parser.add_argument("--scratch", default=None, help="where to write; the system's temporary folder if left out")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--child", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child is not None:
        StoreBench(args, args.child.parent).fill(args.child.name, shard_bytes=1 << 20)
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        bench = StoreBench(args, Path(scratch))
        report = {
            "environment": {
                **environment(args.device, dtype=args.dtype, batch=8),
                "cores": os.cpu_count(),
                "load": os.getloadavg()[0],
            },
            "write": measure_writing(bench, args.rounds),
            "read": measure_reading(bench, args.rounds),
            "kill": measure_kills(bench, args),
        }
    print(table(report))
    print(json.dumps(report))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
