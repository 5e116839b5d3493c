"""``dynamax report RUN...``: what runs found, as one page. Knows files, no models."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from dynamax.errors import UserError
from dynamax.files import write_atomically
from dynamax.report.page import page
from dynamax.report.read import read_runs

USAGE = "RUN... [--out FILE], where each RUN is a folder that `dynamax test` wrote, such as runs/demo"


def main(arguments: Sequence[str]) -> None:
    """Parse, read, write."""
    folders: list[str] = []
    options: dict[str, str] = {}
    words = iter(arguments[1:])
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            folders.append(word)
        elif name == "--out" and name not in options and (value := value if equals else next(words, "")):
            options["out"] = value
        else:
            raise UserError(f"dynamax report was given {word}; wanted: {USAGE}. Correct it.")
    report(folders, **options, command=shlex.join(["dynamax", *arguments]))


def report(runs: Sequence[str], out: str = "report.html", *, command: str) -> None:
    """Write the page of some runs.

    Args:
        runs: Folders that ``dynamax test`` wrote.
        out: File that is written, HTML that needs no other file and no network.
        command: The command line, for the page.
    """
    if not runs:
        raise UserError(f"dynamax report was given no run; wanted: {USAGE}. Name one.")
    place = Path(out).expanduser()
    if not place.parent.is_dir() or place.is_dir():
        raise UserError(f"{out} cannot be written: it is a folder, or its folder does not exist. Change --out.")
    content = page(read_runs(runs), command)
    write_atomically(place, content.encode("utf-8", "replace"))
    print(f"Wrote {out}")
