"""Decoding with spans of blocks captured in CUDA graphs, over ``Backbone.run_blocks``.

A graph replays kernels on the tensors it was recorded with. So whatever a span reads and writes lies in tensors that
stay where they are: hidden states at each depth, the newest token, the position, and of every block the keys and values
(in a buffer of fixed capacity, of which a mask hides what is not yet written) or the recurrent state (copied to its
place).

What it needs of the library, and where that does otherwise today:

- ``run_blocks`` takes any ``LayerView``: ``StaticView`` here is one. ``CacheView`` is none that could be captured: it
  reads keys up to a length that the host knows, and puts a new recurrent state in the place of the old one.
- A ``StepPlan`` whose positions are a tensor. It makes them of a number; here ``positions_BT`` is set beforehand.
- A recurrence that takes and gives states of one shape (all mixers do), and no block that waits for the device. One
  that wrote its state in place would save the copy, which at large batches is a good part of a Mamba's step.

A span is captured for chunks of one length, rows that are not padded, blocks without holes, and embeddings that know no
positions (all families' but GPT-2's). Debts are not paid here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.backbones.cache import Cache
from dynamax.backbones.plan import StepPlan
from dynamax.backbones.state import BlockState, LayerView, Recurrence, Tensors
from dynamax.types import Span

Run = Callable[[], object]


class Recorder(ABC):
    """Makes a function of static tensors repeatable."""

    @abstractmethod
    def record(self, run: Run) -> Run:
        """What repeats ``run``, with the values that its tensors then have. The values may change meanwhile."""


@final
class Plain(Recorder):
    """Calls the function again. Stands for graphs on a CPU, and is what they are checked against."""

    def record(self, run: Run) -> Run:
        """The function itself."""
        return run


@final
class Graphs(Recorder):
    """Captures CUDA graphs that share one pool of memory: one is replayed at a time, and none leaves anything in it."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # one, since each keeps the memory that it has used

    def record(self, run: Run) -> Run:
        """Warm up on a stream apart, then capture; the replay."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


def recorder(device: torch.device | str) -> Recorder:
    """Graphs on a GPU, plain calls elsewhere."""
    return Graphs() if torch.device(device).type == "cuda" else Plain()


@final
class StaticState:
    """State of one block in tensors that stay where they are.

    Args:
        like: The state of a block that has been through some positions.
        filled: How many.
        capacity: Positions to have room for.
    """

    def __init__(self, like: BlockState, filled: int, capacity: int) -> None:
        self.keys: Tensors = ()
        self.recurrent: Tensors = ()
        if like.keys is not None:
            self.keys = tuple(x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in like.keys.read(0, filled))
        if like.recurrent is not None and like.recurrent.tensors is not None:
            self.recurrent = tuple(
                torch.empty_like(x, memory_format=torch.contiguous_format) for x in like.recurrent.tensors
            )
        self.load(like, filled)

    def load(self, given: BlockState, filled: int) -> None:
        """Take over the values of a state."""
        if given.keys is not None:
            for held, x in zip(self.keys, given.keys.read(0, filled), strict=True):
                held.zero_()[:, :, :filled] = x
        if given.recurrent is not None and given.recurrent.tensors is not None:
            for held, x in zip(self.recurrent, given.recurrent.tensors, strict=True):
                held.copy_(x)


@final
class StaticView(LayerView):
    """A view of a static state.

    Args:
        state: The block's state.
        place_T: Positions of the chunk.
        mask: Which of all buffered keys each position may see; not for blocks without keys.
    """

    def __init__(self, state: StaticState, place_T: Tensor, mask: Tensor | None) -> None:
        self._state, self._place_T = state, place_T
        self.mask = mask if state.keys else None
        self.live_BT = None

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the chunk's keys and values at its positions; the whole buffers."""
        keys, values = self._state.keys
        keys.index_copy_(2, self._place_T, k_BHTD)
        values.index_copy_(2, self._place_T, v_BHTD)
        return keys, values

    def advance(self, recurrence: Recurrence, rows: Tensors) -> Tensor:
        """Continue from the state, and write the new one in its place."""
        output, states = recurrence(self._state.recurrent, *rows)
        for held, x in zip(self._state.recurrent, states[-1], strict=True):
            held.copy_(x)
        return output


@final
class CapturedDecoder:
    """Greedy decoding that always leaves at one depth, from a prompt that ran at full depth.

    The spans between the depths are recorded one by one, and so is the reading at each depth: a step is some replays,
    and a policy could decide between them. Skipped blocks see nothing of the step, as if their debts were still owed.

    Args:
        backbone: The model.
        cache: State after a prompt; nothing owed, nothing padded. It is read, never changed.
        token_B1: The token that follows the prompt.
        depths: Depths to leave at; the last is the top.
        capacity: Positions to have room for, the prompt's included.
        record: How steps are made repeatable.
        rows: Positions of a chunk; with more than one, the newest token stands in all of them.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: Cache,
        token_B1: Tensor,
        depths: Sequence[int],
        *,
        capacity: int,
        record: Recorder,
        rows: int = 1,
    ) -> None:
        self.backbone, self._rows = backbone, rows
        self.token_BT = token_B1.repeat(1, rows)
        self.place_T = torch.arange(cache.length, cache.length + rows, device=token_B1.device)
        self._states = [StaticState(s, cache.length, capacity) for s in cache.states]
        self._keys_K = torch.arange(capacity, device=token_B1.device)
        self._spans = list(pairwise((0, *depths)))
        self.hidden: dict[int, Tensor] = {0: backbone.embed(self.token_BT).clone()}
        for start, stop in self._spans:  # once, to see what comes out: a block may change the dtype
            self.hidden[stop] = self._run(start, stop).clone()
        self._begin = record.record(self._embed)
        self._steps = {stop: record.record(partial(self._span, start, stop)) for start, stop in self._spans}
        self._reads = {depth: record.record(partial(self._read, depth)) for depth in depths}
        self.load(cache, token_B1)

    def load(self, cache: Cache, token_B1: Tensor) -> None:
        """Go back to the end of the prompt."""
        for mine, given in zip(self._states, cache.states, strict=True):
            mine.load(given, cache.length)
        self.token_BT.copy_(token_B1.expand_as(self.token_BT))
        self.place_T.copy_(torch.arange(cache.length, cache.length + self._rows, device=self.place_T.device))

    def step(self, depth: int) -> None:
        """Decode one chunk that leaves at a depth; its token is in ``token_BT`` then."""
        self._begin()
        for _, stop in self._spans:
            self._steps[stop]()
            if stop == depth:
                break
        self._reads[depth]()

    def step_plainly(self, depth: int) -> None:
        """The same by plain calls, on the same tensors."""
        self._embed()
        for start, stop in self._spans:
            self._span(start, stop)
            if stop == depth:
                break
        self._read(depth)

    def state_bytes(self, depth: int) -> int:
        """Bytes of state that a step to a depth moves at least: keys read, recurrent states read and written."""
        held = [(x, 1) for state in self._states[:depth] for x in state.keys]
        held += [(x, 2) for state in self._states[:depth] for x in state.recurrent]
        return sum(times * x.numel() * x.element_size() for x, times in held)

    def _embed(self) -> None:
        self.hidden[0].copy_(self.backbone.embed(self.token_BT))

    def _span(self, start: int, stop: int) -> None:
        self.hidden[stop].copy_(self._run(start, stop))

    def _read(self, depth: int) -> None:
        token_B1 = self.backbone.unembed(self.hidden[depth][:, -1:]).argmax(-1)
        self.token_BT.copy_(token_B1.expand_as(self.token_BT))
        self.place_T.add_(self._rows)

    def _run(self, start: int, stop: int) -> Tensor:
        """The span as a function of tensors."""
        h_BTD, backbone = self.hidden[start], self.backbone
        plan = StepPlan(h_BTD, 0, additive=backbone.additive_masks, rotary=backbone.rotary)
        plan.positions_BT = self.place_T[None]
        masks = {window: self._mask(window, h_BTD) for window in {backbone.window(i) for i in range(start, stop)}}
        views = [StaticView(self._states[i], self.place_T, masks[backbone.window(i)]) for i in range(start, stop)]
        return backbone.run_blocks(h_BTD, range(start, stop), plan, views)

    def _mask(self, window: int | None, h_BTD: Tensor) -> Tensor:
        """Which of the buffered keys each position may see."""
        seen_TK = self._keys_K <= self.place_T[:, None]
        if window is not None:
            seen_TK = seen_TK & (self._keys_K > self.place_T[:, None] - window)
        mask = seen_TK[None, None]
        if self.backbone.additive_masks:
            least = torch.finfo(h_BTD.dtype).min / 2
            mask = torch.zeros_like(mask, dtype=h_BTD.dtype).masked_fill(~mask, least)
        return mask


def distance(decoder: CapturedDecoder, cache: Cache, depth: int, steps: int) -> float:
    """Largest relative distance between hidden states at a depth and those of ``Backbone.run``, over some steps.

    Both read the decoder's tokens. ``cache`` stands where the decoder stands, and advances with it; positions that stop
    below the top are owed there.
    """
    backbone, worst = decoder.backbone, 0.0
    for _ in range(steps):
        h_BTD = backbone.embed(decoder.token_BT, cache)
        wanted_BTD = backbone.run(h_BTD, Span(0, depth), cache)
        if depth < backbone.spec.depth:
            cache.group.owe(depth, wanted_BTD)
        decoder.step(depth)
        gap_BTD = decoder.hidden[depth].double() - wanted_BTD.double()
        worst = max(worst, float(gap_BTD.norm() / wanted_BTD.double().norm()))
    return worst
