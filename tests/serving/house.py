"""The siblings of ``assets`` split in two, a cloud that listens on this machine, and an edge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from torch import Tensor

import dynamax
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.parts import Part, part_in
from dynamax.engine import Engine
from dynamax.heads import ExitBank
from dynamax.serving.cloud import Server
from dynamax.serving.contexts import Limits
from dynamax.serving.link import Link
from dynamax.serving.service import Cloud
from dynamax.serving.split import load_part, places, split

KINDS = ["llama", "mamba2", "granite"]
CUT = 4
PROMPT = "What is the capital of France?"


@cache
def whole(kind: str) -> Engine:
    """The whole model with exits at 2 and 4 of its 8 blocks."""
    return dynamax.load(f"assets/{kind}", exits=[2, 4])


def folders(kind: str, start: int = CUT) -> tuple[Path, Path]:
    """Its edge and its cloud."""
    return _folders(kind, start)


@cache
def _folders(kind: str, start: int) -> tuple[Path, Path]:
    engine = whole(kind)
    assert engine.exits is not None
    cut = places(engine.exits, engine.backbone.spec.depth, CUT, start)
    return split(Path(f"assets/{kind}"), engine.exits, cut, Path(mkdtemp()) / "parts")


def part_of(folder: Path) -> Part:
    """What a folder holds."""
    part = part_in(folder)
    assert part is not None
    return part


def cloud_part(kind: str, start: int = CUT) -> tuple[HFBackbone, Part]:
    """The cloud's blocks."""
    return _cloud_part(kind, start)


@cache
def _cloud_part(kind: str, start: int) -> tuple[HFBackbone, Part]:
    folder = folders(kind, start)[1]
    return load_part(folder), part_of(folder)


def edge_part(kind: str, start: int = CUT) -> tuple[HFBackbone, ExitBank, Part]:
    """The edge's blocks and exits."""
    return _edge_part(kind, start)


@cache
def _edge_part(kind: str, start: int) -> tuple[HFBackbone, ExitBank, Part]:
    folder = folders(kind, start)[0]
    backbone = load_part(folder)
    return backbone, ExitBank.load(folder / "heads", backbone.site), part_of(folder)


@contextmanager
def cloud(kind: str, start: int = CUT, *, limits: Limits | None = None, **options: Any) -> Iterator[Server]:
    """A cloud that listens, as long as it is needed."""
    server = Server(Cloud(*cloud_part(kind, start), limits, **options))
    server.start()
    try:
        yield server
    finally:
        server.stop(0.2)


@contextmanager
def link(kind: str, port: int, start: int = CUT, **options: Any) -> Iterator[Link]:
    """A connection to it."""
    made = Link(f"127.0.0.1:{port}", edge_part(kind, start)[2], **options)
    try:
        yield made
    finally:
        made.close()


def prompt(kind: str, text: str = PROMPT) -> Tensor:
    """Token ids of a question."""
    return whole(kind).encode(text)


def tokens(decoder: Any, prompt_1T: Tensor, count: int = 32) -> tuple[list[int], list[int]]:  # noqa: ANN401
    """Tokens and depths of an answer."""
    steps = list(decoder.decode(prompt_1T, max_new_tokens=count))
    return [int(step.token_B) for step in steps], [step.depth for step in steps]
