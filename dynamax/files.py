"""Files and folders that are there as a whole or not at all, and where the user's cache is."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynamax.errors import UserError, shown


def cache_folder() -> Path:
    """``$DYNAMAX_CACHE``, else ``$XDG_CACHE_HOME/dynamax``, else ``~/.cache/dynamax``; made if need be."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DYNAMAX_CACHE") or Path(base) / "dynamax")
    check_folder(folder, "The cache", "DYNAMAX_CACHE")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_folder(folder: str | Path, what: str, option: str) -> None:
    """Refuse a folder that could not be written to, before the work that would be lost. Nothing is made.

    Args:
        folder: It need not be there yet.
        what: What is written there, for the message.
        option: What names it.

    Raises:
        UserError: If a file or a link to nowhere lies in the way, or it is not allowed.
    """
    there = Path(folder).expanduser()
    try:
        while not os.path.lexists(there):
            there = there.parent
    except (OSError, ValueError) as error:
        raise UserError(f"{what} goes to {shown(folder)}, which is no path: {error}. Change {option}.") from error
    if not there.is_dir():
        raise UserError(
            f"{what} goes to {folder}, but {there} is no folder. Change {option}, or move away what lies there."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{what} goes to {folder}, but {there} cannot be written to. Change {option}.")


def read_mapping(file: Path) -> dict[str, Any]:
    """The names and values in a JSON file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds anything else, with what is wrong in words.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except RecursionError:
        raise ValueError("its lists or mappings lie too deep in one another") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds {shown(json.dumps(content), 40)}, and not names with values")
    return content


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that at every moment its name leads to the old one or the new one, whole.

    The content reaches the disk before the name does. Nothing is left behind if it fails, as on a full disk.
    """
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb", buffering=0) as stream:
            rest = memoryview(content)
            while rest:
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        part.replace(file)
    except Exception:
        part.unlink(missing_ok=True)
        raise
    handle = os.open(file.parent, os.O_RDONLY)
    try:  # the name, too, reaches the disk
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``target`` once it is complete.

    An interruption leaves nothing behind. If another process was faster, its folder stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        yield fresh
        try:
            os.replace(fresh, target)
        except OSError:
            if not target.is_dir():
                raise
