"""``dynamax bench MODEL``: all it measures with is imported only when it is run, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Parse, measure."""
    from dynamax.commands.measuring import main as measure

    measure(arguments)
