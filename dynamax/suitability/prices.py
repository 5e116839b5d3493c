"""What reading an exit costs and what leaving there saves, as shares of a token at full depth: counted, and timed."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from dynamax.backbones.base import Backbone
from dynamax.decoding.cost import CostModel
from dynamax.types import Span, Step, Work

Lens = Literal["logit", "ridge"]
LENSES: tuple[Lens, ...] = ("logit", "ridge")
CONTEXT = 128
"""Positions before the token that is priced."""
ROUNDS, WARMUP = 12, 3
"""Rounds that are timed at every depth, and rounds before them that are not."""
NOTHING = torch.zeros(0)


@dataclass(frozen=True)
class Price:
    """Shares of what a token costs at full depth.

    Attributes:
        read: The output matrix, which reading any lens costs.
        map: The map of a ridge lens, on top of that.
        blocks: What leaving saves in blocks: those above, less what it costs there to read the position later, in one
            chunk with another token.
    """

    read: float
    map: float
    blocks: float

    def asks(self, lens: Lens) -> float:
        """What a token pays for reading a lens."""
        return self.read + (self.map if lens == "ridge" else 0.0)

    @property
    def saves(self) -> float:
        """What a token saves that leaves: its blocks, and the output matrix at the top."""
        return self.blocks + self.read

    def break_even(self, lens: Lens) -> float | None:
        """Share of tokens that must leave so that reading the lens at all of them costs nothing; None if it cannot."""
        share = self.asks(lens) / self.saves if self.saves > 0 else 2.0
        return share if share <= 1 else None


def counted(backbone: Backbone, depths: Sequence[int]) -> dict[int, Price]:
    """Prices in bytes moved."""
    model, total = CostModel(backbone), backbone.spec.depth

    def bytes_of(depth: int, rows_above: int, matrices: int) -> float:
        rows = tuple(1 if index < depth else rows_above for index in range(total))
        work = Work(tuple(map(bool, rows)), rows, (0,) * total)
        read = ((total, 1),) * matrices
        step = Step(token_B=NOTHING, depth_B=NOTHING, logits_BV=NOTHING, logits_read=read, work=work)
        return model.step(step, CONTEXT).bytes

    full, width = bytes_of(total, 1, 1), backbone.spec.width
    read, mapped = 1 - bytes_of(total, 1, 0) / full, 4 * (width * width + width) / full  # a TunedLens is in float32
    return {
        depth: Price(read, mapped, (2 * full - bytes_of(depth, 0, 1) - bytes_of(depth, 2, 1)) / full)
        for depth in depths
    }


@torch.inference_mode()
def timed(backbone: Backbone, depths: Sequence[int]) -> dict[int, Price]:
    """Prices in time on this machine: medians over rounds, with all depths in turn.

    Norms count with the output matrix. What stopping at a depth costs by itself is left out.
    """
    total, width = backbone.spec.depth, backbone.spec.width
    first = next(backbone.parameters())
    tokens_1T = torch.arange(CONTEXT, device=first.device)[None] % backbone.spec.vocab
    cache = backbone.new_cache(CONTEXT + 8)
    backbone.run(backbone.embed(tokens_1T, cache), Span(0, total), cache)
    a_DD = torch.zeros(width, width, device=first.device)
    times: dict[tuple[str, int], list[float]] = defaultdict(list)

    def timing(name: str, depth: int, work: Callable[[], Tensor]) -> Tensor:
        if first.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        done = work()
        if first.device.type == "cuda":
            torch.cuda.synchronize()
        times[name, depth].append(time.perf_counter() - begin)
        return done

    def above(depth: int, rows: int) -> Tensor:
        """A step of some rows, whose blocks above a depth are timed; then it is taken back."""
        snapshot = cache.snapshot()
        h_1RD = backbone.embed(tokens_1T[:, :rows], cache)
        h_1RD = backbone.run(h_1RD, Span(0, depth), cache) if depth else h_1RD
        h_1RD = timing(f"above, {rows}", depth, lambda: backbone.run(h_1RD, Span(depth, total), cache))
        cache.rollback(snapshot)
        return h_1RD

    for _ in range(WARMUP + ROUNDS):
        for depth in (0, *depths):
            above(depth, 1)
            h_1TD = above(depth, 2)[:, -1:]
            u_1TD = backbone.normalize(h_1TD).float()
            timing("read", 0, lambda h_1TD=h_1TD: backbone.unembed(h_1TD))
            timing("map", 0, lambda u_1TD=u_1TD: linear(u_1TD, a_DD))
    spent = {
        key: statistics.median(values[WARMUP * len(values) // (WARMUP + ROUNDS) :]) for key, values in times.items()
    }
    read, mapped = spent["read", 0], spent["map", 0]
    full = spent["above, 1", 0] + read
    return {
        depth: Price(read / full, mapped / full, (2 * spent["above, 1", depth] - spent["above, 2", depth]) / full)
        for depth in depths
    }
