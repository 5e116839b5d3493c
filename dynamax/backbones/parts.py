"""A part of a model in a folder of its own: some blocks, with or without the matrices that stand around them.

``part.json`` says which; the tensors keep the names that they have in the whole model's folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynamax.errors import UserError
from dynamax.files import read_mapping, write_atomically
from dynamax.types import Span

RECORD, FORMAT = "part.json", 1


@dataclass(frozen=True)
class Part:
    """What a folder holds of a model.

    Attributes:
        span: The blocks.
        depth: Blocks of the whole model.
        embedding: Whether the embedding matrix is there.
        output: Whether the output matrix is there.
        absent: Names of the weights outside of blocks that are not there.
        fingerprint: Of the whole model.
        width: Channels of a position between two blocks: the residual stream, and what some models keep behind it.
        sends: Depth at which an edge sends states; None for a cloud's part.
    """

    span: Span
    depth: int
    embedding: bool
    output: bool
    absent: tuple[str, ...]
    fingerprint: str
    width: int
    sends: int | None

    def write(self, folder: Path) -> None:
        """Put the record into a folder."""
        values = {"format": FORMAT, **asdict(self), "span": list(self.span)}
        write_atomically(folder / RECORD, (json.dumps(values, indent=1) + "\n").encode())


def part_in(folder: Path) -> Part | None:
    """What a folder says that it holds of a model; None if it is no part.

    Raises:
        UserError: If the record is damaged, or of another version.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        return _checked(read_mapping(file))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} cannot be read: {error!r:.200}. Copy the folder again, or split the model again."
        ) from error


def _checked(values: dict[str, Any]) -> Part:
    if values.pop("format") != FORMAT:
        raise ValueError("it is of another version of dynamax")
    start, stop = values.pop("span")
    part = Part(span=Span(start, stop), **values)
    kinds = {"depth": int, "embedding": bool, "output": bool, "fingerprint": str, "absent": list, "width": int}
    kinds["sends"] = int if start == 0 else type(None)
    odd = [name for name, kind in kinds.items() if type(getattr(part, name)) is not kind]
    if odd or not (type(start) is type(stop) is int and 0 <= start < stop <= part.depth):
        raise ValueError(f"wrong values: {odd or [start, stop]}")
    return Part(**{**vars(part), "absent": tuple(part.absent)})
