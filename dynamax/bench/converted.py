"""Copies of a model in other programs' formats: made once, kept in the user's cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dynamax.backbones.checkpoint import Checkpoint, fingerprint_of
from dynamax.backbones.downloads import made_once
from dynamax.backbones.loading import read_config
from dynamax.bench.outline import outline


def converted(folder: Path, kind: str, make: Callable[[Path], None], *, bytes_per_weight: float) -> Path:
    """A copy of a model, made now if it is not there.

    Args:
        folder: The model in transformers' layout.
        kind: Format and version of the copy; part of its name.
        make: Fills an empty folder.
        bytes_per_weight: Greatest size of one weight on the disk, scratch included.

    Returns:
        The folder that ``make`` filled.

    Raises:
        UserError: If the disk has not that much room.
    """
    name = f"bench/{fingerprint_of(read_config(folder), Checkpoint(folder))}-{kind}"
    return made_once(name, make, room=int(bytes_per_weight * outline(folder).weights))
