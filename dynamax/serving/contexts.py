"""What a cloud keeps of each session: the states that have come, those that have been read, and who may use them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.backbones.cache import Cache
from dynamax.backbones.slots import Slots
from dynamax.errors import UserError
from dynamax.serving.wire import WireError
from dynamax.types import Span


class GoneError(Exception):
    """There is no such session, or it is another's: which of the two is not said."""


class FullError(Exception):
    """No more sessions can be opened now."""


LONGEST = 131_072
"""Positions of a session where nobody sets a limit: some models have none of their own."""

EARLY = 4096
"""Most positions of a session that may wait for those in front of them."""


@dataclass(frozen=True)
class Limits:
    """What a cloud takes.

    Attributes:
        sessions: Most sessions at a time.
        positions: Most positions of a session; 0 for the model's context, or 131,072 if that is longer.
        idle: Seconds after which a session that nobody used makes room, if room is wanted.
        expire: Seconds after which a session that nobody used is dropped.
    """

    sessions: int = 16
    positions: int = 0
    idle: float = 10.0
    expire: float = 600.0

    def __post_init__(self) -> None:
        if self.sessions < 1 or self.positions < 0 or not 0 <= self.idle <= self.expire:
            raise UserError(
                f"A cloud was given {self}; wanted: at least one session, positions of at least 0, and 0 <= idle <= "
                f"expire. Correct it."
            )


@dataclass
class Context:
    """One session.

    Attributes:
        key: Its name, which nobody can guess.
        owner: Whom it belongs to.
        cache: Its fill levels; the state itself is in a slot.
        most: Most positions.
        received: How many positions have come without a gap.
        used: When it was last used.
        working: Whether it waits for a token; then it makes no room for others.
        turn: How often positions were taken back; what was sent before is of no use then.
    """

    key: str
    owner: str
    cache: Cache
    most: int
    received: int = 0
    used: float = 0.0
    working: bool = False
    turn: int = 0
    _next: list[Tensor] = field(default_factory=list)
    _early: dict[int, Tensor] = field(default_factory=dict)

    def receive(self, first: int, h_TW: Tensor) -> None:
        """Take positions that came, in any order and any number of times.

        Raises:
            WireError: If too many positions wait for earlier ones.
        """
        if first > self.received:
            held = self._early.get(first)
            waiting = sum(len(rows) for place, rows in self._early.items() if place != first)
            if waiting + len(h_TW) > min(self.most, EARLY):
                raise WireError("too many positions came before those that stand in front of them")
            if held is None or len(held) < len(h_TW):
                self._early[first] = h_TW
            return
        self._add(first, h_TW)
        while (ready := min(self._early, default=self.received + 1)) <= self.received:
            self._add(ready, self._early.pop(ready))

    def _add(self, first: int, h_TW: Tensor) -> None:
        rows = h_TW[self.received - first :]
        if len(rows):
            self._next.append(rows)
            self.received += len(rows)

    def take(self, count: int) -> Tensor:
        """The positions up to ``count`` that no block has read yet, ``h_TW``."""
        h_TW = torch.cat(self._next)
        wanted = count - self.cache.length
        self._next = [h_TW[wanted:]] if len(h_TW) > wanted else []
        return h_TW[:wanted]

    def forget(self, length: int) -> None:
        """Forget that positions from ``length`` on came, and whatever was sent behind them."""
        self.received, self._next, self._early = length, [], {}
        self.turn += 1


class Contexts:
    """All sessions of a cloud. Not to be used by two threads at once.

    Args:
        backbone: The cloud's part of the model.
        span: Its blocks.
        limits: What it takes.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self, backbone: Backbone, span: Span, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.backbone, self.span, self.limits, self._clock = backbone, span, limits, clock
        self.positions = min(limits.positions or LONGEST, backbone.spec.context)
        self._kinds = [() if i < span.start else tuple(backbone.state_kinds(i)) for i in range(span.stop)]
        self._open: dict[str, Context] = {}
        self.evicted = 0
        self.slots = Slots(span, self._kinds, limits.sessions)

    def __len__(self) -> int:
        return len(self._open)

    def open(self, owner: str) -> Context:
        """A new session.

        Raises:
            FullError: If there is no room, and every session is in use.
        """
        self.drop_expired()
        if len(self._open) == self.limits.sessions:
            idle = [each for each in self._open.values() if not each.working]
            oldest = min(idle, key=lambda each: each.used, default=None)
            if oldest is None or self._clock() - oldest.used < self.limits.idle:
                raise FullError("all sessions are in use")
            self._drop(oldest)
        cache = Cache(self.span, kinds=self._kinds)
        self.slots.add(cache)
        made = Context(secrets.token_urlsafe(16), owner, cache, self.positions, used=self._clock())
        self._open[made.key] = made
        return made

    def find(self, key: str, owner: str) -> Context:
        """A session of its owner's.

        Raises:
            GoneError: If there is none.
        """
        found = self._open.get(key)
        if found is None or not secrets.compare_digest(found.owner, owner):
            raise GoneError
        found.used = self._clock()
        return found

    def known(self, key: str) -> bool:
        """Whether there is such a session."""
        return key in self._open

    def close(self, key: str, owner: str) -> None:
        """A session is done; one that is gone already is no fault."""
        found = self._open.get(key)
        if found is not None and secrets.compare_digest(found.owner, owner):
            self._remove(found)

    def drop_expired(self) -> None:
        """Drop the sessions that nobody has used for long."""
        now = self._clock()
        for each in list(self._open.values()):
            if not each.working and now - each.used > self.limits.expire:
                self._drop(each)

    def touch(self, context: Context) -> None:
        """A session is used now."""
        context.used = self._clock()

    def slot(self, context: Context) -> int:
        """Where its state is."""
        return next(slot for slot, row in enumerate(self.slots.rows) if row is context.cache)

    @property
    def dtype(self) -> torch.dtype:
        """What the backbone computes in."""
        return next(p.dtype for p in self.backbone.parameters() if p.is_floating_point())

    @property
    def bytes(self) -> int:
        """Bytes that the state of all slots takes."""
        held = (tensor for state in self.slots.states for tensor in (*state.keys, *state.recurrent))
        return sum(tensor.nbytes for tensor in held)

    def _drop(self, context: Context) -> None:
        self.evicted += 1
        self._remove(context)

    @torch.inference_mode()  # states were made in it, and may move to another slot
    def _remove(self, context: Context) -> None:
        slot = self.slot(context)
        self.slots.clear(slot)
        self.slots.remove(slot)
        self.slots.clear(len(self.slots.rows))  # where the row was that moved
        del self._open[context.key]
        if not self._open:  # what the longest session needed is given back
            self.slots = Slots(self.span, self._kinds, self.limits.sessions)
