"""The way up for one cache: blocks run, and every recurrent gate passed reads what goes by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.backbones.cache import Cache, Mark
from dynamax.backbones.skipped_state import SkippedState
from dynamax.decoding.base import Probe
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Evidence, Span, Work


class Arrival(NamedTuple):
    """How far a step came: its state, its depth, and what each exit on the way said."""

    h_BTD: Tensor
    depth: int
    trail: list[Evidence]
    wishes: list[Tensor]
    left: bool


class Ascent:
    """Backbone, exits and one cache, climbed together."""

    def __init__(self, backbone: Backbone, bank: ExitBank, cache: Cache) -> None:
        self.backbone = backbone
        self.bank = bank
        self.cache = cache
        self._told = cache.work()
        self.total = backbone.spec.depth
        self._sites = {depth: backbone.site(depth, cache) for depth in bank.depths}
        self._mark: Mark | None = None
        self._passed: dict[int, Tensor] = {}

    def work(self) -> Work:
        """What the blocks have done since this was last asked."""
        before, self._told = self._told, self.cache.work()
        return self._told - before

    def climb(self, h_BTD: Tensor, span: Span) -> Tensor:
        """Run the span; recurrent gates on the way, the end included, read all that passes."""
        at = span.start
        for depth in self.bank.recurrent_depths:
            if at < depth <= span.stop:
                h_BTD = self.backbone.run(h_BTD, Span(at, depth), self.cache)
                self._visit(depth, h_BTD)
                at = depth
        return self.backbone.run(h_BTD, Span(at, span.stop), self.cache)

    def ask(self, tokens_BT: Tensor, policy: TerminationPolicy, ended_B: Tensor, *, step: int, probe: Probe) -> Arrival:
        """Climb from exit to exit until every live row wishes to leave, or no exit is left.

        The positions stand at ``depth`` afterwards: the caller lets them leave, owes them or runs on.
        """
        h_BTD, at = self.backbone.embed(tokens_BT, self.cache), 0
        trail: list[Evidence] = []
        wishes: list[Tensor] = []
        for depth in self.bank.depths:
            h_BTD = self.backbone.run(h_BTD, Span(at, depth), self.cache)
            at = depth
            self._note(depth, h_BTD)
            evidence = self.bank.read(
                depth, h_BTD, cache=self.cache, total=self.total, step=step, trail=trail, site=self._sites[depth]
            )
            trail.append(evidence)
            wishes.append(policy(evidence))
            left = bool((wishes[-1] | ended_B).all())
            probe.mark(depth)
            if left:
                return Arrival(h_BTD, at, trail, wishes, True)
        return Arrival(h_BTD, at, trail, wishes, False)

    def leave(self, arrival: Arrival, rule: SkippedState) -> None:
        """The step's positions leave where they arrived; the rule sees to the blocks above."""
        ran = self.bank.lens(arrival.depth).runs_last_block and arrival.trail[-1].logits_read
        rule.leave(self.backbone, self.cache, arrival.depth, arrival.h_BTD, last_block_ran=ran)
        if rule.gates_read_exit:
            for depth in self.bank.recurrent_depths:
                if depth > arrival.depth:
                    self.bank.advance(depth, arrival.h_BTD, self.cache)

    def settle(self) -> Tensor | None:
        """Pay all debts; see ``Backbone.settle``. Recurrent gates on the way read what passes."""
        return self.backbone.settle(self.cache, stops=self.bank.recurrent_depths, visit=self._visit)

    def mark(self) -> Mark:
        """Where ``rollback`` can return to; only positions after the latest mark can be taken back."""
        self._mark, self._passed = self.cache.mark(), {}
        return self._mark

    def rollback(self, mark: Mark, keep: int) -> None:
        """Keep the first ``keep`` positions since the mark; recurrent gates read those again."""
        self.cache.rollback(mark, keep)
        for depth, passed_BTD in self._passed.items():
            self.bank.advance(depth, passed_BTD[:, :keep], self.cache)

    def _visit(self, depth: int, h_BTD: Tensor) -> None:
        self._note(depth, h_BTD)
        self.bank.catch_up(depth, h_BTD, self.cache)

    def _note(self, depth: int, h_BTD: Tensor) -> None:
        """Keep what recurrent gates read since the mark: after a rollback they read a part of it again."""
        if self._mark is None or depth not in self.bank.recurrent_depths:
            return
        known_BTD = self._passed.get(depth)
        noted = self._mark.length + (0 if known_BTD is None else known_BTD.shape[1])
        carried = self.cache.filled[depth - 1] - noted - h_BTD.shape[1]
        rows = [] if known_BTD is None else [known_BTD]
        if carried > 0:
            owed_BTD = self.cache.owed(depth)
            assert owed_BTD is not None, "positions carried past an exit stand owed there"
            rows.append(owed_BTD[:, -carried:])
        self._passed[depth] = torch.cat([*rows, h_BTD], 1)


def logits_depths(trail: Sequence[Evidence]) -> tuple[int, ...]:
    """Depths whose lens was read out."""
    return tuple(evidence.depth for evidence in trail if evidence.logits_read)


def gates_asked(trail: Sequence[Evidence]) -> tuple[tuple[int, str], ...]:
    """(depth, gate) of every gate that was asked."""
    return tuple((evidence.depth, gate) for evidence in trail for gate in evidence.gates_read)
