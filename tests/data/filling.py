"""A process of its own that fills a store slowly, to be killed: ``python -m tests.data.filling FOLDER``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from dynamax.data.fill import fill_store
from dynamax.data.store import Store
from dynamax.data.text import Document, TextSource
from dynamax.engine import Engine
from tests.data.small import RandomText, characters, small_backbone


class Slow(TextSource):
    """The same text as ``RandomText``, a group every twentieth of a second."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.text, self.seconds = RandomText(groups=40, size=3), seconds

    def identity(self) -> dict[str, Any]:
        return self.text.identity()

    def count(self) -> int | None:
        return self.text.count()

    def groups(self, engine, *, skip: int = 0) -> Iterator[list[Document]]:
        for group in self.text.groups(engine, skip=skip):
            time.sleep(self.seconds)
            yield group


def fill(folder: str, seconds: float) -> Store:
    engine = Engine(small_backbone(), characters())
    return fill_store(folder, engine, Slow(seconds), [2, 5], k=4, shard_bytes=5000, progress=False)


if __name__ == "__main__":
    fill(sys.argv[1], 0.05)
