"""Text for the store: what a document is, and what a source of documents promises. Knows tokenizers, no files."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from dynamax.engine import Engine


@dataclass(frozen=True)
class Document:
    """One sequence of tokens.

    Attributes:
        tokens: Token ids, at least one.
        prompt: How many tokens at the start were given and not generated; 0 for plain text.
        origin: Text that it goes back to, such as its question; documents of one origin are on one side of every split.
        hidden: Residual stream ``h_TD`` by depth, where the model has run over the document already; else None.
    """

    tokens: list[int]
    prompt: int = 0
    origin: str = ""
    hidden: Mapping[int, Tensor] | None = field(default=None, compare=False, repr=False)


class Text(NamedTuple):
    """A text before any tokenizer, and what it goes back to; texts of one origin are on one side of every split."""

    text: str
    origin: str


class Corpus(ABC):
    """Where texts come from: the same ones in the same order each time. A tokenizer can be trained on them."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that the texts depend on, as JSON values; file contents as hashes."""

    @abstractmethod
    def texts(self) -> Iterator[Text]:
        """All texts."""


def silent(text: str) -> None:
    """Tell nobody."""


class TextSource(ABC):
    """Where documents come from: the same ones each time, and from any point on.

    Documents come in *groups*. Group ``i`` depends only on the constructor's arguments, the model, its tokenizer
    and ``i``. So filling a store can go on at any group, and a damaged part can be made again.

    Attributes:
        tell: Called with what is being done, a few words, where a group takes long.
    """

    tell: Callable[[str], object] = staticmethod(silent)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that the text depends on but tokenizer and backbone, as JSON values; file contents as hashes."""

    @abstractmethod
    def count(self) -> int | None:
        """Number of groups; None if only the end will tell."""

    @abstractmethod
    def groups(self, engine: Engine, *, skip: int = 0) -> Iterator[list[Document]]:
        """Yield the groups from number ``skip`` on; skipping costs almost nothing.

        Args:
            engine: The model the text is for, with its tokenizer; it may write the text.
            skip: Groups to leave out.
        """

    def groups_with_states(self, engine: Engine, depths: Sequence[int], *, skip: int = 0) -> Iterator[list[Document]]:
        """The groups, with the states of those documents that the model has run over anyway, as when it wrote them.

        Here no document has states.

        Args:
            engine: As for ``groups``.
            depths: Depths whose states are wanted, ascending; the last one is the model's own.
            skip: Groups to leave out.
        """
        return self.groups(engine, skip=skip)


def windows(text: str, engine: Engine, *, length: int, origin: str | None = None) -> list[Document]:
    """Cut a text into documents of at most ``length`` tokens, one behind the other, all of one origin: the text."""
    assert engine.tokenizer is not None, "text is read through a tokenizer"
    tokens = engine.tokenizer(text, verbose=False)["input_ids"]
    origin = text if origin is None else origin
    return [Document(tokens[start : start + length], origin=origin) for start in range(0, len(tokens), length)]


def origin_hash(text: str) -> int:
    """A document's origin as a number that fits int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def held_out(origins_N: Tensor, part: float) -> Tensor:
    """Which documents are kept for validation, ``N`` bool: all of an origin or none, wherever they stand.

    Args:
        origins_N: Hashes, int64; see ``origin_hash``.
        part: Part of the origins, in [0, 1].
    """
    return origins_N.double() / 2.0**64 + 0.5 < part


def derived_seed(seed: int, index: int) -> int:
    """The seed of part ``index``, such as a batch or an epoch; it shares nothing with its neighbours'."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
