"""What recurrent gates remember while decoding, for rows in step and for rows that have runs of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dynamax.types import Memory

Reads = tuple[tuple[int, int], ...]
"""(depth, positions) of each reading of logits."""


class Debts(Protocol):
    """The part of fill levels and debts that heads read."""

    filled: list[int]

    def owed(self, depth: int) -> Tensor | None:
        """Positions that stopped at this depth, oldest first."""


class RunState(Protocol):
    """The part of a cache that heads read, and their memories in it."""

    pad_B: Tensor | None
    memories: dict[tuple[int, str], Memory]

    @property
    def group(self) -> Debts:
        """Fill levels and debts."""
        ...


def unread(depth: int, h_BTD: Tensor, run: RunState, memory: Memory) -> Tensor:
    """What a recurrent gate has to read: rows owed at its depth that it has not read yet, and the newest positions.

    The memory is set to the position before the first of them: skipped positions that are not owed are left out.
    """
    passed = run.group.filled[depth - 1]
    missing = passed - h_BTD.shape[1] - memory.read
    assert missing >= 0, f"a gate at depth {depth} has read {memory.read} of {passed} positions already"
    owed_BTD = run.group.owed(depth) if missing else None
    whole_BTD = h_BTD if owed_BTD is None else torch.cat([owed_BTD[:, -missing:], h_BTD], 1)
    memory.read = passed - whole_BTD.shape[1]
    return whole_BTD


def alike_rows(chunks: Sequence[Tensor], memories: Sequence[Memory]) -> list[list[int]]:
    """Indices of the runs whose gates can read in one chunk: as many positions, behind as many."""
    if len(chunks) == 1:
        return [[0]]
    groups: dict[object, list[int]] = {}
    for row, (chunk_BTD, memory) in enumerate(zip(chunks, memories, strict=True)):
        shapes = tuple(value.shape for value in memory.values.values())
        groups.setdefault((chunk_BTD.shape[1], shapes, memory.read), []).append(row)
    return list(groups.values())


def joined(memories: Sequence[Memory]) -> Memory:
    """One memory for rows that are alike; a single one is that memory itself."""
    if len(memories) == 1:
        return memories[0]
    first = memories[0]
    values = {name: torch.cat([memory.values[name] for memory in memories]) for name in first.values}
    return Memory(None, first.read, values)


def part_over(memory: Memory, memories: Sequence[Memory]) -> None:
    """Give each row its part of what a joined memory holds now."""
    if len(memories) == 1:
        return
    for row, own in enumerate(memories):
        own.read = memory.read
        own.values = {name: value[row : row + 1] for name, value in memory.values.items()}
