"""``dynamax bench MODEL``: says at once that it has begun; the rest is imported only then, which takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Say that it has begun, parse, measure."""
    print("dynamax bench: starting; a line below shows what is being done", file=sys.stderr, flush=True)
    from dynamax.commands.measuring import main as measure

    measure(arguments)
