"""The one verb: ``run`` takes positions through a span of blocks. Knows neither heads nor policies."""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import final

import torch
from torch import Tensor, nn

from dynamax.backbones.cache import Cache
from dynamax.backbones.cells import Part
from dynamax.backbones.chunk import Chunk
from dynamax.backbones.stores import Pass, Peek, Store, WriteOnly, Written
from dynamax.errors import UserError
from dynamax.types import BlockCost, Site, Span, Spec

Visit = Callable[[int, Tensor], object]


class Backbone(nn.Module, ABC):
    """A decoder-only language model whose depth is an argument.

    Frozen, and in eval mode whatever ``train`` is called with. A subclass gives the abstract
    methods; ``run`` is never overridden.

    Attributes:
        spec: Depth, width, vocabulary, fingerprint.
    """

    spec: Spec

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: frozen weights alone would leave dropout on."""
        return super().train(False)

    # -- what a family gives ----------------------------------------------------------------------

    @abstractmethod
    def embed(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Tokens to ``h_BTD``, the input of block 0, at the positions that follow the cache's."""

    @abstractmethod
    def block(self, index: int, h_BTD: Tensor, chunk: Chunk, store: Store) -> Tensor:
        """One block over one chunk. ``store`` takes its keys and values, and advances its recurrent state."""

    @abstractmethod
    def window(self, index: int) -> int | None:
        """Positions a row of this block sees, its own included; None for all."""

    @abstractmethod
    def normalize(self, h_BTD: Tensor) -> Tensor:
        """The final norm."""

    @abstractmethod
    def project(self, u_BTD: Tensor, tokens_C: Tensor | None = None) -> Tensor:
        """Normalised states to float32 logits, over the vocabulary or over candidate tokens."""

    @abstractmethod
    def block_cost(self, index: int) -> BlockCost:
        """What the block costs."""

    @abstractmethod
    def chunk(self, h_BTD: Tensor, start: int, pad_B: Tensor | None = None, past: int | None = None) -> Chunk:
        """Positions, rotary angles and masks of a chunk that begins at ``start``, behind ``past`` held keys."""

    @abstractmethod
    def shift_keys(self, k_BHTD: Tensor, index: int) -> Tensor:
        """Keys of one block as they would stand one position later; unchanged without rotary positions."""

    def parts(self, index: int) -> Collection[Part]:
        """What the block keeps of the positions it has seen: keys and values, a recurrent state, both or neither."""
        return ("keys",)

    # -- the verb -----------------------------------------------------------------------------------

    @final
    def run(self, h_BTD: Tensor, span: Span, cache: Cache | None = None) -> Tensor:
        """Take positions through blocks ``[span.start, span.stop)``.

        Debts met on the way ride in the same chunk, ahead of the caller's rows, and are owed again
        at ``span.stop``. Only the caller's rows come back.

        Args:
            h_BTD: The caller's positions, input of block ``span.start``.
            span: Blocks to run.
            cache: State to continue and extend; None for a pass that keeps nothing.

        Returns:
            The caller's positions, ``h_BTD``, after block ``span.stop - 1``.
        """
        if cache is None:
            chunk = self.chunk(h_BTD, 0)
            for index in range(*span):
                h_BTD = self.block(index, h_BTD, chunk, Pass(chunk.live_BT))
            return h_BTD
        if span.start == cache.span.start:
            cache.balance()
        mine, chunk = h_BTD.shape[1], None
        if not mine:
            raise UserError(f"run was given no positions: {tuple(h_BTD.shape)}. Give it at least one.")
        for index in range(*span):
            debt_BTD = cache.due(index)
            if debt_BTD is not None:
                h_BTD, chunk = torch.cat([debt_BTD, h_BTD], 1), None
            if chunk is None:
                chunk = self.chunk(h_BTD, cache.filled[index], cache.pad_B)
            assert cache.filled[index] == chunk.start, "blocks of one stretch continue at one position"
            store = Store(cache.cells[index], chunk.first_key(self.window(index)), chunk.live_BT)
            h_BTD = self.block(index, h_BTD, chunk, store)
            cache.count(index, h_BTD.shape[1])
        if h_BTD.shape[1] > mine and span.stop < cache.span.stop:
            cache.owe(span.stop, h_BTD[:, :-mine])
        return h_BTD[:, -mine:]

    @final
    def peek(self, h_BTD: Tensor, index: int, cache: Cache) -> Tensor:
        """One block over the newest positions, attending to the keys it holds and keeping nothing.

        Positions that are owed to the block are not among its keys.
        """
        chunk = self.chunk(h_BTD, cache.length - h_BTD.shape[1], cache.pad_B, past=cache.filled[index])
        cache.calls[index] += 1
        cache.rows[index] += h_BTD.shape[1]
        store = Peek(cache.cells[index], chunk.first_key(self.window(index)), chunk.live_BT)
        return self.block(index, h_BTD, chunk, store)

    @final
    def write(self, h_BTD: Tensor, index: int, cache: Cache) -> None:
        """Write one block's state for these positions, as if they had come in as ``h_BTD``.

        The block is stopped as soon as it has written: norm and projections run, the rest does not. A block
        that keeps nothing is not run at all.
        """
        chunk = self.chunk(h_BTD, cache.filled[index], cache.pad_B)
        store = WriteOnly(cache.cells[index], chunk.first_key(self.window(index)), chunk.live_BT)
        if self.parts(index):
            with contextlib.suppress(Written):
                self.block(index, h_BTD, chunk, store)
        cache.filled[index] += h_BTD.shape[1]
        cache.writes[index] += h_BTD.shape[1]

    @final
    def settle(self, cache: Cache, *, stops: Sequence[int] = (), visit: Visit | None = None) -> Tensor | None:
        """Pay all debts: take every owed position to the top.

        Args:
            cache: State whose debts are paid.
            stops: Depths to pause at on the way.
            visit: Called at each pause with the depth and the positions that have just come up to it.

        Returns:
            ``h_BTD`` of the paid positions after the last block, oldest first; None if nothing was owed.
        """
        if not cache.debts:
            return None
        lowest = min(cache.debts)
        depths = sorted({*cache.debts, *(stop for stop in stops if stop > lowest)})
        h_BTD: Tensor | None = None
        for start, stop in itertools.pairwise([*depths, cache.span.stop]):
            if h_BTD is not None and visit is not None and start in stops:
                visit(start, h_BTD)
            older_BTD = cache.due(start)
            rows = [x_BTD for x_BTD in (older_BTD, h_BTD) if x_BTD is not None]
            h_BTD = self.run(torch.cat(rows, 1), Span(start, stop), cache)
        return h_BTD

    @final
    def site(self, depth: int, cache: Cache | None = None) -> Site:
        """The place after ``depth`` blocks, as exit heads see it."""
        last = self.spec.depth - 1

        def last_block(h_BTD: Tensor) -> Tensor:
            if cache is None:
                return self.run(h_BTD, Span(last, last + 1))
            return self.peek(h_BTD, last, cache)

        return Site(depth, self.spec, self.normalize, self.project, last_block)

    @final
    def unembed(self, h_BTD: Tensor) -> Tensor:
        """Final norm and output matrix: ``h_BTD`` to float32 ``logits_BTV``."""
        return self.project(self.normalize(h_BTD))

    @final
    def new_cache(self, capacity: int = 256, pad_B: Tensor | None = None, span: Span | None = None) -> Cache:
        """An empty cache for this backbone, or for a span of its blocks."""
        span = span or Span(0, self.spec.depth)
        return Cache(span, capacity, pad_B, [self.parts(index) for index in range(span.stop)])
