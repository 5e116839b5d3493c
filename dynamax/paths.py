"""Paths of what is read and written, as options. Knows jsonargparse and files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from jsonargparse._paths import _current_path_dir  # the folder of the file that is being parsed; None outside of files
from jsonargparse.typing import register_type

from dynamax.errors import UserError
from dynamax.files import check_folder


class ReadPath(str):
    """What an ``InputPath`` is once it was read from a file or the command line."""


if TYPE_CHECKING:
    InputPath: TypeAlias = str | os.PathLike[str]
else:
    InputPath = ReadPath  # what jsonargparse sees
"""Annotation of options that name something to be *read*; from Python, a string or a path.

In a YAML file such a path counts from that file, on the command line from the working directory. What is *written* is
annotated as ``str``, and always counts from the working directory.
"""


def read_path(given: object) -> ReadPath:
    """The path that was written in a file or on the command line; from a file, it is absolute."""
    if not isinstance(given, str):
        raise ValueError(f"Expected a path, which is text. Got value: {given}")
    folder, path = _current_path_dir.get(), os.path.expanduser(given)
    return ReadPath(path if folder is None else os.path.normpath(os.path.join(folder, path)))


def output_file(name: str | None, suffix: str) -> Path | None:
    """Where a file goes; its folder is made now, so that one that cannot be written is refused before the work.

    Raises:
        UserError: If its name does not end in the suffix, or its folder cannot be made or written to.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.suffix != suffix or path.is_dir():
        raise UserError(f"{name} was given for a file to write; wanted: a name that ends in {suffix}. Change it.")
    check_folder(path.parent, name, "it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


register_type(ReadPath, serializer=os.path.abspath, deserializer=read_path)  # what is printed holds in any folder
