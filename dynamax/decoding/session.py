"""One decoding run: the steps that decoders are made of. Each runs blocks, lets exits read, and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.backbones.cache import CacheSnapshot
from dynamax.backbones.skipped_state import SkippedState
from dynamax.decoding.history import History
from dynamax.decoding.probe import Probe
from dynamax.decoding.sampling import Sampler
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Evidence, Step


class Arrival(NamedTuple):
    """How far a step has come.

    Attributes:
        h_BTD: The step's positions after ``depth`` blocks.
        depth: Blocks completed.
        trail: Evidence of the exits that were read, shallowest first.
        left: Whether the policy lets all rows leave here.
    """

    h_BTD: Tensor
    depth: int
    trail: Sequence[Evidence] = ()
    left: bool = False


@final
class Session:
    """State of one decoding run.

    Args:
        backbone: The model.
        exits: Its exits; None for a decoder that reads none.
        sampler: How tokens are drawn.
        prompt_BT: Token ids; rows padded at the left.
        max_new_tokens: Most tokens to generate.
        capacity: Positions to make room for.
        eos_token_id: Tokens that end a row.
        pad_B: Padding positions at the left of each row, or None.
        forced_BT: Tokens to go on with in place of the decoder's own, or None.
        probe: A clock.

    Attributes:
        cache: State of all blocks.
        history: What was read and said.
        token_B: The token that each row goes on with.
        finished_B: Rows that have met an end token.
        steps: Steps told so far.
        total: Blocks of the model.
        end: The depth that blocks can be run to here: the top, but for the lower part of a model.
        watched: States ``h_BTD`` that have gone by on the way to the top, at the depths that stand in it.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitBank | None,
        sampler: Sampler,
        prompt_BT: Tensor,
        *,
        max_new_tokens: int,
        capacity: int,
        eos_token_id: Sequence[int] = (),
        pad_B: Tensor | None = None,
        forced_BT: Tensor | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.backbone = backbone
        self.sampler = sampler
        self.prompt_BT = prompt_BT
        self.forced_BT = forced_BT
        self.probe = probe or Probe()
        self.max_new_tokens = max_new_tokens
        self.total = backbone.spec.depth
        self.cache = backbone.new_cache(capacity, pad_B)
        self.end = self.cache.span.stop
        self.history = History(prompt_BT, pad_B)
        self.steps = 0
        self.watched: dict[int, list[Tensor]] = {}
        self.token_B = prompt_BT[:, -1]
        self.finished_B = torch.zeros(len(prompt_BT), dtype=torch.bool, device=prompt_BT.device)
        self._eos_S = torch.tensor(list(eos_token_id), device=prompt_BT.device, dtype=torch.long)
        self._exits = exits
        self._depths = () if exits is None else exits.depths
        self._recurrent = () if exits is None else exits.recurrent_depths
        self._gates = None if exits is None else exits.recordings()
        self._sites = {depth: backbone.site(depth, self.cache) for depth in self._depths}
        self._counted = self.cache.work()
        self._reads: tuple[tuple[int, int], ...] = ()
        self._snapshot: CacheSnapshot | None = None
        self._passed: dict[int, Tensor] = {}

    # -- what a step is made of -----------------------------------------------------------------------

    def prefill(self) -> Step:
        """Run the prompt at full depth; the first token."""
        self.probe.begin(prefill=True)
        arrival = Arrival(self.backbone.embed(self.prompt_BT, self.cache), 0)
        logits_BV = self.run_to_top(arrival)
        return self.step(arrival, logits_BV, self.sampler(logits_BV), prefill=True)

    def embed(self, token_B: Tensor | None = None) -> Arrival:
        """Begin a step: one position a row, before block 0.

        Args:
            token_B: What the step reads; the run's own ``token_B`` if left out.
        """
        self.probe.begin(prefill=False)
        token_B = self.token_B if token_B is None else token_B
        self.history.read(token_B)
        return Arrival(self.backbone.embed(token_B[:, None], self.cache), 0)

    def run_to_exit(
        self,
        policy: TerminationPolicy,
        token_B: Tensor | None = None,
        *,
        ahead: int = 0,
        arrival: Arrival | None = None,
    ) -> Arrival:
        """Run up to the first exit where the policy lets every unfinished row leave, or to the last exit.

        The positions stand there afterwards: the caller lets them leave, owes them or runs on.

        Args:
            policy: Asked once at each exit.
            token_B: As for ``embed``.
            ahead: Steps taken that are not told yet.
            arrival: Positions that are embedded already, in place of a token's; the newest is what exits and policy
                read.
        """
        assert self._exits is not None, "a decoder without exits runs to the top"
        arrival = self.embed(token_B) if arrival is None else arrival
        step = self.steps + ahead
        self.history.keep = max(1, policy.recent)
        trail: list[Evidence] = []
        past = self.history.past()
        for depth, h_BTD in self.backbone.walk(arrival.h_BTD, self._depths, self.cache):
            site = self._sites[depth]
            self._note(depth, h_BTD)
            given = {"step": step, "recordings": self._gates}
            scores, reads = self._exits.catch_up(site, h_BTD, [self.cache], **given)
            self._reads += reads[0]
            trail.append(
                self._exits.evidence(site, h_BTD, pick=newest, trail=trail, recurrent=scores, past=past, **given)
            )
            leave_B = policy(trail[-1])
            left = bool(leave_B) if len(leave_B) == 1 else bool((leave_B | self.finished_B).all())
            self.probe.mark(depth)
            arrival = Arrival(h_BTD, depth, trail, left)
            if left:
                break
        return arrival

    def leave(self, arrival: Arrival, skipped_state: SkippedState) -> Tensor:
        """The step's positions leave at the exit where they arrived; its logits. At the top no block is skipped.

        Args:
            arrival: Where they are.
            skipped_state: Sees to the blocks above.
        """
        assert self._exits is not None
        logits_BV = arrival.trail[-1].answer
        if arrival.depth == self.total:
            return logits_BV
        ran = self._exits.lens(arrival.depth).writes_last_block
        skipped_state.leave(self.backbone, self.cache, arrival.depth, arrival.h_BTD, last_block_ran=ran)
        if skipped_state.gates_read_exit:
            for depth in self._recurrent:
                if depth > arrival.depth:
                    self._exits.advance(self._sites[depth], arrival.h_BTD, self.cache)
        return logits_BV

    def run_to_top(self, arrival: Arrival) -> Tensor:
        """Run the step's positions through the blocks that are left; the model's logits of the newest one.

        Recurrent gates on the way read them, whether or not anybody asks. An exit at the top has these logits already.
        """
        assert self.end == self.total, "the lower part of a model has no top"
        if arrival.depth == self.total:
            return arrival.trail[-1].logits
        return self.backbone.unembed(self.run_to_end(arrival)[:, -1:])[:, 0]

    def run_to_end(self, arrival: Arrival) -> Tensor:
        """Run positions through the blocks that are here; recurrent gates on the way read them. They are given back."""
        h_BTD = arrival.h_BTD
        stops = {*self._recurrent, *self.watched, self.end}
        depths = sorted(depth for depth in stops if depth > arrival.depth)
        for depth, h_BTD in self.backbone.walk(arrival.h_BTD, depths, self.cache, start=arrival.depth):
            self._read_on(depth, h_BTD)
            if depth in self.watched:
                self.watched[depth].append(h_BTD)
        return h_BTD

    def run_chunk(self, tokens_BT: Tensor) -> tuple[Arrival, Tensor]:
        """Begin a step of several positions a row, and run them to the top; the model's logits ``[B, T, V]`` of all.

        Recurrent gates on the way read them.
        """
        self.probe.begin(prefill=False)
        for token_B in tokens_BT.unbind(1):
            self.history.read(token_B)
        start = Arrival(self.backbone.embed(tokens_BT, self.cache), 0)
        h_BTD = self.run_to_end(start)
        return start._replace(h_BTD=h_BTD), self.backbone.unembed(h_BTD)

    def settle(self) -> Tensor:
        """Pay all debts: every owed position goes to the end; recurrent gates on the way read them.

        Returns:
            The paid positions after the last block, oldest first.
        """
        h_BTD: Tensor | None = None
        for depth, h_BTD in self.backbone.walk(None, [*self._recurrent, self.end], self.cache):
            self._read_on(depth, h_BTD)
        assert h_BTD is not None, "a decoder settles what it owes"
        return h_BTD

    def step(
        self, arrival: Arrival, logits_BV: Tensor, token_B: Tensor, *, prefill: bool = False, top_rows: int = 1
    ) -> Step:
        """End a step: its record, with all that was run and read since the step before.

        Args:
            arrival: Where its own positions left.
            logits_BV: What its token was drawn from.
            token_B: The token.
            prefill: Whether this is the prompt's own pass.
            top_rows: Positions whose logits were taken at the top, if it did not leave.
        """
        depth = arrival.depth if arrival.left else self.total
        self.probe.end(depth)
        reads = tuple((evidence.depth, 1) for evidence in arrival.trail if evidence.logits_read) + self._reads
        if not arrival.left and arrival.depth < self.total:  # an exit at the top has read its logits itself
            reads += ((self.total, top_rows),)
        gates = tuple((evidence.depth, gate) for evidence in arrival.trail for gate in evidence.gates_read)
        before, self._counted, self._reads = self._counted, self.cache.work(), ()
        rows = tuple((evidence.depth, evidence.rows_read) for evidence in arrival.trail if evidence.rows_read)
        depth_B = torch.full((len(token_B),), depth)
        work = self._counted - before
        self.history.say(logits_BV, sum(work.calls), depth)
        return Step(token_B, depth_B, logits_BV, reads, gates, work, prefill, rows_read=rows)

    def verified(self, token_B: Tensor, logits_BV: Tensor) -> Step:
        """A step whose token was drafted without a block, and verified by a chunk whose step bears the cost."""
        self.history.say(logits_BV, 0, self.total)
        nothing = self._counted - self._counted
        return Step(token_B, torch.full((len(token_B),), self.total), logits_BV, work=nothing, accepted=True)

    # -- the stop rule ----------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether enough tokens are told, or every row has met an end token."""
        return self.steps == self.max_new_tokens or bool(self.finished_B.all())

    def told(self, step: Step) -> Tensor:
        """Take note that a step is told; its tokens, where finished rows repeat the first end token."""
        self.token_B = step.token_B
        if len(self._eos_S) and self.forced_BT is None:
            self.token_B = torch.where(self.finished_B, self._eos_S[0], step.token_B)
            self.finished_B = self.finished_B | torch.isin(self.token_B, self._eos_S)
        token_B = self.token_B
        if self.forced_BT is not None and self.steps < self.forced_BT.shape[1]:
            self.token_B = self.forced_BT[:, self.steps]
        self.steps += 1
        return token_B

    # -- taking back ------------------------------------------------------------------------------------

    def snapshot(self) -> None:
        """From here on positions can be taken back."""
        self._snapshot, self._passed = self.cache.snapshot(), {}

    def rollback(self, keep: int) -> None:
        """Keep the first ``keep`` positions since the snapshot; recurrent gates read those again."""
        assert self._snapshot is not None
        self.cache.rollback(self._snapshot, keep)
        self.history.crop(self.cache.length)
        for depth, passed_BTD in self._passed.items():
            assert self._exits is not None
            self._exits.advance(self._sites[depth], passed_BTD[:, :keep], self.cache)

    # -- recurrent gates ----------------------------------------------------------------------------------

    def _read_on(self, depth: int, h_BTD: Tensor) -> None:
        """Positions go by an exit that nobody asks: its recurrent gates read them all the same."""
        if self._exits is not None and depth in self._recurrent:
            self._note(depth, h_BTD)
            given: Any = {"step": self.steps, "recordings": self._gates}
            self._reads += self._exits.catch_up(self._sites[depth], h_BTD, [self.cache], **given)[1][0]

    def _note(self, depth: int, h_BTD: Tensor) -> None:
        """Keep what recurrent gates read since the snapshot: after a rollback they read a part of it again."""
        if self._snapshot is None or depth not in self._recurrent:
            return
        known_BTD = self._passed.get(depth)
        noted = self._snapshot.length + (0 if known_BTD is None else known_BTD.shape[1])
        carried = self.cache.filled[depth - 1] - noted - h_BTD.shape[1]
        rows = [] if known_BTD is None else [known_BTD]
        if carried > 0:
            owed_BTD = self.cache.group.owed(depth)
            assert owed_BTD is not None, "positions carried past an exit stand owed there"
            rows.append(owed_BTD[:, -carried:])
        self._passed[depth] = torch.cat([*rows, h_BTD], 1)


def newest(x_BT: Tensor) -> Tensor:
    """The newest position of each row."""
    return x_BT.select(1, -1)
