"""What an endpoint answers with: a whole model or an edge, one answer at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dynamax.decoding.base import Decoder, DecoderFactory
from dynamax.decoding.sampling import Greedy
from dynamax.engine import Engine, Prompt
from dynamax.errors import UserError
from dynamax.policies.base import TerminationPolicy
from dynamax.serving.edge import EXIT, Collaborative, Drafting, Standalone
from dynamax.stream import Stream

MOST_WAITING = 30

FULL = "full"
"""A token of a whole model's own top."""


class BusyError(Exception):
    """More answers wait than may."""


@dataclass(frozen=True)
class Piece:
    """A token of an answer.

    Attributes:
        text: What can be shown now.
        depth: Blocks it ran through.
        origin: ``exit``, ``cloud`` or ``alone``; ``full`` for a whole model's own top.
        counted: Whether it is a token; text that was held back until the end is none.
    """

    text: str
    depth: int
    origin: str
    counted: bool


@dataclass
class Ended:
    """How an answer ended; filled in at its end.

    Attributes:
        reason: ``stop``, or ``length``.
        prompt: Tokens of the prompt.
        tokens: Tokens of the answer.
    """

    reason: str = "length"
    prompt: int = 0
    tokens: int = 0


class Answerer:
    """Answers prompts, one after the other: a small device has one set of weights to read.

    Args:
        engine: The model, or an edge's part of it.
        name: What callers know it as.
        policy: When to leave; None for full depth.
        decoder: How to decode; left out, EarlyExit where there is a policy, else Full.
        waiting: Most answers that wait for their turn; each takes a thread.
        greedy: Whether tokens are the most likely ones, whatever the model's rules say.

    Attributes:
        greedy: As it was given.

    Raises:
        UserError: If the policy does not fit the exits, or ``waiting`` is out of bounds.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        policy: TerminationPolicy | None = None,
        decoder: DecoderFactory | None = None,
        *,
        waiting: int = 8,
        greedy: bool = False,
    ) -> None:
        if not 0 <= waiting <= MOST_WAITING:
            raise UserError(f"waiting is {waiting}; it must be from 0 to {MOST_WAITING}.")
        engine.decoder(policy, decoder)  # what cannot decode is refused now, not at every request
        self.engine, self.name, self.greedy = engine, name, greedy
        self._policy, self._factory = policy, decoder
        self._turn, self._room = threading.Lock(), threading.Semaphore(waiting + 1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for this answer's turn.

        Raises:
            BusyError: If too many wait already.
        """
        if not self._room.acquire(blocking=False):
            raise BusyError
        try:
            with self._turn:
                yield
        finally:
            self._room.release()

    def prepared(self, prompt: Prompt, *, chat: bool | None, options: dict[str, Any]) -> tuple[Stream, Decoder, Ended]:
        """An answer that has not begun: its stream, its decoder, and where its end will be noted.

        Raises:
            UserError: If an option is unknown, or the prompt does not fit the context.
        """
        if self.greedy and options.get("do_sample") is None:
            options = {**options, "do_sample": False}
        if isinstance(self.engine.options(**{**options, "seed": None}).sampler, Greedy):
            options = {**options, "seed": None}  # the answer is the same for every seed
        said = self.engine.options(**options)
        decoder = self.engine.decoder(self._policy, self._factory, sampler=said.sampler)
        prompt_1T = self.engine.encode(prompt, chat=chat)
        assert self.engine.tokenizer is not None, "the prompt has been encoded"
        context, length = self.engine.backbone.spec.context, prompt_1T.shape[1]
        if length + said.room(length, context) > context:
            raise UserError(
                f"The prompt has {length} tokens and {said.max_new_tokens} more were asked for, but the context holds "
                f"{context}. Shorten the prompt, or ask for fewer."
            )
        return Stream(decoder, self.engine.tokenizer, prompt_1T, said), decoder, Ended(prompt=length)

    def pieces(self, stream: Stream, decoder: Decoder, ended: Ended) -> Iterator[Piece]:
        """The tokens of a prepared answer."""
        for token in stream:
            counted = token.token is not None
            ended.tokens += counted
            if isinstance(decoder, Standalone | Collaborative | Drafting):
                origin = decoder.origins[ended.tokens - 1]
            else:
                origin = FULL if token.depth == decoder.backbone.spec.depth else EXIT
            yield Piece(token.text, token.depth, origin, counted)
        ended.reason = "stop" if stream.stopped else "length"
