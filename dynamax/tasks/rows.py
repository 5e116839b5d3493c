"""Rows of a data set: from a local file in the set's official schema, or from the Hub.

Knows files and field names; knows nothing of prompts and scores. A row that lacks a field says which row, which
field, what it has and what was wanted.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from dynamax.errors import UserError
from dynamax.paths import InputPath

T = TypeVar("T")
READABLE = {str: "text", list: "a list", dict: "an object", int: "a whole number"}


class HubDataset(NamedTuple):
    """A data set on the Hugging Face Hub."""

    name: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Row:
    """One row, which knows where it stands.

    Attributes:
        values: Its fields.
        number: Counted from 1; headings are not counted.
        origin: File or Hub name.
        wanted: The official schema, in words.
    """

    values: Mapping[str, Any]
    number: int
    origin: str
    wanted: str

    def get(self, field: str, kind: type[T]) -> T:
        """The field's value; dots lead into objects, as in ``answer.value``.

        Raises:
            UserError: If it is missing, or not of that kind.
        """
        value: Any = self.values
        for name in field.split("."):
            found = value.get(name) if isinstance(value, Mapping) else None
            if found is None:
                known = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"{value!r:.80}"
                raise self.error(f"has no {field!r} (looking for {name!r} among: {known or 'nothing'})")
            value = found
        if not isinstance(value, kind):
            raise self.error(
                f"has {READABLE.get(type(value), type(value).__name__)} in {field!r}, not {READABLE[kind]}"
            )
        return value

    def text(self, field: str) -> str:
        """A text with something in it besides white space, as it stands."""
        text = self.get(field, str)
        if not text.strip():
            raise self.error(f"has nothing in {field!r}")
        return text

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts, not empty."""
        texts = self.get(field, list)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise self.error(f"needs a list of at least one text in {field!r}, and has {str(texts):.80}")
        return tuple(texts)

    def records(self, field: str) -> list[Row]:
        """A list of objects; the Hub's layout, an object of equally long columns, is read as one."""
        value = self.get(field, object)
        if isinstance(value, Mapping):
            columns = list(value.values())
            if not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
                raise self.error(f"needs columns of one length in {field!r}")
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
        if not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
            raise self.error(f"needs a list of objects in {field!r}")
        origin = f"{field!r} in row {self.number} of {self.origin}"
        return [Row(v, number, origin, self.wanted) for number, v in enumerate(value, 1)]

    def error(self, problem: str) -> UserError:
        """An error that names the row."""
        return UserError(f"Row {self.number} of {self.origin} {problem}. Wanted: {self.wanted}.")


def load(path: InputPath | None, *, hub: HubDataset, suffixes: Sequence[str], wanted: str) -> list[Row]:
    """The rows of a local file, or, without a path, of the Hub's set.

    Raises:
        UserError: If there is no such file, it has another suffix, cannot be parsed, or is empty.
    """
    if path is None:
        return _numbered(_from_hub(hub, suffixes), hub.name, wanted)
    return read(path, suffixes=suffixes, wanted=wanted)


def read(path: InputPath, *, suffixes: Sequence[str], wanted: str) -> list[Row]:
    """The rows of a local file; raises like ``load``."""
    file = Path(path).expanduser()
    if file.suffix.lower() not in suffixes:
        raise UserError(f"{file} ends in {file.suffix!r}; wanted a file ending in {' or '.join(suffixes)}: {wanted}.")
    if not file.is_file():
        raise UserError(
            f"There is no file {file} (looked from {Path.cwd()}). Wanted: {wanted}. Correct the task's path, "
            f"or, for a set that is on the Hub, leave it out."
        )
    try:
        return _numbered(READERS[file.suffix.lower()](file), file.name, wanted)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _numbered(values: Iterable[object], origin: str, wanted: str) -> list[Row]:
    rows = []
    for number, value in enumerate(values, 1):
        if not isinstance(value, Mapping):
            raise UserError(f"Row {number} of {origin} is no object but {value!r:.80}. Wanted: {wanted}.")
        rows.append(Row(value, number, origin, wanted))
    if not rows:
        raise UserError(f"{origin} has no rows. Wanted: {wanted}, with at least one row.")
    return rows


def _csv(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        yield from csv.DictReader(stream)


def _jsonl(file: Path) -> Iterator[object]:
    for number, line in enumerate(file.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            yield _parse(line, f"Line {number} of {file}")


def _json(file: Path) -> Iterable[object]:
    content = _parse(file.read_text("utf-8-sig"), str(file))
    for name in ("data", "Data"):
        if isinstance(content, dict) and isinstance(content.get(name), list):
            return content[name]
    if not isinstance(content, list):
        raise UserError(f"{file} holds neither a list nor an object with a list under 'data' or 'Data'.")
    return content


def _parse(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error}. Is the file whole?") from error


def _txt(file: Path) -> list[dict[str, Any]]:
    text = file.read_text("utf-8-sig")
    return [{"text": text}] if text.strip() else []


def _parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is not a Parquet file: {error}. Is the file whole?") from error


READERS: dict[str, Callable[[Path], Iterable[object]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _txt,
}


def _from_hub(hub: HubDataset, suffixes: Sequence[str]) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        return cast(Iterable[Mapping[str, Any]], datasets.load_dataset(hub.name, hub.config, split=hub.split))
    except Exception as error:  # the Hub's client has no common base class for what can go wrong
        raise UserError(
            f"The data set {hub.name} could not be loaded from the Hub ({type(error).__name__}: {error}). "
            f"Check the network, or download it once and give the task's path ({' or '.join(suffixes)})."
        ) from error


def select(items: Sequence[T], *, skip: int, limit: int | None) -> list[T]:
    """``limit`` items (all that are left if None) after the first ``skip``.

    Raises:
        UserError: If that leaves none.
    """
    if skip >= len(items):
        raise UserError(
            f"The task leaves out its first {skip} examples (offset, and shots where it has them), and there are "
            f"{len(items)}. Lower offset or shots."
        )
    return list(items[skip : None if limit is None else skip + limit])


def at_least(least: int, **options: int | None) -> None:
    """Check constructor options; None passes.

    Raises:
        UserError: If one is below ``least``.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"{name}={value} was given; wanted {least} or more.")
