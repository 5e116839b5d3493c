"""The user's cache folder, in which a folder exists whole or not at all. Knows nothing of models."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from dynamax.errors import UserError
from dynamax.files import whole_folder


def cache_folder() -> Path:
    """``$DYNAMAX_CACHE``, else ``$XDG_CACHE_HOME/dynamax``, else ``~/.cache/dynamax``; made if need be."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DYNAMAX_CACHE") or Path(base) / "dynamax")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def made_once(name: str, make: Callable[[Path], None], *, room: int) -> Path:
    """A folder of the cache: the one that is there, else a new one, which appears when it is complete.

    An interrupted ``make`` leaves nothing that a later call would take for the folder.

    Args:
        name: Name of the folder; tells apart what must not be mixed up.
        make: Fills an empty folder.
        room: Bytes that ``make`` will write, scratch included.

    Raises:
        UserError: If the disk has not that much room.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < room:
        raise UserError(no_room(target, f"{free / 1e6:.0f} MB are free and {room / 1e6:.0f} MB are needed"))
    with whole_folder(target) as fresh:
        try:
            make(fresh)
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(no_room(target, str(error))) from error
    return target


def no_room(target: Path, reason: str) -> str:
    """The message for a full disk."""
    return (
        f"{target} could not be written: {reason}. Make room there, or set the environment variable "
        f"DYNAMAX_CACHE to a folder on a larger disk."
    )
