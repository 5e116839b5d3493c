"""A model by its path or its name on the Hub, where the class of a backbone is wanted. Knows names, not classes."""

from __future__ import annotations

import os
import re
from typing import Any

from dynamax.paths import read_path
from dynamax.registry import SOURCES

SOURCE = SOURCES.bases[0]
"""The class of sources, as registries name it."""
ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILES = (".yaml", ".yml", ".json", ".gguf")
ADAPTER = ("tuning.json", "adapter_config.json")


def as_source(given: str) -> str | dict[str, Any]:
    """What a text means: a folder, a GGUF file, or OWNER/NAME on the Hub becomes the class for it and its option.

    Anything else, such as the name of a class or a YAML file, stays as it is. A path in a file counts from that file.
    """
    if given in SOURCES.names():
        return given
    path = str(read_path(given))
    if os.path.isdir(path):
        tuned = all(os.path.isfile(os.path.join(path, name)) for name in ADAPTER)
        return _part("Tuned", folder=path) if tuned else _part("Folder", path=path)
    if given.endswith(".gguf"):
        return _part("GGUF", path=path)
    if ON_HUB.fullmatch(given) and not given.endswith(FILES) and not os.path.exists(path):
        return _part("Hub", name=given)
    return given


def _part(kind: str, **options: str) -> dict[str, Any]:
    return {"class_path": kind, "init_args": options}
