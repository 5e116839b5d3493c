"""What has been sent of an answer, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dynamax.errors import UserError
from dynamax.serving.wire import CHUNK

FLYING = 32
"""Most messages under way at a time."""

WORTH = 4096
"""Bytes that are worth a message of their own; fewer wait for more, or go with the next ask."""


@dataclass
class Traffic:
    """What an answer sent and waited for.

    Attributes:
        sent: Bytes of hidden states.
        positions: Positions sent, those sent again included.
        asked: Tokens asked for.
        waited: Seconds that tokens were waited for.
        cloud: Seconds of them that the cloud's passes took, by its own account.
        again: How often the cloud had lost the answer, and was sent it again.
    """

    sent: int = 0
    positions: int = 0
    asked: int = 0
    waited: float = 0.0
    cloud: float = 0.0
    again: int = 0


@dataclass(eq=False)
class Sent:
    """What has been handed over of an answer.

    Attributes:
        wanted: Positions that prompt and answer may have.
        worth: Positions that are worth a message of their own.
        rows: All positions, each ``[W]``.
        handed: How many of them have gone, or are on their way.
        flying: Messages under way.
        session: Its name in the cloud; None before it is opened, and once the cloud has lost it.
        turn: How often the cloud took positions back.
        received: How many positions the cloud has, as far as it has said so.
        lost: Whether some message did not arrive; then the next ask sends again what is not received.
        fault: Why the answer cannot go on.
    """

    wanted: int = 0
    worth: int = 1
    rows: list[Tensor] = field(default_factory=list)
    handed: int = 0
    flying: int = 0
    session: str | None = None
    turn: int = 0
    received: int = 0
    lost: bool = False
    fault: UserError | None = None

    @property
    def left(self) -> int:
        """Positions that have not gone yet."""
        return len(self.rows) - self.handed

    @property
    def ready(self) -> bool:
        """Whether to open the session, or to send: a full message, or one of some worth while none is under way."""
        if self.lost or self.fault is not None:
            return False
        unopened = self.session is None and self.wanted > 0
        full = self.left >= CHUNK and self.flying < FLYING
        return unopened or full or (self.left >= self.worth and not self.flying)
