"""Files that are replaced as a whole. Knows nothing of what they hold."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that at every moment either the old one or the new one stands under its name, whole.

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
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's names durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
