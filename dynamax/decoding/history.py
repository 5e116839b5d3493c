"""What one decoding run has read and said, for policies that guess the next token from it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from time import perf_counter
from typing import final

import torch
from torch import Tensor

from dynamax.types import Past

GROUP = 64
"""Tokens of a group in ``best_of_groups``: its two searches are then about as long."""


@final
class History:
    """Tokens and logits of one decoding run. Nothing is looked at, or copied to the host, before a policy asks.

    Args:
        prompt_BT: The prompt.
        pad_B: Padding positions at the left of each row, or None.

    Attributes:
        keep: Steps whose logits are kept.
    """

    def __init__(self, prompt_BT: Tensor, pad_B: Tensor | None) -> None:
        self.keep = 1
        self._prompt_BT, self._pad_B = prompt_BT, pad_B
        self._read: list[Tensor] = []
        self._rows: list[list[int]] = []  # on the host, as far as somebody has asked
        self._said: list[Said] = []
        self._blocks: list[int] = []
        self._depths: list[int] = []
        self._seconds: list[float] = []
        self._told = perf_counter()

    def read(self, token_B: Tensor) -> None:
        """A step reads these tokens."""
        self._read.append(token_B)

    def say(self, logits_BV: Tensor, blocks: int, depth: int) -> None:
        """A step has drawn its tokens from these logits of some depth, after so many block calls.

        The first is the prompt's. Drafts count, those too that are rejected later.
        """
        self._blocks.append(blocks)
        self._depths.append(depth)
        now = perf_counter()
        self._seconds.append(now - self._told)
        self._told = now
        self._said.append(Said(logits_BV))
        del self._said[: -self.keep]

    def crop(self, length: int) -> None:
        """Forget the tokens from position ``length`` on, padding counted. What was said stays: a guess may be wrong."""
        del self._read[length - self._prompt_BT.shape[1] :]
        for row in self._rows:
            del row[length:]

    def past(self) -> Past:
        """All of it, as a policy sees it."""
        rows = len(self._prompt_BT)
        return Past(
            self._texts,
            self._likely,
            blocks=lambda: [self._blocks[1:]] * rows,
            seconds=lambda: [self._seconds[1:]] * rows,
            exits=lambda count: [self._depths[:0:-1][:count]] * rows,
        )

    def _texts(self) -> list[list[int]]:
        if not self._rows:
            self._rows = self._prompt_BT.tolist()
        new = self._read[len(self._rows[0]) - self._prompt_BT.shape[1] :]
        for token_B in new:
            for row, token in zip(self._rows, token_B.tolist(), strict=True):
                row.append(token)
        pads = [0] * len(self._rows) if self._pad_B is None else self._pad_B.tolist()
        return [row[pad:] for row, pad in zip(self._rows, pads, strict=True)]

    def _likely(self, steps: int, count: int) -> list[list[int]]:
        newest_first = [said.likely(count) for said in reversed(self._said[-steps:])]
        return joined(newest_first, len(self._prompt_BT))


@final
class Said:
    """What one step said.

    Args:
        logits_BV: The logits its tokens were drawn from; dropped once its likely tokens are known.
    """

    def __init__(self, logits_BV: Tensor) -> None:
        self._logits: Tensor | None = logits_BV
        self._likely: list[list[int]] = []

    def likely(self, count: int) -> list[list[int]]:
        """For each row, the ``count`` most likely tokens, or as many as the first call asked for."""
        if self._logits is not None:
            self._likely, self._logits = most_likely(self._logits, count), None
        return [row[:count] for row in self._likely]


def most_likely(logits_BV: Tensor, count: int) -> list[list[int]]:
    """For each row, its most likely tokens; those at minus infinity are left out."""
    best = best_of_groups(logits_BV, min(count, logits_BV.shape[-1]))
    pairs = zip(*(each.tolist() for each in best), strict=True)
    return [[token for value, token in zip(*row, strict=True) if value > -torch.inf] for row in pairs]


def best_of_groups(logits_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` greatest values of each row and their places: ``topk``, in fewer passes over a large vocabulary.

    They lie in the ``count`` groups of neighbours that have the greatest maxima.
    """
    vocab = logits_BV.shape[-1]
    if vocab % GROUP or vocab < count * GROUP:
        best = logits_BV.topk(count, -1)
        return best.values, best.indices
    group_BC = logits_BV.reshape(len(logits_BV), -1, GROUP).amax(-1).topk(count, -1).indices
    token_BT = (group_BC.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=logits_BV.device)).flatten(1)
    best = logits_BV.gather(1, token_BT).topk(count, -1)
    return best.values, token_BT.gather(1, best.indices)


def joined(steps: Sequence[list[list[int]]], rows: int) -> list[list[int]]:
    """Tokens of several steps, row by row."""
    return [list(chain.from_iterable(step[row] for step in steps)) for row in range(rows)]
