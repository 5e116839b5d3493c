"""Rows of local files, read by ``datasets``, and the text in them. Knows suffixes and fields, no tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import datasets
from datasets.exceptions import DatasetGenerationError

from dynamax.errors import UserError

SampleBy = Literal["line", "paragraph", "document"]
READERS: dict[str, Callable[..., Any]] = {  # what load_dataset runs too, but it tells the Hub of every file first
    ".csv": partial(datasets.Dataset.from_csv, keep_default_na=False),  # or the word "null" becomes a gap
    ".json": datasets.Dataset.from_json,
    ".jsonl": datasets.Dataset.from_json,
    ".parquet": datasets.Dataset.from_parquet,
    ".txt": datasets.Dataset.from_text,
}


def checked_file(path: str) -> Path:
    """The path of a file that exists, is not empty and has a known suffix.

    Raises:
        UserError: If one of these fails.
    """
    file = Path(path).expanduser()
    if file.suffix not in READERS:
        raise UserError(
            f"{path} ends in {file.suffix or 'no suffix'!r}. Known are: {', '.join(READERS)}. "
            f"Convert the file, or rename it if it is one of these."
        )
    if not file.is_file():
        raise UserError(f"There is no file {file.resolve()}. Give the path of an existing file ({', '.join(READERS)}).")
    if file.stat().st_size == 0:
        raise UserError(f"{path} is empty. Give a file with at least one row of text.")
    return file


def read_file(path: str, *, sample_by: SampleBy = "line") -> datasets.Dataset:
    """Rows of a local file.

    Args:
        path: A csv, json, jsonl, parquet or txt file.
        sample_by: What a row of a txt file is.

    Raises:
        UserError: If there is no such file, its kind is unknown, or it has no readable rows.
    """
    file = checked_file(path)
    read = READERS[file.suffix]
    options = {"sample_by": sample_by} if file.suffix == ".txt" else {}
    try:
        return cast(datasets.Dataset, read(str(file), **options))
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        raise UserError(
            f"No rows could be read from {path} as {file.suffix}: {error.__cause__ or error}. "
            f"Give a file with at least one row, in UTF-8, whose contents are what its suffix says."
        ) from error


def text_of(row: Mapping[str, Any], field: str, *, number: int, name: str) -> str:
    """The text in one field of a row.

    Args:
        row: The row.
        field: Its field.
        number: Row number, counted from 1, for messages.
        name: Where the row is from, for messages.

    Raises:
        UserError: If the row has no such field, or no text in it.
    """
    value = row.get(field)
    if value is None:
        found = ", ".join(repr(key) for key, value in row.items() if value is not None) or "none"
        raise UserError(
            f"Row {number} of {name} has nothing in the field {field!r}; the fields it has are: {found}. "
            f"Name the field with the text (field: NAME), or mend the row."
        )
    if not isinstance(value, str):
        raise UserError(
            f"Row {number} of {name} holds {type(value).__name__} in the field {field!r}, and text is wanted: "
            f"{value!r:.80}. Name the field with the text (field: NAME)."
        )
    return value


def all_texts(rows: Iterable[Any], field: str, *, name: str) -> list[str]:
    """The texts of a small data set, blank ones left out; see ``text_of``."""
    texts = (text_of(row, field, number=number, name=name) for number, row in enumerate(rows, 1))
    return [text for text in texts if text.strip()]
