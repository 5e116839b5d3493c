"""Where drafts come from that no block has to run for: texts that went on in the same way before.

A source looks at token ids alone. It is asked for one token at a time, and told what became of the text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

from dynamax.errors import UserError


class Suggestion(NamedTuple):
    """How a text may go on.

    Attributes:
        token: The token that may come next.
        match: How many of the last tokens it was found by; more is surer.
    """

    token: int
    match: int


class DraftSource(ABC):
    """Suggests how texts go on. One object serves all rows of a batch, and all texts of a decoder, in turn."""

    @abstractmethod
    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """New texts begin, one a row; what was learned of earlier ones may be kept."""

    @abstractmethod
    def add(self, row: int, text: Sequence[int]) -> None:
        """A row has one token more: the last of ``text``, which holds all of them."""

    @abstractmethod
    def suggest(self, row: int, text: Sequence[int]) -> Suggestion | None:
        """What may follow ``text``, the row's tokens and drafts; None for nothing."""


class NGrams:
    """Which token followed a few tokens last.

    Args:
        shortest: Fewest tokens to look a successor up by.
        longest: Most.
        entries: Most that are remembered; the oldest go.
    """

    def __init__(self, shortest: int, longest: int, entries: int) -> None:
        if not 1 <= shortest <= longest:
            raise UserError(
                f"shortest is {shortest} and longest is {longest}; wanted: 1 or more, and shortest at most longest."
            )
        if entries < 1:
            raise UserError(f"entries is {entries}; it must be at least 1.")
        self.shortest, self.longest, self.entries = shortest, longest, entries
        self._next: dict[tuple[int, ...], int] = {}

    def put(self, text: Sequence[int]) -> None:
        """Remember what the last token of ``text`` followed."""
        *before, token = text[-self.longest - 1 :]
        for count in range(self.shortest, len(before) + 1):
            key = tuple(before[-count:])
            self._next.pop(key, None)  # so that it is the newest
            self._next[key] = token
        while len(self._next) > self.entries:
            del self._next[next(iter(self._next))]

    def get(self, text: Sequence[int]) -> Suggestion | None:
        """What followed the last tokens of ``text``, as many of them as are known."""
        tail = tuple(text[-self.longest :])
        for start in range(len(tail) - self.shortest + 1):
            token = self._next.get(tail[start:])
            if token is not None:
                return Suggestion(token, len(tail) - start)
        return None


@final
class PromptLookup(DraftSource):
    """What followed the last tokens when they stood in the same prompt or answer before.

    Source: prompt lookup decoding (A. Saxena, 2023); in transformers as ``prompt_lookup_num_tokens``.

    Args:
        shortest: Fewest tokens that must be the same.
        longest: Most tokens that are compared.
    """

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        NGrams(shortest, longest, 1)  # refuses what makes no sense
        self.shortest, self.longest = shortest, longest
        self._rows: list[NGrams] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts; earlier texts are forgotten."""
        self._rows = []
        for prompt in prompts:
            row = NGrams(self.shortest, self.longest, entries=1 << 20)
            for end in range(2, len(prompt) + 1):
                row.put(prompt[max(0, end - self.longest - 1) : end])
            self._rows.append(row)

    def add(self, row: int, text: Sequence[int]) -> None:
        """Remember what the newest token followed."""
        self._rows[row].put(text)

    def suggest(self, row: int, text: Sequence[int]) -> Suggestion | None:
        """What followed the last tokens before."""
        return self._rows[row].get(text)


@final
class TokenTable(DraftSource):
    """What followed the last tokens in any text that was decoded before, prompts left out.

    Source: after Token Recycling (arXiv 2408.08696), with one successor for each context in place of several.

    Args:
        shortest: Fewest tokens that must be the same.
        longest: Most tokens that are compared.
        entries: Contexts that are remembered, about 200 bytes each.
    """

    def __init__(self, shortest: int = 2, longest: int = 3, entries: int = 1 << 18) -> None:
        self._table = NGrams(shortest, longest, entries)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """What was learned is kept."""

    def add(self, row: int, text: Sequence[int]) -> None:
        """Remember what the newest token followed."""
        self._table.put(text)

    def suggest(self, row: int, text: Sequence[int]) -> Suggestion | None:
        """What followed the last tokens in any text."""
        return self._table.get(text)
