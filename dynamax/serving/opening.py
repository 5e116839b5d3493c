"""From folders and addresses to what runs: a cloud that listens, an edge that answers."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.loading import read_generation_config, read_tokenizer
from dynamax.backbones.parts import Part, part_in
from dynamax.backbones.precision import Choice, set_precision
from dynamax.decoding.base import DecoderFactory
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.paths import InputPath
from dynamax.serving.edge import Collaborative, Drafting, Standalone
from dynamax.serving.link import Link
from dynamax.serving.options import EdgeOptions
from dynamax.serving.split import HEADS, load_part

TOKEN = "DYNAMAX_TOKEN"
"""Where a bearer token is looked for if no file is given: on a command line others could read it."""


class Opened(NamedTuple):
    """A part of a model, ready to run."""

    backbone: HFBackbone
    part: Part
    choice: Choice | None


def open_part(folder: Path, precision: str | None, device: str = "cpu", dtype: str = "float32") -> Opened:
    """Load a part, and hold its weights as asked.

    Raises:
        UserError: If the folder holds no part, or cannot be read.
    """
    backbone = load_part(folder, dtype, device)
    part = part_in(folder)
    assert part is not None, "it was loaded"
    return Opened(backbone, part, None if precision is None else set_precision(backbone, precision))


def open_edge(options: EdgeOptions, precision: str | None = "auto") -> tuple[Engine, DecoderFactory, Link | None]:
    """An engine over the edge's blocks, the decoder of the mode, and the connection to the cloud if there is one.

    Raises:
        UserError: If the folder is no edge's, or the mode needs a cloud and none is given.
    """
    folder = Path(str(options.folder)).expanduser()
    if options.mode != "standalone" and options.cloud is None:
        raise UserError(
            f"The mode {options.mode} asks a cloud, and none was given. Give its address, HOST:PORT, or choose the "
            f"mode standalone."
        )
    if options.deadline is not None and options.mode != "collaborative":
        raise UserError(f"A deadline was given, which is of the mode collaborative; the mode is {options.mode}.")
    backbone, part, choice = open_part(folder, precision)
    if part.span.start != 0:
        raise UserError(f"{folder} holds the blocks from {part.span.start} on. Give the folder edge, not cloud.")
    exits = ExitBank.load(folder / HEADS, backbone.site)
    engine = Engine(backbone, read_tokenizer(folder), exits, read_generation_config(folder), choice)
    if options.mode == "standalone" or options.cloud is None:
        return engine, Standalone, None
    link = Link(
        options.cloud,
        part,
        format=options.wire,
        token=token_in(options.token_file),
        root=None if options.root is None else Path(str(options.root)),
        timeout=options.timeout,
    )
    if options.mode == "drafting":
        return engine, partial(Drafting, link=link, draft_limit=options.draft_limit), link
    return engine, partial(Collaborative, link=link, deadline=options.deadline), link


def token_in(file: InputPath | None) -> str | None:
    """A bearer token: from a file, else from the environment; None if there is none.

    Raises:
        UserError: If the file cannot be read, or is empty.
    """
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        found = Path(str(file)).read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"The token file {file} cannot be read: {error}. Give a file that holds the token.") from error
    if not found:
        raise UserError(f"The token file {file} is empty. Write the token into it.")
    return found


def tokens_in(file: InputPath | None) -> list[str]:
    """The bearer tokens that a cloud knows: a line each; or the environment's.

    Raises:
        UserError: If the file cannot be read, or is empty.
    """
    found = token_in(file)
    return [] if found is None else [line.strip() for line in found.splitlines() if line.strip()]
