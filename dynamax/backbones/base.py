"""``Backbone``: runs positions through a span of blocks. Knows neither heads nor policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from dynamax.backbones.cache import AnyCache, Cache
from dynamax.backbones.captured import CapturedSpans
from dynamax.backbones.plan import Plan, Rotary, StepPlan
from dynamax.backbones.state import LayerView, NoCacheView, StateKind
from dynamax.errors import UserError
from dynamax.types import BlockCost, Site, Span, Spec


class Backbone(nn.Module, ABC):
    """A decoder-only language model of which any span of blocks can be run.

    Frozen, and in eval mode whatever ``train`` is called with. A subclass implements the abstract methods, and
    overrides those of the others that differ from the defaults here.

    Attributes:
        spec: Depth, width, vocabulary, fingerprint.
        additive_masks: True where attention adds its mask (eager), False where it takes booleans (sdpa).
        captured: Spans of blocks that small steps replay as CUDA graphs; None for none.
        held: The blocks that are here, of a part of a model; None for all.
    """

    spec: Spec
    additive_masks: bool = False
    captured: CapturedSpans | None = None
    held: Span | None = None

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: frozen weights alone would leave dropout on."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Backbone:  # noqa: ANN401
        """Move or cast. Captured spans know where the weights are, and are forgotten if these are elsewhere then."""
        before = None if self.captured is None else next(self.parameters()).data_ptr()
        super()._apply(fn, recurse)
        if before is not None and next(self.parameters()).data_ptr() != before:
            self.captured = None
        return self

    # -- what a family gives ----------------------------------------------------------------------

    @abstractmethod
    def embed(self, tokens_BT: Tensor, cache: AnyCache | None = None) -> Tensor:
        """Tokens to ``h_BTD``, the input of block 0, at the positions that follow the cache's."""

    @abstractmethod
    def block(self, index: int, h_BTD: Tensor, plan: Plan, view: LayerView) -> Tensor:
        """One block over one chunk. ``view`` takes its keys and values, and advances its recurrent state."""

    @abstractmethod
    def normalize(self, h_BTD: Tensor) -> Tensor:
        """The final norm."""

    @abstractmethod
    def project(self, u_BTD: Tensor, tokens_C: Tensor | slice | None = None) -> Tensor:
        """Normalised states to float32 logits, over the vocabulary or over some tokens: their ids, or a slice."""

    @abstractmethod
    def block_cost(self, index: int) -> BlockCost:
        """What the block costs."""

    def state_kinds(self, index: int) -> Collection[StateKind]:
        """What the block keeps of the positions it has seen: keys and values, a recurrent state, both or neither."""
        return ("keys",)

    def window(self, index: int) -> int | None:
        """Positions a row of this block sees, its own included; None for all."""
        return None

    def write_state(self, index: int, h_BTD: Tensor, plan: Plan, view: LayerView) -> None:
        """Write one block's state for a chunk, as if it had come in as ``h_BTD``.

        Here the whole block runs; a subclass may do it with fewer weights.
        """
        self.block(index, h_BTD, plan, view)

    def shift(self, k_BHTD: Tensor, v_BHTD: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one block as they would stand one position later; unchanged without rotary positions."""
        return k_BHTD, v_BHTD

    @property
    def rotary(self) -> Rotary | None:
        """Rotary angles; None for a model without."""
        return None

    @property
    def slopes(self) -> Tensor | None:
        """Of ALiBi, ``[H]``: what a score loses for each position between; None for a model without."""
        return None

    @contextmanager
    def short_windows(self, window: int) -> Iterator[bool]:
        """Inside, sliding windows are this short, in the model's own forward too; False if none can be made so."""
        yield False

    @property
    def weight_bytes(self) -> float:
        """Bytes that a product reads for each weight."""
        return float(next(self.parameters()).element_size())

    # -- running blocks ---------------------------------------------------------------------------------

    @final
    def run(
        self, h_BTD: Tensor, span: Span, cache: AnyCache | None = None, *, leave_out: Collection[int] = ()
    ) -> Tensor:
        """Take positions through blocks ``[span.start, span.stop)``.

        Positions owed on the way run in the same chunk, before the caller's, and are owed again at ``span.stop``.

        Args:
            h_BTD: The caller's positions, input of block ``span.start``.
            span: Blocks to run.
            cache: State to continue and extend; None for a pass that keeps nothing.
            leave_out: Blocks not to run, as in training with layer dropout; without a cache only.

        Returns:
            The caller's positions, ``h_BTD``, after block ``span.stop - 1``.
        """
        if cache is None:
            plan = StepPlan(h_BTD, 0, additive=self.additive_masks, rotary=self.rotary, slopes=self.slopes)
            blocks = [index for index in range(*span) if index not in leave_out]
            views = [NoCacheView(plan, self.window(index), self.state_kinds(index)) for index in blocks]
            return self.run_blocks(h_BTD, blocks, plan, views)
        assert not leave_out, "a block that is left out would miss positions in its state"
        mine = h_BTD.shape[1]
        if not mine:
            raise UserError(f"run was given no positions: {tuple(h_BTD.shape)}. Give it at least one.")
        cuts = {*cache.joins(span), *(() if self.captured is None else self.captured.depths)}
        for start, stop in pairwise([span.start, *sorted(d for d in cuts if span.start < d < span.stop), span.stop]):
            h_BTD = cache.join(start, h_BTD)
            plan = self.plan(h_BTD, cache, start=cache.at(start))
            views = [cache.view(i, plan, self.window(i)) for i in range(start, stop)]
            h_BTD = self.run_blocks(h_BTD, range(start, stop), plan, views)
            for view in views:
                view.commit()
            cache.passed(Span(start, stop), plan)
            cache.arrived(stop, h_BTD)
        return cache.part(span.stop, h_BTD, mine)

    def run_blocks(self, h_BTD: Tensor, blocks: Sequence[int], plan: Plan, views: Sequence[LayerView]) -> Tensor:
        """The device's part of ``run``: blocks over one chunk, a function of tensors; ``views`` has one a block."""
        if self.captured is not None and self.captured.suits(blocks, plan, views):
            return self.captured.run(h_BTD, blocks, plan, views)
        for index, view in zip(blocks, views, strict=True):
            h_BTD = self.block(index, h_BTD, plan, view)
        return h_BTD

    @final
    def walk(
        self,
        h_BTD: Tensor | None,
        depths: Iterable[int],
        cache: AnyCache | None = None,
        *,
        start: int = 0,
        leave_out: Collection[int] = (),
    ) -> Iterator[tuple[int, Tensor]]:
        """Run up to each depth in turn: the only loop over exits.

        Args:
            h_BTD: The caller's positions, input of block ``start``; None to pay all debts: then the owed positions
                themselves are run, those owed deeper join on the way, and the last depth must be the top.
            depths: Depths to stop at, ascending, above ``start``.
            cache: State to continue and extend.
            start: Blocks completed.
            leave_out: As for ``run``.

        Yields:
            Each depth, and the positions ``h_BTD`` after as many blocks. Rows that have left when the next is asked for
            (``SelectedRows.keep``) go no further.
        """
        paying = h_BTD is None
        if paying:
            assert isinstance(cache, Cache), "the debts of a cache are paid"
            owed = cache.group.debts
            start = min(owed, default=cache.span.stop)
            depths = sorted(depth for depth in {*depths, *owed} if depth > start)
            assert not owed or depths[-1:] == [cache.span.stop], "owed positions that stop below the top would be lost"
        for depth in depths:
            if paying and isinstance(cache, Cache) and (due_BTD := cache.group.due(start)) is not None:
                h_BTD = due_BTD if h_BTD is None else torch.cat([due_BTD, h_BTD], 1)
            assert h_BTD is not None
            h_BTD = self.run(h_BTD, Span(start, depth), cache, leave_out=leave_out)
            yield depth, h_BTD
            h_BTD, start = h_BTD if cache is None else cache.going_on(h_BTD), depth

    @final
    def settle(self, cache: Cache) -> None:
        """Pay all debts: take every owed position to the top, or to the end of the blocks that the cache is for."""
        for _ in self.walk(None, [cache.span.stop], cache):
            pass

    @final
    def unembed(self, h_BTD: Tensor) -> Tensor:
        """Final norm and output matrix: ``h_BTD`` to float32 ``logits_BTV``."""
        return self.project(self.normalize(h_BTD))

    # -- one block alone ------------------------------------------------------------------------------

    @final
    def peek(self, h_BTD: Tensor, index: int, cache: AnyCache) -> Tensor:
        """One block over the newest positions, attending to the keys it holds, not to owed ones; keeps nothing."""
        plan = self.plan(h_BTD, cache, start=cache.before(h_BTD.shape[1]), past=cache.at(index))
        cache.peeked(index, plan)
        return self.block(index, h_BTD, plan, cache.view(index, plan, self.window(index)))

    @final
    def write(self, h_BTD: Tensor, index: int, cache: AnyCache) -> None:
        """Write one block's state for these positions, as if they had come in as ``h_BTD``, without running it."""
        plan = self.plan(h_BTD, cache, start=cache.at(index))
        if self.state_kinds(index):
            view = cache.view(index, plan, self.window(index))
            self.write_state(index, h_BTD, plan, view)
            view.commit()
        cache.written(index, plan)

    # -- what the host prepares -------------------------------------------------------------------------

    @final
    def plan(
        self,
        h_BTD: Tensor,
        cache: AnyCache | None = None,
        *,
        start: Any = 0,  # noqa: ANN401 - a place of the cache's
        past: Any = None,  # noqa: ANN401
    ) -> Plan:
        """Positions, rotary angles and masks of a chunk.

        Args:
            h_BTD: The chunk.
            cache: Gives padding, and what its rows have behind them; None for a pass that keeps nothing.
            start: Where the chunk begins: a position, or a place that ``cache.at`` gave.
            past: Behind which keys its own go; left out, those of all positions before ``start``.
        """
        options: dict[str, Any] = {"additive": self.additive_masks, "rotary": self.rotary, "slopes": self.slopes}
        if cache is None:
            return StepPlan(h_BTD, start, past=past, **options)
        return cache.plan(h_BTD, start, past, context=self.spec.context, **options)

    @final
    def site(self, depth: int, cache: AnyCache | None = None) -> Site:
        """The place after ``depth`` blocks, as exit heads see it."""
        top = self.spec.depth

        def last_blocks(h_BTD: Tensor, count: int) -> Tensor:
            if cache is None:
                return self.run(h_BTD, Span(top - count, top))
            for index in range(top - count, top):
                h_BTD = self.peek(h_BTD, index, cache)
            return h_BTD

        return Site(depth, self.spec, self.normalize, self.project, last_blocks)

    @final
    def new_cache(self, capacity: int = 256, pad_B: Tensor | None = None, span: Span | None = None) -> Cache:
        """An empty cache for this backbone, or for a span of its blocks; left out, all that are here."""
        span = span or self.held or Span(0, self.spec.depth)
        return Cache(span, capacity, pad_B, [self.state_kinds(index) for index in range(span.stop)])
