"""What is being done now, on stderr: a bar on a terminal, elsewhere a line now and then. Knows no models."""

from __future__ import annotations

import sys
from contextlib import suppress
from os import get_terminal_size
from time import monotonic
from typing import Any, final

from tqdm import tqdm

PAUSE = 10.0
"""Seconds between two lines of a bar where nobody watches a terminal, such as in a log."""

COLUMNS, ROWS = 80, 24
"""Of a terminal that does not say its own."""


def on_terminal() -> bool:
    """Whether somebody watches stderr."""
    return sys.stderr.isatty()


def _columns() -> int:
    """How wide stderr is; 0 if it does not say."""
    with suppress(OSError):
        return get_terminal_size(sys.stderr.fileno()).columns
    return 0


@final
class Bar(tqdm):
    """tqdm's bar on stderr. Where that is no terminal, lines in its place.

    Args:
        pause: Least seconds between two lines, the last one left out.
        **options: Those of tqdm.
    """

    def __init__(self, *, pause: float = PAUSE, **options: Any) -> None:  # noqa: ANN401
        self._live, self._pause = on_terminal(), pause
        self._line, self._told = "", float("-inf")
        width = {} if not self._live else {"dynamic_ncols": True} if _columns() else {"ncols": COLUMNS, "nrows": ROWS}
        super().__init__(**{"file": sys.stderr, **width, **options})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar's state; without a terminal, if enough time has gone by."""
        if self._live:
            super().display(msg, pos)
        elif msg is None and monotonic() - self._told >= self._pause:
            self._tell()

    def clear(self, nolock: bool = False) -> None:
        """Take the bar off a terminal."""
        if self._live:
            super().clear(nolock)

    def close(self) -> None:
        """End the bar; without a terminal, its last state is a line."""
        if self._live or self.disable:
            super().close()
            return
        self.disable = True
        type(self)._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue] - tqdm's list of open bars
        if self.leave:
            self._tell()

    def say(self, text: str) -> None:
        """Show behind the bar what is being done."""
        self.set_postfix_str(text, refresh=not self._live or monotonic() - self._told >= 0.1)
        if self._live:
            self._told = monotonic()

    def _tell(self) -> None:
        line = str(self).strip()
        if line != self._line:
            print(line, file=self.fp, flush=True)
            self._line, self._told = line, monotonic()
