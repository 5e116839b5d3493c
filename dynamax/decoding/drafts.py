"""Where drafts come from that no block has to run for: texts that went on in the same way before.

A source looks at token ids alone. It is asked for one token at a time, and told what became of the text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, final

from safetensors import SafetensorError, safe_open

from dynamax.errors import UserError
from dynamax.paths import InputPath

SHARES = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Where the table's suggestions of one sureness end and the surer ones begin."""


class Suggestion(NamedTuple):
    """How a text may go on.

    Attributes:
        token: The token that may come next.
        match: How sure it is: more is surer. Suggestions of one source that match equally are right equally often.
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

    def tried(self) -> Mapping[int, tuple[int, int]]:
        """How often suggestions of each ``match`` were right and wrong before the first answer, if that is known."""
        return {}


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


@dataclass
class Followers:
    """What followed one context, and how often; ``best`` is the newest of the most frequent."""

    total: int = 0
    best: int = -1
    counts: dict[int, int] = field(default_factory=dict)

    def note(self, token: int) -> None:
        """It was followed once more."""
        self.total += 1
        self.counts[token] = count = self.counts.get(token, 0) + 1
        if count >= self.counts.get(self.best, 0):
            self.best = token


@final
class TokenTable(DraftSource):
    """What followed the last tokens most often in all texts that were decoded or read before, prompts left out.

    Shares of several context lengths are mixed: of n times that a context was seen, its own shares count n / (n + 1),
    those of shorter ones the rest (Witten-Bell smoothing with one successor). How sure a suggestion is, is its share.

    Source: after Token Recycling (arXiv 2408.08696), with counts in place of the model's likely tokens.

    Args:
        texts: Texts to know before the first answer: a store's folder, or a safetensors file with the tensors
            ``tokens``, ``stops`` and ``prompts`` of one. They must be of the model's own tokenizer, or the table is of
            no use; wrong they make no token.
        longest: Most tokens that are compared.
        entries: Contexts that are remembered, about 400 bytes each.

    Raises:
        UserError: If there are no such texts.
    """

    def __init__(self, texts: InputPath | None = None, longest: int = 4, entries: int = 1 << 18) -> None:
        NGrams(1, longest, entries)  # refuses what makes no sense
        self.longest, self.entries = longest, entries
        self._contexts: dict[tuple[int, ...], Followers] = {}
        self._tried: dict[int, list[int]] = {}
        for tokens, prompt in () if texts is None else stored_texts(Path(texts)):
            self.learn(tokens, prompt)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """What was learned is kept."""

    def learn(self, tokens: Sequence[int], prompt: int = 0) -> None:
        """Read a text, whose first ``prompt`` tokens are no answer; what would have been suggested is taken note of."""
        for end in range(max(1, prompt), len(tokens)):
            text = tokens[max(0, end - self.longest) : end + 1]
            found = self.suggest(0, text[:-1])
            if found is not None:
                self._tried.setdefault(found.match, [0, 0])[found.token != text[-1]] += 1
            self.add(0, text)

    def tried(self) -> dict[int, tuple[int, int]]:
        """Of the texts that were read."""
        return {match: (right, wrong) for match, (right, wrong) in self._tried.items()}

    def add(self, row: int, text: Sequence[int]) -> None:
        """Count what the newest token followed."""
        *before, token = text[-self.longest - 1 :]
        for count in range(1, len(before) + 1):
            key = tuple(before[-count:])
            known = self._contexts.get(key)
            if known is None:
                known = self._contexts[key] = Followers()
            known.note(token)
        while len(self._contexts) > self.entries:
            del self._contexts[next(iter(self._contexts))]

    def suggest(self, row: int, text: Sequence[int]) -> Suggestion | None:
        """The token of the greatest share among those that followed each context most often."""
        tail = tuple(text[-self.longest :])
        found = [known for start in range(len(tail)) if (known := self._contexts.get(tail[start:])) is not None]
        best, most = -1, 0.0
        for token in {known.best for known in found}:
            share, rest = 0.0, 1.0
            for known in found:
                share += rest * known.counts.get(token, 0) / (known.total + 1)
                rest /= known.total + 1
            if share > most:
                best, most = token, share
        return Suggestion(best, bisect(SHARES, most)) if found else None


def stored_texts(place: Path) -> Iterator[tuple[list[int], int]]:
    """The tokens of each document of a store, or of one file of it, and how many of them are its prompt.

    Raises:
        UserError: If there are none.
    """
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    if not files:
        raise UserError(f"There are no texts in {place}; wanted: a store's folder, which has *.safetensors, or a file.")
    for file in files:
        try:
            with safe_open(file, "pt") as held:
                tokens, stops, prompts = (held.get_tensor(name).tolist() for name in ("tokens", "stops", "prompts"))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} holds no texts ({error}). Wanted: a safetensors file with the tensors tokens, stops and "
                f"prompts, as dynamax cache writes it."
            ) from error
        for start, stop, prompt in zip([0, *stops], stops, prompts, strict=False):
            yield tokens[start:stop], prompt
