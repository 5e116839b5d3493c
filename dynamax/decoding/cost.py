"""FLOPs and bytes of every part: blocks, scores, keys, lenses, gates, output matrix.

Counted, not timed. A multiply-add is two FLOPs. Norms, activations, softmax and sampling are left
out: they are linear in the width, below a percent of the products. Bytes are weights read once a
call, keys and values read and written, and recurrent state read and written once a call, of gates as of blocks;
activations are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamax.backbones.base import Backbone
from dynamax.heads.bank import ExitBank
from dynamax.heads.base import ExitHead
from dynamax.types import BlockCost, Step, Work


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of one token of one row."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


FREE = Cost(0.0, 0.0)


class CostModel:
    """What a step costs, from what the blocks counted.

    Args:
        backbone: Gives the cost of each block and the size of a weight in its precision.
        bank: Its exits; None for plain decoding.
        batch: Rows that share each read of the weights.
    """

    def __init__(self, backbone: Backbone, bank: ExitBank | None = None, *, batch: int = 1) -> None:
        self.spec = backbone.spec
        self.blocks = [backbone.block_cost(index) for index in range(self.spec.depth)]
        self.size = next(backbone.parameters()).element_size()
        self.weight_size = backbone.weight_bytes
        self.bank = bank
        self.batch = batch

    def full(self, context: int) -> Cost:
        """One token at full depth, with ``context`` positions before it."""
        return sum((self._block(block, 1, context) for block in self.blocks), self._output())

    def step(self, step: Step, context: int) -> Cost:
        """One decoded token, with ``context`` positions before it."""
        cost = FREE
        for index, block in enumerate(self.blocks):
            if step.work.calls[index]:
                cost += self._block(block, step.work.rows[index], context, step.work.calls[index])
            if step.work.writes[index]:
                cost += self._write(block, step.work.writes[index])
        return cost + self._reads(step) + self._recurrent(step, context)

    def path(self, depths: Sequence[int], context: int) -> Cost:
        """Tokens of one text that leave at given depths, state being exact.

        Only the lens of the exit where a token leaves is read, and no gate without memory: what choosing these depths
        costs is left out. Positions that left are taken along by the next token that goes further.

        Args:
            depths: Depth of each token.
            context: Positions before the first of them.
        """
        cost, owed, total = FREE, [0] * self.spec.depth, self.spec.depth
        nothing = torch.empty(0)
        for place, depth in enumerate(depths, context):
            lens = self.bank.lens(depth) if self.bank is not None and depth < total else None
            late = 0 if lens is None else lens.last_blocks
            above = (0,) * (total - depth - late) + (1,) * late
            rows = tuple(1 + waiting for waiting in owed[:depth]) + above
            owed = [0] * depth + [1 + waiting for waiting in owed[depth:]]
            work = Work((1,) * depth + above, rows, (0,) * total)
            cost += self.step(Step(nothing, nothing, nothing, ((depth, 1),), work=work), place)
        return cost

    def _block(self, block: BlockCost, rows: int, context: int, calls: int = 1) -> Cost:
        seen = context + 1 if block.window is None else min(context + 1, block.window)
        flops = rows * 2.0 * (block.active + block.scores * seen + block.scan)
        weights = min(block.weights * calls, block.active * rows * self.batch)
        keys = block.keys * (seen * calls + rows)
        return Cost(flops, self.weight_size * weights / self.batch + self.size * keys + self._state(block) * calls)

    def _write(self, block: BlockCost, rows: int) -> Cost:
        weights = self._weights(block.write, rows)
        return weights + Cost(2.0 * block.scan * rows, self.size * block.keys * rows + self._state(block))

    def _state(self, block: BlockCost) -> float:
        """Bytes of recurrent state, read once and written once."""
        return 2.0 * max(self.size, 4) * block.state

    def _output(self) -> Cost:
        return self._weights(self.spec.vocab * self.spec.width, 1)

    def _weights(self, count: int, rows: int) -> Cost:
        return Cost(2.0 * count * rows, self.weight_size * count / self.batch)

    def _reads(self, step: Step) -> Cost:
        cost, translated = FREE, Counter(depth for depth, _ in step.logits_read)
        for depth, rows in step.logits_read:
            cost += self._weights(self.spec.vocab * self.spec.width, rows)
            if depth < self.spec.depth and self.bank is not None and not self.bank.lens(depth).recurrent:
                cost += self._head(self.bank.lens(depth), rows)
        for depth, tokens in step.rows_read:
            assert self.bank is not None
            cost += self._weights(tokens * self.spec.width, 1)
            if translated[depth]:  # the lens was run once for both
                translated[depth] -= 1
            elif not self.bank.lens(depth).recurrent:
                cost += self._head(self.bank.lens(depth), 1)
        for depth, name in step.gates_read:
            assert self.bank is not None
            gate = self.bank.gates(depth)[name]
            if not gate.recurrent:
                cost += self._head(gate, 1)
        return cost

    def _recurrent(self, step: Step, context: int) -> Cost:
        """Recurrent heads read every position that passes them, asked or not."""
        cost = FREE
        for depth in self.bank.recurrent_depths if self.bank is not None else ():
            rows = step.work.rows[depth - 1] + step.work.writes[depth - 1]  # written by a rule that lets gates read
            for head in self.bank.recurrent_heads(depth).values() if self.bank is not None and rows else ():
                cost += self._head(head, rows) + self._memory(head, rows, context)
        return cost

    def _head(self, head: ExitHead, rows: int) -> Cost:
        held = sum(p.numel() * p.element_size() for p in head.read_weights())
        return Cost(float(head.flops()) * rows, held / self.batch)

    def _memory(self, head: ExitHead, rows: int, context: int) -> Cost:
        size = max((p.element_size() for p in head.parameters()), default=self.size)
        return Cost(2.0 * head.keys * context * rows, size * (head.keys * (context + 1 + rows) + 2.0 * head.state))
