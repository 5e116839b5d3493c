"""Rows of a user's files: csv, json, jsonl, parquet and txt. Text is text: nothing is taken for a number or a date.

Only the mark at the start of a file that tells its encoding is left out.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from dynamax.errors import UserError

Row = Mapping[str, Any]
SampleBy = Literal["line", "paragraph", "document"]
SEPARATORS: dict[str, str] = {"line": r"\r?\n", "paragraph": r"\n\n|\r\n\r\n"}
"""What lies between two rows of a text file, as Unix and Windows write it."""


def file_of(path: str | Path) -> Path:
    """A file that exists, is not empty and has a known suffix.

    Raises:
        UserError: If one of these fails.
    """
    file = Path(path).expanduser()
    known = ", ".join(READERS)
    if file.suffix.lower() not in READERS:
        raise UserError(
            f"{path} ends in {file.suffix or 'no suffix'!r}. Known are: {known}. Convert the file, or rename it if it "
            f"is one of these."
        )
    if not file.is_file():
        what = f"{file.resolve()} is a folder" if file.is_dir() else f"There is no file {file.resolve()}"
        raise UserError(f"{what}. Give the path of an existing file ({known}).")
    if file.stat().st_size == 0:
        raise UserError(f"{path} is empty. Give a file with at least one row of text.")
    return file


def rows_of(file: Path, *, sample_by: SampleBy = "document") -> Iterator[Any]:
    """What a file holds, row by row: names and values, unless it is JSON of another kind.

    Args:
        file: As :func:`file_of` gives it; its suffix tells its kind.
        sample_by: What a row of a txt file is; blank ones count, but for a file that is blank as a whole.

    Raises:
        UserError: Naming the file, and the place in it, if it is not what its suffix says.
    """
    try:
        if file.suffix.lower() == ".txt":
            yield from _from_text(file, sample_by)
        else:
            yield from READERS[file.suffix.lower()](file)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}. Mend the file, or give another.") from error


def _from_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # 128 kB otherwise
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        try:
            names = rows.fieldnames or []
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"{file} has two columns {name!r}. Rename one of them.")
            for row in rows:
                if None in row:
                    raise UserError(
                        f"Line {rows.line_num} of {file} has more cells than the {len(names)} columns of the first "
                        f"line. Put quotes around cells with commas in them."
                    )
                yield row
        except csv.Error as error:
            line = rows.reader.line_num
            raise UserError(f"Line {line} of {file} is not CSV: {error}. Is the file whole?") from error


def _from_json(file: Path) -> Iterator[Any]:
    """A list, a list under ``data`` or ``Data``, or an object a line."""
    text = file.read_bytes().decode("utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError as error:
        if not str(error).startswith("Extra data"):
            raise UserError(f"{file} is not JSON: {error}. Is the file whole?") from error
        yield from _from_lines(file)
        return
    except RecursionError as error:
        raise UserError(f"{file} is nested too deeply to be read as JSON. Give a list of objects.") from error
    if isinstance(content, Mapping):
        content = next((content[name] for name in ("data", "Data") if isinstance(content.get(name), list)), content)
    if not isinstance(content, list):
        raise UserError(f"{file} holds neither a list nor an object with a list under 'data' or 'Data'.")
    yield from content


def _from_lines(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"Line {number} of {file} is not JSON: {error}. Is the file whole? One object a line is wanted."
                    ) from error


def _from_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} is not a Parquet file: {reason} Is the file whole?") from error


def _from_text(file: Path, sample_by: SampleBy) -> Iterator[Row]:
    text = file.read_bytes().decode("utf-8-sig")
    if not text.strip():
        return
    pieces = [text] if sample_by == "document" else re.split(SEPARATORS[sample_by], text)
    if sample_by == "line" and not pieces[-1]:  # behind the end of the last line is nothing
        pieces.pop()
    for piece in pieces:
        yield {"text": piece}


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".csv": _from_csv,
    ".json": _from_json,
    ".jsonl": _from_lines,
    ".parquet": _from_parquet,
    ".txt": lambda file: _from_text(file, "document"),
}
"""Known kinds of files."""
