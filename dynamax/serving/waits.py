"""What an edge learns of the cloud while it decodes: how long a token takes, and how many drafts pay."""

from __future__ import annotations

SHARE = 0.3
"""What one more observation counts."""

MOST_SKIPPED = 32
"""Tokens after which a cloud that was late is asked once more."""


class Waits:
    """Whether the cloud would be in time.

    After it was late, one token is said without asking; each further time twice as many, so that a cloud that is gone
    costs little, and one that is back is noticed.

    Args:
        deadline: Seconds that a token may take; None for any time.
    """

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline
        self._expected = 0.0
        self._skip = self._left = 0

    @property
    def begins(self) -> bool:
        """Whether the cloud was not late before."""
        return not self._skip

    def worth_asking(self) -> bool:
        """Whether to ask for the next token."""
        if self._deadline is None:
            return True
        if self._left:
            self._left -= 1
            return False
        return True

    def took(self, seconds: float) -> None:
        """A token came in time."""
        self._expected += (seconds - self._expected) * (SHARE if self._expected else 1.0)
        self._skip = 0
        if self._deadline is not None and self._expected > self._deadline:
            self.late()

    def late(self) -> None:
        """A token did not come in time."""
        self._skip = self._left = min(max(1, 2 * self._skip), MOST_SKIPPED)


class DraftLength:
    """How many tokens to draft before the cloud is asked.

    With a share ``a`` of drafts that are right, ``k`` drafts give ``(1 - a^(k+1)) / (1 - a)`` tokens on average, and
    take ``k + 1`` steps of the edge and one wait. The length with the most tokens a second is taken; so it grows with
    the delay of the network (arXiv 2606.20591).

    Args:
        most: Most drafts.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._right = 0.8
        self._step: float | None = None
        self._wait: float | None = None

    def best(self) -> int:
        """Drafts of the next round; at least 1."""
        if self._step is None or self._wait is None:
            return self._most
        step, wait = self._step, self._wait
        return max(range(1, self._most + 1), key=lambda k: self._tokens(k) / ((k + 1) * step + wait))

    def learn(self, seconds: float, wait: float, drafted: int, kept: int) -> None:
        """A round took so many seconds here, and so many for the cloud; so many drafts were right."""
        self._step = _mean(self._step, seconds / (drafted + 1))
        self._wait = _mean(self._wait, wait)
        for place in range(min(kept + 1, drafted)):
            self._right = _mean(self._right, float(place < kept))

    def _tokens(self, drafts: int) -> float:
        a = min(self._right, 0.999)
        return (1 - a ** (drafts + 1)) / (1 - a)


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + SHARE * (now - before)
