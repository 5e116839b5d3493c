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
from dynamax.serving.options import EdgeOptions, host_and_port
from dynamax.serving.split import HEADS, load_part
from dynamax.serving.wire import wire_format

TOKEN = "DYNAMAX_TOKEN"
"""Where a bearer token is looked for if no file is given: on a command line others could read it."""


class Opened(NamedTuple):
    """A part of a model, ready to run."""

    backbone: HFBackbone
    part: Part
    choice: Choice | None


def open_part(folder: Path, precision: str | None) -> Opened:
    """Load a part, and hold its weights as asked.

    Raises:
        UserError: If the folder holds no part, or cannot be read.
    """
    backbone = load_part(folder)
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
    check_mode(options)
    held = part_in(folder)
    if held is not None and held.sends is None:
        raise UserError(f"{folder} holds the blocks from {held.span.start} on. Give the folder edge, not cloud.")
    backbone, part, choice = open_part(folder, precision)
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
        return engine, partial(Drafting, link=link, draft_limit=options.draft_limit or 8), link
    return engine, partial(Collaborative, link=link, deadline=options.deadline), link


def check_mode(options: EdgeOptions) -> None:
    """Refuse (UserError) options that the mode has no use for."""
    only = {"deadline": "collaborative", "draft_limit": "drafting"}
    for name, mode in only.items():
        if getattr(options, name) is not None and options.mode != mode:
            raise UserError(f"{name} was given, which is of the mode {mode}; the mode is {options.mode}. Leave it out.")
    if options.mode == "standalone":
        given = [name for name in ("cloud", "token_file", "root") if getattr(options, name) is not None]
        if given:
            raise UserError(f"{' and '.join(given)} was given, but the mode standalone asks no cloud. Leave it out.")
    if options.draft_limit is not None and options.draft_limit < 1:
        raise UserError(f"draft_limit is {options.draft_limit}; it must be at least 1.")
    wire_format(options.wire)
    if options.cloud is not None:
        host_and_port(options.cloud)


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
