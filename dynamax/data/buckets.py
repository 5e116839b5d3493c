"""Which documents share a batch: those of similar length, in an order that changes with the epoch. Knows lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch.utils.data import Sampler

from dynamax.data.text import derived_seed

POOL = 32
"""Batches' worth of documents that are sorted by length together; fewer shuffle better, more pad less."""


@final
class LengthBuckets(Sampler[list[int]]):
    """Yields batches of positions in ``lengths``, each position once an epoch.

    Args:
        lengths: Tokens of each document.
        batch_size: Documents a batch; the last may be smaller.
        seed: Of the order; None for one fixed order, by length.

    Attributes:
        epoch: Decides the order.
        skipped: Batches at the beginning of the epoch that are passed over.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int | None) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = self.skipped = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Lightning calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            yield from self._cut(self.lengths.argsort(stable=True))[self.skipped :]
            return
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.lengths), generator=generator)
        batches: list[list[int]] = []
        for pool in order.split(POOL * self.batch_size):
            batches += self._cut(pool[self.lengths[pool].argsort(stable=True)])
        for index in torch.randperm(len(batches), generator=generator).tolist()[self.skipped :]:
            yield batches[index]

    def _cut(self, order: torch.Tensor) -> list[list[int]]:
        return [batch.tolist() for batch in order.split(self.batch_size)]
