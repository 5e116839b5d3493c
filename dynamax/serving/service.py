"""The cloud's service: who may ask what, in which order it is done, and what is answered when it cannot be.

Calls come in on many threads; one thread finishes tokens. Whatever waits is finished in one pass, side by side.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dynamax.backbones.base import Backbone
from dynamax.backbones.parts import Part
from dynamax.errors import UserError
from dynamax.serving.contexts import Context, Contexts, GoneError, Limits
from dynamax.serving.finishing import Ask, finish, passes
from dynamax.serving.metrics import Metrics
from dynamax.serving.wire import CHUNK, FORMATS, MOST_DRAFTS, MOST_HEADER, VERSION, Message, WireError, states, value

PATIENCE = 5.0
"""Seconds that a token waits for states that have not come; then the edge is told what is missing."""

TIDY = 1.0
"""Seconds after which the worker looks for sessions that nobody uses, even if nobody asks for anything."""


class DeniedError(Exception):
    """Whoever asks may not."""


class MismatchError(Exception):
    """The edge has another model, or speaks another version of the protocol."""


class BusyError(Exception):
    """More is asked than is allowed at a time."""


@dataclass(eq=False)
class Waiting:
    """An ask that waits for its turn, or for states.

    Attributes:
        ask: What is asked.
        until: When it is told what is missing.
        answer: The reply.
    """

    ask: Ask
    until: float
    answer: Future[dict[str, Any]] = field(default_factory=Future)


class Bucket:
    """How often somebody may ask: ``rate`` times a second; after a pause twice as many at once, and at least once.

    Args:
        rate: Times a second.
        clock: Tells the time.
    """

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate, self._clock = rate, clock
        self._most = max(1.0, 2 * rate)
        self._left, self._then = self._most, clock()

    def take(self) -> bool:
        """Whether one more is allowed now."""
        now = self._clock()
        self._left, self._then = min(self._most, self._left + self._rate * (now - self._then)), now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Owners:
    """Who may ask, and how often.

    Args:
        tokens: Whoever shows one of these may ask; none lets everybody.
        rate: Calls a second that one token may make, or all callers together where none is wanted; 0 for any number.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self, tokens: Collection[str] = (), rate: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not 0 <= rate < math.inf:
            raise UserError(f"rate is {rate}; it must be a number of calls a second, or 0 for any number.")
        self._tokens, self._rate, self._clock = [token.encode() for token in tokens], rate, clock
        self._buckets: dict[str, Bucket] = {}
        self._lock = threading.Lock()

    def find(self, token: str | None) -> str:
        """Whom a session belongs to, from the token that was shown.

        Raises:
            DeniedError: If it is none of those that are known.
            BusyError: If it was shown too often.
        """
        given = (token or "").encode()
        known = [secrets.compare_digest(given, each) for each in self._tokens]  # all of them, whichever it is
        if self._tokens and not any(known):
            raise DeniedError("a bearer token that this cloud knows is wanted")
        name = hashlib.sha256(given).hexdigest()
        if self._rate:
            with self._lock:
                bucket = self._buckets.setdefault(name if known else "", Bucket(self._rate, self._clock))
                if not bucket.take():
                    raise BusyError(f"more than {self._rate:g} calls a second")
        return name


def check_cloud(part: Part) -> None:
    """Refuse (UserError) a part that does not end at the top."""
    if not part.output or part.span.stop != part.depth:
        raise UserError(
            f"The part has the blocks {part.span.start} to {part.span.stop} of {part.depth}; a cloud's ends at the "
            f"top. Give the folder cloud that dynamax split wrote."
        )


def most_bytes(part: Part) -> int:
    """The longest message that a cloud of this part takes."""
    return MOST_HEADER + 4 + FORMATS["float32"].size(CHUNK, part.width)


class Cloud:
    """Finishes tokens for edges.

    Args:
        backbone: The cloud's part of a model.
        part: Which part it is.
        limits: What it takes.
        tokens: Whoever shows one of these may use it; none lets everybody.
        rate: Calls a second that one token may make, or all callers together where none is wanted; 0 for any number.
        metrics: Counts what is done.
        clock: Tells the time, in seconds.

    Attributes:
        part: Which part of a model it is.
        owners: Who may use it.
    """

    def __init__(
        self,
        backbone: Backbone,
        part: Part,
        limits: Limits | None = None,
        *,
        tokens: Collection[str] = (),
        rate: float = 0.0,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_cloud(part)
        self.owners = Owners(tokens, rate, clock)
        self.contexts = Contexts(backbone, part.span, limits or Limits(), clock)
        self.metrics = metrics or Metrics()
        self.part, self._clock = part, clock
        self._waiting: list[Waiting] = []
        self._running: set[str] = set()
        self._changed = threading.Condition()  # around whatever calls and the worker both look at
        self._turn, self._lock = threading.Lock(), threading.Lock()  # see _structure
        self._stopped = False
        self._last: dict[str, tuple[tuple[int, tuple[int, ...]], dict[str, Any]]] = {}
        self._worker = threading.Thread(target=self._work, name="dynamax-cloud", daemon=True)
        self._worker.start()

    # -- calls ------------------------------------------------------------------------------------------

    def open(self, message: Message, owner: str) -> dict[str, Any]:
        """A new session for an edge that has the same model."""
        header = message.header
        theirs = tuple(header.get(name) for name in ("version", "fingerprint", "start", "width"))
        ours = (VERSION, self.part.fingerprint, self.part.span.start, self.part.width)
        for name, given, wanted in zip(("version", "model", "depth", "width"), theirs, ours, strict=True):
            if given != wanted:
                raise MismatchError(f"the edge's {name} is {str(given)[:40]!r}, the cloud's {wanted!r}")
        with self._structure(), self._changed:
            context = self.contexts.open(owner)
            self._tidy()
        return {"session": context.key, "positions": context.most}

    def send(self, message: Message, owner: str) -> dict[str, Any]:
        """States of a session come in."""
        return self._take(message, owner)

    def next(self, message: Message, owner: str, patience: float = PATIENCE) -> dict[str, Any]:
        """The token after some positions; or, if not all of them have come in time, how many have.

        States may come with it.
        """
        header = message.header
        count, drafts = value(header, "after", int, 1), self._drafts(header)
        if message.body or "first" in header:
            self._take(message, owner)
        with self._changed:
            context = self._context(header, owner)
            last = self._last.get(context.key)
            if last is not None and last[0] == (count, drafts):  # asked again, since the answer was lost
                return last[1]
            if context.key in self._running or self._stopped:  # the edge asks again, and finds the answer then
                raise BusyError("the cloud is stopping" if self._stopped else "the token is being finished")
            if value(header, "turn", int, 0) != context.turn:
                return {"missing": context.received, "turn": context.turn}
            waiting = self._enlisted(context, count, drafts, self._clock() + patience)
        return waiting.answer.result()

    def _take(self, message: Message, owner: str) -> dict[str, Any]:
        """States come in; what the session has then."""
        header = message.header
        name = value(header, "format", str)
        if name not in FORMATS:
            raise WireError(f"format must be one of {', '.join(FORMATS)}")
        most = self._context(header, owner).most
        first, h_TW = states(message, FORMATS[name], width=self.part.width, most=most)
        self.metrics.bytes.inc(len(message.body))
        with self._changed:
            context = self._context(header, owner)
            if value(header, "turn", int, 0) == context.turn:  # else these positions were taken back meanwhile
                context.receive(first, h_TW.to(self.contexts.dtype))
                if context.working:
                    self._changed.notify_all()
            return {"received": context.received, "turn": context.turn}

    def _enlisted(self, context: Context, count: int, drafts: tuple[int, ...], until: float) -> Waiting:
        """An ask that waits from here on."""
        if count > context.most:
            raise WireError(f"a session holds at most {context.most} positions, and {count} are wanted")
        if not len(drafts) < count - context.cache.length:
            raise WireError(f"a token after {count} positions and {len(drafts)} drafts cannot be asked for here")
        for older in [each for each in self._waiting if each.ask.context is context]:
            self._waiting.remove(older)  # its edge has given up
            older.answer.set_exception(BusyError("a later token of this session was asked for"))
        waiting = Waiting(Ask(context, count, drafts), until)
        context.working = True
        self._waiting.append(waiting)
        self._changed.notify_all()
        return waiting

    def close(self, message: Message, owner: str) -> dict[str, Any]:
        """A session is done."""
        with self._structure(), self._changed:
            self.contexts.close(value(message.header, "session", str), owner)
            self._tidy()
        return {}

    def health(self, message: Message, owner: str) -> dict[str, Any]:
        """Whether it works, and for which model."""
        return {
            "version": VERSION,
            "fingerprint": self.part.fingerprint,
            "sessions": len(self.contexts),
            "limit": self.contexts.limits.sessions,
            "working": self._worker.is_alive(),
        }

    def stop(self) -> None:
        """End the worker; whoever waits is told."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._worker.join()

    @contextmanager
    def _structure(self) -> Iterator[None]:
        """No session is opened or closed while blocks run. Taken before ``_changed``.

        Whoever is next holds the turn while it waits, so the worker cannot be in again before it.
        """
        with self._turn:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _context(self, header: dict[str, Any], owner: str) -> Context:
        return self.contexts.find(value(header, "session", str), owner)

    def _drafts(self, header: dict[str, Any]) -> tuple[int, ...]:
        drafts = header.get("drafts", [])
        vocab = self.contexts.backbone.spec.vocab
        if not isinstance(drafts, list) or len(drafts) > MOST_DRAFTS:
            raise WireError(f"drafts must be a list of at most {MOST_DRAFTS} tokens")
        if not all(type(token) is int and 0 <= token < vocab for token in drafts):
            raise WireError("drafts must be tokens of the vocabulary")
        return tuple(drafts)

    # -- the worker -------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and not self._due():
                    soonest = min((each.until - self._clock() for each in self._waiting), default=TIDY)
                    if not self._changed.wait(max(0.001, min(TIDY, soonest))):
                        break
                if self._stopped:
                    for each in self._waiting:
                        each.answer.set_exception(BusyError("the cloud is stopping"))
                    return
            with self._structure():
                with self._changed:
                    self.contexts.drop_expired()
                    self._tidy()
                    due = self._due()
                    self._waiting = [each for each in self._waiting if each not in due]
                    live = [each for each in due if not self._is_missing(each)]
                    self._running = {each.ask.context.key for each in live}
                by_ask = {each.ask: each for each in live}
                for group in passes(list(by_ask)):
                    self._finish([by_ask[ask] for ask in group])

    def _due(self) -> list[Waiting]:
        """What can be answered now: the states have come, or it has waited long enough."""
        now = self._clock()
        return [each for each in self._waiting if each.ask.context.received >= each.ask.count or each.until <= now]

    def _tidy(self) -> None:
        """Forget answers of sessions that are gone."""
        self._last = {key: kept for key, kept in self._last.items() if self.contexts.known(key)}
        self.metrics.sessions.set(len(self.contexts))

    def _is_missing(self, waiting: Waiting) -> bool:
        """Whether it cannot be finished; then its caller is told."""
        context = waiting.ask.context
        if not self.contexts.known(context.key):
            waiting.answer.set_exception(GoneError())
        elif context.received < waiting.ask.count:
            context.working = False
            waiting.answer.set_result({"missing": context.received, "turn": context.turn})
        else:
            return False
        return True

    def _finish(self, live: list[Waiting]) -> None:
        """One pass; each answer is kept before it is given, so that whoever asks again gets the same."""
        begin = time.perf_counter()
        try:
            said = finish(self.contexts, [each.ask for each in live], self._changed)
        except Exception as error:  # noqa: BLE001 - the worker must go on, and the callers must know
            said = [error] * len(live)
        seconds = time.perf_counter() - begin
        self.metrics.rows.observe(len(live))
        self.metrics.seconds.observe(seconds)
        with self._changed:
            for each, found in zip(live, said, strict=True):
                context = each.ask.context
                context.working = False
                self._running.discard(context.key)
                if isinstance(found, Exception) or not found.likely:
                    self.contexts.close(context.key, context.owner)  # its state may be half written, or no numbers
                    odd = WireError("the states give no numbers at the top")
                    each.answer.set_exception(found if isinstance(found, Exception) else odd)
                    continue
                self.contexts.touch(context)
                reply = {"likely": found.likely, "kept": found.kept, "turn": context.turn, "seconds": seconds}
                self._last[context.key] = (each.ask.count, each.ask.drafts), reply
                self.metrics.tokens.inc()
                each.answer.set_result(reply)
