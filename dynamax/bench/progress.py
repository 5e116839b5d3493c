"""What is being done now, on stderr: a bar that tells the step. Knows no models."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from dynamax.progress import Bar

PAUSE = 2.0
"""Seconds between two states of the bar where nobody watches a terminal, such as in a log."""


class Progress:
    """A bar over answers; use it in a ``with``.

    Args:
        total: Answers that are expected.
    """

    def __init__(self, total: int) -> None:
        self._live = sys.stderr.isatty()
        pause = 0.1 if self._live else PAUSE
        self._bar = Bar(total=total, unit="answer", mininterval=pause, pause=0.0)
        self._shown = 0.0

    def say(self, text: str, *, long: bool = False) -> None:
        """Tell what begins now.

        Args:
            text: A few words.
            long: Whether it may take seconds, so that a log shows it, too.
        """
        self._bar.set_description_str(text, refresh=False)
        if self._live or long or time.monotonic() - self._shown >= PAUSE:
            self._bar.refresh()
            self._shown = time.monotonic()

    def step(self) -> None:
        """One answer is there."""
        self._bar.update()

    def expect(self, change: int) -> None:
        """So many answers more are expected, or less."""
        self._bar.total += change

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
