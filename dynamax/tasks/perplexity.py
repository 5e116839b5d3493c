"""Perplexity of text, over strided windows: every token is scored once, with as much context as the stride leaves."""

from __future__ import annotations

from dynamax.errors import UserError, at_least
from dynamax.paths import InputPath
from dynamax.tasks.base import TextExample, TextTask, Window
from dynamax.tasks.rows import HubDataset, load, select

WANTED = "a .txt file of UTF-8 text (one document), or rows with a field text (one document a row)"


class Perplexity(TextTask):
    """Perplexity and bits a byte of documents.

    The windows are those of the transformers guide to the perplexity of fixed-length models: each after the first
    scores the tokens that the one before did not reach. On the Hub's WikiText-2 the raw test lines, joined by blank
    lines, are one document, not detokenised.

    Args:
        path: A local .txt, .jsonl, .json, .csv or .parquet; without it, ``Salesforce/wikitext``
            (``wikitext-2-raw-v1``, test) from the Hub.
        limit: Documents to use; all if left out.
        offset: Documents to leave out at the start.
        characters: Use only this many characters from the start of each document; all if left out.
        window: Most tokens a window holds; no more than the model's context.
        stride: Tokens from one window's start to the next; less than ``window``.
    """

    def __init__(
        self,
        path: InputPath | None = None,
        *,
        limit: int | None = None,
        offset: int = 0,
        characters: int | None = None,
        window: int = 1024,
        stride: int = 512,
    ) -> None:
        at_least(self, 1, limit=limit, characters=characters, stride=stride)
        at_least(self, 0, offset=offset)
        if stride >= window:
            raise UserError(
                f"stride={stride} with window={window} leaves a window's first token without context. "
                f"Give a stride below the window, such as {max(1, window // 2)} for a window of {max(2, window)}."
            )
        self.path, self.limit, self.offset, self.characters = path, limit, offset, characters
        self.window, self.stride = window, stride

    def examples(self) -> list[TextExample]:
        """The documents, cut to ``characters``."""
        suffixes = (".txt", ".jsonl", ".json", ".csv", ".parquet")
        hub = HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        rows = load(self.path, hub=hub, suffixes=suffixes, wanted=WANTED)
        if self.path is None:
            documents = [(hub.config or hub.name, "\n\n".join(row.get("text", str) for row in rows))]
        else:
            documents = [(f"{row.origin}-{row.number}", row.text("text")) for row in rows]
        chosen = select(documents, skip=self.offset, limit=self.limit)
        return [TextExample(name, text[: self.characters]) for name, text in chosen]

    def windows(self, total: int) -> list[Window]:
        """Windows over ``total`` tokens; none for fewer than two."""
        windows: list[Window] = []
        scored = 1
        while scored < total:
            start = len(windows) * self.stride
            stop = min(start + self.window, total)
            windows.append(Window(start, stop, scored))
            scored = stop
        return windows
