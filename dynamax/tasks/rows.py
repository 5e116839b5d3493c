"""Rows of a data set: from a local file in the set's official schema, or from the Hub.

Knows files and field names; knows nothing of prompts and scores. A row that lacks a field says which row, which
field, what it has and what was wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dynamax.errors import UserError
from dynamax.paths import InputPath
from dynamax.rows import rows_of

T = TypeVar("T")
READABLE = {str: "text", list: "a list", dict: "an object", int: "a whole number"}


class HubDataset(NamedTuple):
    """A data set on the Hugging Face Hub."""

    name: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Row:
    """One row, and where it is from.

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

    def _found(self, field: str) -> Any:  # noqa: ANN401 - as in JSON
        value: Any = self.values
        for name in field.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def text(self, field: str) -> str:
        """A text with something in it besides white space, as it stands."""
        text = self.get(field, str)
        if not text.strip():
            raise self.error(f"has nothing in {field!r}")
        return text

    def texts(self, field: str | None, *, optional: bool = False) -> tuple[str, ...]:
        """A list of texts, not empty; none if it is ``optional`` and the row, or its layout, has no such field."""
        if field is None or (optional and self._found(field) in (None, [])):
            return ()
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


def load(path: InputPath | None, *, suffixes: Sequence[str], wanted: str, hub: HubDataset | None = None) -> list[Row]:
    """The rows of a local file, or, without a path, of the Hub's set.

    Raises:
        UserError: If there is no such file, it has another suffix, cannot be parsed, or is empty.
    """
    if path is None:
        assert hub is not None, "a task reads a file or a set of the Hub"
        origin, values = hub.name, _from_hub(hub, suffixes)
    else:
        file = Path(path).expanduser()
        if file.suffix.lower() not in suffixes:
            raise UserError(
                f"{file} ends in {file.suffix!r}; wanted a file ending in {' or '.join(suffixes)}: {wanted}."
            )
        if not file.is_file():
            raise UserError(
                f"There is no file {file} (looked from {Path.cwd()}). Wanted: {wanted}. Correct the task's path, "
                f"or, for a set that is on the Hub, leave it out."
            )
        origin, values = file.name, rows_of(file)
    rows = []
    for number, value in enumerate(values, 1):
        if not isinstance(value, Mapping):
            raise UserError(f"Row {number} of {origin} is no object but {value!r:.80}. Wanted: {wanted}.")
        rows.append(Row(value, number, origin, wanted))
    if not rows:
        raise UserError(f"{origin} has no rows. Wanted: {wanted}, with at least one row.")
    return rows


def _from_hub(hub: HubDataset, suffixes: Sequence[str]) -> Iterable[object]:
    import datasets

    try:
        return datasets.load_dataset(hub.name, hub.config, split=hub.split)
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
