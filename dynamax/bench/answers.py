"""One timed answer, and how alike two answers are. Knows tokens and clocks only."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

from dynamax.bench.base import Contender
from dynamax.errors import UserError


class Answer(NamedTuple):
    """What a contender answered to one prompt, once.

    Attributes:
        prompt: Number of the prompt, from 0.
        round: Number of the round, from 1.
        tokens: Token ids, an end token included.
        first_ms: Milliseconds until the first token.
        total_ms: Milliseconds until the last token.
        ms_per_token: Milliseconds a token after the first; None where there is no other. A contender that tells several
            tokens at once at the beginning has them all left out.
        ended: Whether an end token ended it, and not the limit.
    """

    prompt: int
    round: int
    tokens: list[int]
    first_ms: float
    total_ms: float
    ms_per_token: float | None
    ended: bool


class Clock:
    """Notes when which tokens were told."""

    def __init__(self) -> None:
        self._told: list[tuple[float, list[int]]] = []
        self._began = time.perf_counter()

    def told(self, tokens: Sequence[int]) -> None:
        """Note tokens."""
        self._told.append((time.perf_counter(), list(tokens)))

    def answer(self, prompt: int, number: int, ends: Collection[int], limit: int) -> Answer:
        """What was told, up to the first end token and the limit.

        Args:
            prompt: Number of the prompt.
            number: Number of the round.
            ends: End tokens.
            limit: Most tokens.

        Raises:
            UserError: If no token was told.
        """
        if not self._told:
            raise UserError("It gave no token to a prompt; wanted: at least one. Try another prompt.")
        tokens: list[int] = []
        first, last = self._told[0], self._told[0][0]
        for moment, new in self._told:
            tokens += new
            last = moment
            if len(tokens) >= limit or any(token in ends for token in new):
                break
        stop = next((place for place, token in enumerate(tokens) if token in ends), None)
        tokens = tokens[:limit] if stop is None else tokens[: min(stop + 1, limit)]
        later = len(tokens) - len(first[1])
        return Answer(
            prompt,
            number,
            tokens,
            1000 * (first[0] - self._began),
            1000 * (last - self._began),
            1000 * (last - first[0]) / later if later > 0 else None,
            tokens[-1] in ends,
        )


def timed(contender: Contender, prompt: Sequence[int], *, index: int = 0, number: int = 0) -> Answer:
    """Let a contender answer one prompt, and time it.

    Args:
        contender: A loaded contender.
        prompt: Token ids.
        index: Number of the prompt.
        number: Number of the round.
    """
    clock = Clock()
    contender.decode(prompt, clock.told)
    return clock.answer(index, number, contender.subject.ends, contender.subject.max_new_tokens)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens until the first difference."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
