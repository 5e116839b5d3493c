"""Text out of data sets: a local file, or one of the Hugging Face Hub. Knows rows, fields and tokens."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, final

import datasets

from dynamax.data.files import SampleBy, checked_file, read_file, text_of
from dynamax.data.text import Corpus, Document, Text, TextSource, check_length, check_positive, windows
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.paths import InputPath

GROUP = 64
Rows = datasets.Dataset | datasets.IterableDataset
T = TypeVar("T")


class RowText(TextSource, Corpus):
    """Rows with a text field; 64 rows are a group. Rows of white space alone are passed over."""

    field: str
    length: int
    rows: int | None

    @abstractmethod
    def load(self) -> Rows:
        """All rows of the data set."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the data set is called in messages."""

    @final
    def texts(self) -> Iterator[Text]:
        """See ``Corpus.texts``."""
        for number, row in enumerate(stretch(self.load(), 0, self.rows), 1):
            text = text_of(row, self.field, number=number, name=self.name)
            if text.strip():
                yield Text(text, origin=text)

    @final
    def groups(self, engine: Engine, *, skip: int = 0) -> Iterator[list[Document]]:
        """See ``TextSource.groups``."""
        check_length(self.length, engine.backbone)
        rows = stretch(self.load(), skip * GROUP, self.rows)
        group: list[Document] = []
        index = skip * GROUP - 1
        for index, row in enumerate(rows, skip * GROUP):
            text = text_of(row, self.field, number=index + 1, name=self.name)
            group += windows(text, engine, length=self.length) if text.strip() else []
            if (index + 1) % GROUP == 0:
                yield group
                group = []
        if (index + 1) % GROUP:
            yield group


def stretch(rows: Rows, start: int, stop: int | None) -> Iterable[Any]:
    """Rows ``[start, stop)``, as many of them as there are."""
    if isinstance(rows, datasets.IterableDataset):
        return (rows if stop is None else rows.take(stop)).skip(start)
    stop = len(rows) if stop is None else min(stop, len(rows))
    return rows.select(range(start, stop)) if start < stop else []


@final
class LocalText(RowText):
    """Text of a local csv, json, jsonl, parquet or txt file.

    Args:
        path: The file; its suffix tells its kind.
        field: Column with the text; a txt file has the one column ``text``.
        length: Most tokens of a document; a longer row becomes several.
        rows: Read only so many rows; all if left out.
        sample_by: What a row of a txt file is.
    """

    def __init__(
        self,
        path: InputPath,
        *,
        field: str = "text",
        length: int = 256,
        rows: int | None = None,
        sample_by: SampleBy = "paragraph",
    ) -> None:
        check_positive(self, length=length, rows=rows)
        self.path, self.field, self.length, self.rows = str(path), field, length, rows
        self.sample_by: SampleBy = sample_by

    @property
    def name(self) -> str:
        """The path."""
        return self.path

    def identity(self) -> dict[str, Any]:
        """Contents and options; where the file lies does not matter."""
        with checked_file(self.path).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "source": "LocalText",
            "content": content,
            "field": self.field,
            "length": self.length,
            "rows": self.rows,
            "sample_by": self.sample_by,
        }

    def count(self) -> int | None:
        """Groups of rows."""
        rows = len(self.load()) if self.rows is None else min(len(self.load()), self.rows)
        return -(-rows // GROUP)

    def load(self) -> datasets.Dataset:
        """All rows; see ``read_file``."""
        return read_file(self.path, sample_by=self.sample_by)


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
    ) -> None:
        check_positive(self, length=length, rows=rows)
        self._name, self.config, self.split, self.field = name, config, split, field
        self.length, self.rows, self.revision, self.streaming = length, rows, revision, streaming

    @property
    def name(self) -> str:
        """Id and split."""
        return f"{self._name} ({self.split})"

    def identity(self) -> dict[str, Any]:
        """Options, and the revision, or else the hash by which ``datasets`` tells versions of the set apart."""
        version = self.revision
        if version is None:
            version = self._ask(lambda: datasets.load_dataset_builder(self._name, self.config).hash)
        return {
            "source": "HubText",
            "name": self._name,
            "config": self.config,
            "version": version,
            "split": self.split,
            "field": self.field,
            "length": self.length,
            "rows": self.rows,
        }

    def count(self) -> int | None:
        """Groups, if the number of rows was given; a short set ends before."""
        return None if self.rows is None else -(-self.rows // GROUP)

    def load(self) -> Rows:
        """All rows.

        Raises:
            UserError: If the data set cannot be had.
        """
        return self._ask(
            lambda: datasets.load_dataset(
                self._name, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        )

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except (OSError, ValueError) as error:
            raise UserError(
                f"The data set {self._name!r} (config {self.config!r}, split {self.split!r}, revision "
                f"{self.revision!r}) could not be loaded: {error}. Check the name and the network, or use LocalText "
                f"with a file, or SelfGenerated, which needs no data."
            ) from error
