"""Text out of data sets: a local file, or one of the Hugging Face Hub. Knows rows, fields and tokens."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar, cast, final

import datasets

from dynamax.data.text import Corpus, Document, Text, TextSource, windows
from dynamax.engine import Engine
from dynamax.errors import UserError, at_least
from dynamax.generation import SURROGATE
from dynamax.paths import InputPath
from dynamax.rows import Row, SampleBy, file_of, rows_of

GROUP = 64
TEXT = "{text}"
T = TypeVar("T")


def read_file(path: str, *, sample_by: SampleBy = "line") -> Iterator[Row]:
    """Rows of a local file, at least one; see ``rows_of``.

    Raises:
        UserError: If there is no such file, its kind is unknown, or it has no readable rows.
    """
    number = 0
    for number, row in enumerate(rows_of(file_of(path), sample_by=sample_by), 1):
        if not isinstance(row, Mapping):
            raise UserError(f"Row {number} of {path} is {row!r:.80}; wanted: names and values. Mend the row.")
        yield row
    if not number:
        raise UserError(f"{path} has no rows. Give a file with at least one row of text.")


def text_of(row: Row, field: str, *, number: int, name: str) -> str:
    """The text in one field of a row; its number, counted from 1, and the data set's name are for messages.

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
    if SURROGATE.search(value):
        raise UserError(
            f"Row {number} of {name} holds part of a character in the field {field!r}, which is no Unicode: "
            f"{value!r:.80}. Mend the row."
        )
    return value


class RowText(TextSource, Corpus):
    """Rows with a text field; 64 rows are a group. Rows of white space alone are passed over."""

    name: str  # what the data set is called in messages
    field: str
    length: int
    rows: int | None
    template: str = TEXT
    per_row: int | None = None

    def _wrapped(self, template: str, per_row: int | None) -> None:
        """Keep what documents are made with.

        Raises:
            UserError: If the text has no place in the template, or no document is wanted of a row.
        """
        at_least(self, 1, per_row=per_row)
        if "{text}" not in template:
            raise UserError(f"The template {template!r} has no place for the text. Write {{text}} where it belongs.")
        self.template, self.per_row = template, per_row

    def _wrapping(self) -> dict[str, Any]:
        """What documents are made with, as far as it is said: stores that were filled before keep their names."""
        said = {"template": self.template if self.template != TEXT else None, "per_row": self.per_row}
        return {name: value for name, value in said.items() if value is not None}

    @abstractmethod
    def read(self, start: int) -> Iterator[Row]:
        """The rows from index ``start`` on, at most to number ``rows``."""

    def count(self) -> int | None:
        """Groups of rows."""
        return -(-sum(1 for _ in self.read(0)) // GROUP)

    @final
    def texts(self) -> Iterator[Text]:
        """See ``Corpus.texts``."""
        for _, text in self._numbered(0):
            if text.strip():
                yield Text(text, origin=text)

    @final
    def groups(self, engine: Engine, *, skip: int = 0) -> Iterator[list[Document]]:
        """See ``TextSource.groups``."""
        spec = engine.backbone.spec
        if self.length > spec.context:
            raise UserError(
                f"Documents of up to {self.length} tokens were asked for, but this {spec.family} backbone's context "
                f"holds {spec.context}. Lower the text source's length."
            )
        group: list[Document] = []
        number = first = skip * GROUP
        for number, text in self._numbered(first):
            if text.strip():
                whole = self.template.replace(TEXT, text)
                group += windows(whole, engine, length=self.length, origin=text)[: self.per_row]
            if number % GROUP == 0:
                yield group
                group = []
        if number % GROUP:
            yield group

    def _numbered(self, start: int) -> Iterator[tuple[int, str]]:
        """The texts of the rows from index ``start`` on, each with its row's number, counted from 1."""
        for number, row in enumerate(self.read(start), start + 1):
            yield number, text_of(row, self.field, number=number, name=self.name)


@final
class LocalText(RowText):
    """Text of a local csv, json, jsonl, parquet or txt file.

    Args:
        path: The file; its suffix tells its kind.
        field: Column with the text; a txt file has the one column ``text``.
        length: Most tokens of a document; a longer row becomes several.
        rows: Read only so many rows; all if left out.
        sample_by: What a row of a txt file is.
        template: What is put around the text of a row, which stands for ``{text}`` in it.
        per_row: Most documents of a row, from its start on; all if left out.
    """

    def __init__(
        self,
        path: InputPath,
        *,
        field: str = "text",
        length: int = 256,
        rows: int | None = None,
        sample_by: SampleBy = "paragraph",
        template: str = TEXT,
        per_row: int | None = None,
    ) -> None:
        at_least(self, 1, length=length, rows=rows)
        self.name = self.path = str(path)
        self.field, self.length, self.rows = field, length, rows
        self.sample_by: SampleBy = sample_by
        self._wrapped(template, per_row)

    def identity(self) -> dict[str, Any]:
        """Contents and options; where the file lies does not matter."""
        with file_of(self.path).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        options = {name: getattr(self, name) for name in ("field", "length", "rows", "sample_by")}
        return {"source": "LocalText", "content": content, **options, **self._wrapping()}

    def read(self, start: int) -> Iterator[Row]:
        """See ``RowText``."""
        return islice(read_file(self.path, sample_by=self.sample_by), start, self.rows)


@final
class HubText(RowText):
    """Text of a data set on the Hugging Face Hub, or in a local folder laid out like one.

    Args:
        name: Id on the Hub, or a folder.
        config: Configuration of the data set, where it has several.
        split: Split, in the notation of ``datasets``.
        field: Column with the text.
        length: Most tokens of a document; a longer row becomes several.
        rows: Read only so many rows; all if left out.
        revision: Commit or tag on the Hub. With one given, a store that is whole is found without a network.
        streaming: Read rows as they are needed, without downloading the whole set.
        template: What is put around the text of a row, which stands for ``{text}`` in it.
        per_row: Most documents of a row, from its start on; all if left out.
    """

    def __init__(
        self,
        name: str,
        *,
        config: str | None = None,
        split: str = "train",
        field: str = "text",
        length: int = 256,
        rows: int | None = 10_000,
        revision: str | None = None,
        streaming: bool = True,
        template: str = TEXT,
        per_row: int | None = None,
    ) -> None:
        at_least(self, 1, length=length, rows=rows)
        self.name, self.id, self.config, self.split, self.field = f"{name} ({split})", name, config, split, field
        self.length, self.rows, self.revision, self.streaming = length, rows, revision, streaming
        self._wrapped(template, per_row)

    def identity(self) -> dict[str, Any]:
        """Options, and the revision, or else the hash by which ``datasets`` tells versions of the set apart."""
        version = self.revision
        if version is None:
            version = self._ask(lambda: datasets.load_dataset_builder(self.id, self.config).hash)
        options = {name: getattr(self, name) for name in ("config", "split", "field", "length", "rows")}
        return {"source": "HubText", "name": self.id, "version": version, **options, **self._wrapping()}

    def count(self) -> int | None:
        """Groups, if the number of rows was given; a short set ends before."""
        return None if self.rows is None else -(-self.rows // GROUP)

    def read(self, start: int) -> Iterator[Row]:
        """See ``RowText``.

        Raises:
            UserError: If the data set cannot be had.
        """
        if self.rows is not None and start >= self.rows:
            return
        options: dict[str, Any] = {"split": self.split, "revision": self.revision, "streaming": self.streaming}
        rows = self._ask(lambda: datasets.load_dataset(self.id, self.config, **options))
        if isinstance(rows, datasets.IterableDataset):
            rows = (rows if self.rows is None else rows.take(self.rows)).skip(start)
        else:
            assert isinstance(rows, datasets.Dataset), "a split is a table"
            rows = rows.select(range(start, len(rows) if self.rows is None else min(self.rows, len(rows))))
        for row in rows:
            yield cast(Row, row)

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except (OSError, ValueError) as error:
            raise UserError(
                f"The data set {self.id!r} (config {self.config!r}, split {self.split!r}, revision "
                f"{self.revision!r}) could not be loaded: {error}. Check the name and the network, or use LocalText "
                f"with a file, or SelfGenerated, which needs no data."
            ) from error
