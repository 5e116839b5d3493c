"""Memory of a whole model, of its edge and of its cloud, each a process of its own; and of a cloud over many sessions.

    python -m benchmarks.edge_memory [--heads NAME=FOLDER [NAME=MODEL:DEPTHS ...]] [--at DEPTH] [--layers 24]
                                     [--sessions 1000] [--precision auto] [--out FILE]

- ``whole``: ``dynamax serve edge --backbone``, ``edge``: ``dynamax serve edge --edge.folder`` by itself, ``cloud``:
  ``dynamax serve cloud``. Each gives one answer; then its resident memory is read, and the most that it ever was.
  ``bare`` is the first with a model of 2 million weights: what Python and the libraries take.
- ``--layers`` adds a Llama of so many blocks of width 2560 with random weights: 24 are 2 billion.
- ``sessions``: the cloud's resident memory while so many sessions are opened, each with 32 positions and a token; every
  second one is closed, the others are left behind.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.edge_cloud import free, process, source_of
from benchmarks.ways_to_leave import opened
from dynamax.backbones.parts import Part, part_in
from dynamax.metrics.environment import environment
from dynamax.serving.link import Link
from dynamax.serving.split import places, split

TOKENIZER = Path("assets/llama")
Sizes = dict[str, float]


def random_model(folder: Path, layers: int) -> Path:
    """A folder with a Llama of random weights in float16, one file a block."""
    config = LlamaConfig(
        hidden_size=2560,
        intermediate_size=6912,
        num_attention_heads=32,
        num_key_value_heads=32,
        num_hidden_layers=layers,
        vocab_size=32000,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    )
    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in AutoModelForCausalLM.from_config(config).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{block}.safetensors", []).append(name)
    for file, names in files.items():
        save_file({name: (0.02 * torch.randn(shapes[name])).half() for name in names}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def memory_of(port: int) -> Sizes:
    """Megabytes of the process that listens at a port: now, and at most."""
    found = next(
        each
        for each in psutil.Process().children()
        if any(one.laddr.port == port and one.status == psutil.CONN_LISTEN for one in each.net_connections())
    )
    most = next(line for line in Path(f"/proc/{found.pid}/status").read_text().splitlines() if "VmHWM" in line)
    return {"now": found.memory_info().rss / 1e6, "most": int(most.split()[1]) * 1024 / 1e6}


def ask(port: int) -> None:
    """One answer of an endpoint."""
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    asked = {"model": "measured", "messages": turns, "max_tokens": 16, "temperature": 0}
    with httpx2.Client(timeout=600, transport=httpx2.HTTPTransport(retries=10)) as client:  # it may not listen yet
        client.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked).raise_for_status()


@contextmanager
def endpoint(*given: str) -> Iterator[int]:
    """``dynamax serve edge``, which has answered once."""
    with process("serve", "edge", "--name", "measured", "--address", f"127.0.0.1:{free()}", *given) as port:
        ask(port)
        yield port


def session(link: Link, width: int, *, closed: bool) -> None:
    """Open one, send 32 positions, ask for a token, and close it or leave it behind."""
    link.begin()
    link.send(torch.randn(32, width))
    link.next()
    if closed:
        link.end()
    else:
        link._sent.session = None  # as if the edge had died


def over_sessions(port: int, part: Part, count: int) -> Sizes:
    """The cloud's megabytes after some sessions, and after all."""
    assert part.sends is not None, "an edge's part"
    link, sizes = Link(f"127.0.0.1:{port}", part, timeout=60), {}
    for number in range(count + 1):
        if number in (count // 10, count // 2, count):
            sizes[str(number)] = memory_of(port)["now"]
        session(link, part.width, closed=bool(number % 2))
    link.close()
    return sizes


def one_model(given: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The three processes, and the cloud's sessions."""
    whole = opened(given, args.precision)
    assert whole.exits is not None, "heads or exits were given"
    cut, source = places(whole.exits, whole.backbone.spec.depth, args.at, None), source_of(given)
    edge, cloud = split(source, whole.exits, cut, scratch / "parts")
    depth = whole.backbone.spec.depth
    del whole
    held = ["--precision", args.precision]
    found: dict[str, Any] = {"cut": list(cut.edge), "depth": depth}
    with endpoint("--backbone", str(source), *held) as port:
        found["whole"] = memory_of(port)
    alone = ["--edge.mode", "standalone", "--policy", "MaxProb", "--policy.threshold", "0.8"]
    with endpoint("--edge.folder", str(edge), *alone, *held) as port:
        found["edge"] = memory_of(port)
    limits = ["--sessions", "16", "--idle", "0", "--log", "false"]
    address = f"127.0.0.1:{free()}"
    with process("serve", "cloud", "--part", str(cloud), "--address", address, *limits, *held) as port:
        part = part_in(edge)
        assert part is not None, "split wrote it"
        found["sessions"] = over_sessions(port, part, args.sessions)
        found["cloud"] = memory_of(port)
    return found


def report_on(name: str, found: dict[str, Any], bare: Sizes) -> str:
    """What was found, in lines."""
    grown = ", ".join(f"{size:.0f} after {count}" for count, size in found["sessions"].items())
    sizes = ", ".join(
        f"{each} {found[each]['now']:.0f} MB (at most {found[each]['most']:.0f})" for each in ("whole", "edge", "cloud")
    )
    share = found["edge"]["now"] / found["whole"]["now"]
    less = (found["edge"]["now"] - bare["now"]) / (found["whole"]["now"] - bare["now"])
    return (
        f"{name}, {found['cut'][1]} of {found['depth']} blocks: {sizes}; the edge takes {share:.0%} of the whole, "
        f"without the libraries {less:.0%}\n  the cloud over sessions, MB: {grown}"
    )


def main() -> None:
    """Measure, print, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="*", default=[])
    parser.add_argument("--at", type=int, default=None, help="depth of the edge's last exit; left out, the last one's")
    parser.add_argument("--layers", type=int, default=0, help="blocks of a model with random weights; 0 for none")
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": environment("cpu", dtype="float32", batch=1), "models": {}}
    if args.out is not None and args.out.is_file():
        report["models"] = json.loads(args.out.read_text())["models"]
    with endpoint("--backbone", str(TOKENIZER)) as port:
        report["bare"] = bare = memory_of(port)
    with tempfile.TemporaryDirectory() as scratch:
        models = dict(given.split("=", 1) for given in args.heads)
        if args.layers:
            made = random_model(Path(scratch) / "random", args.layers)
            models[f"random, {args.layers} blocks"] = f"{made}:{args.layers // 2}"
        for name, given in models.items():
            found = one_model(given, args, Path(tempfile.mkdtemp(dir=scratch)))
            report["models"][name] = found
            print(report_on(name, found, bare), flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
