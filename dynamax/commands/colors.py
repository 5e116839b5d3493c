"""Depth as colour in a terminal. Knows escape codes, no models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TextIO

RESET = "\x1b[0m"
# Backgrounds under black text, so that commas and spaces show too. From gold to violet, darker the deeper.
RAMP = (221, 150, 80, 74, 111, 140)


def coloured(stream: TextIO) -> bool:
    """Whether to write colour: NO_COLOR says no, FORCE_COLOR yes, else terminals only (no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


class DepthColors:
    """A colour for each exit.

    Args:
        depths: Depths of the exits, ascending.
        total: Blocks of the model; tokens from there are not coloured.
        on: Whether to colour at all.
    """

    def __init__(self, depths: Sequence[int], total: int, *, on: bool) -> None:
        self.total = total
        self.on = on
        depths = [depth for depth in depths if depth < total]
        steps = max(len(depths) - 1, 1)
        self._codes = {depth: RAMP[index * (len(RAMP) - 1) // steps] for index, depth in enumerate(depths)}

    def paint(self, text: str, depth: int) -> str:
        """The text on the colour of its depth; line ends stay bare, or terminals colour the rest of the line."""
        if not self.on or depth not in self._codes:
            return text
        start = f"\x1b[38;5;16;48;5;{self._codes[depth]}m"
        return "\n".join(f"{start}{line}{RESET}" if line else "" for line in text.split("\n"))

    def legend(self, counts: Mapping[int, int]) -> str:
        """What each colour means, and the share of tokens that have it."""
        tokens = sum(counts.values())
        parts = []
        for depth in (*self._codes, self.total):
            name = "full depth" if depth == self.total else "exit"
            mark = self.paint(f" {name} {depth} ", depth)
            parts.append(f"{mark} {counts.get(depth, 0) / max(tokens, 1):.0%}")
        return "   ".join(parts)


def head(prompts: Sequence[str], number: int) -> None:
    """Say which prompt is answered, where there are several."""
    if len(prompts) > 1:
        print(("\n" if number else "") + f"> {prompts[number]}")
