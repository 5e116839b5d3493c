"""Many requests at once: each row leaves at its own depth, ends by itself, and makes room for the next request.

A step takes all rows up to the first exit. Those that leave there owe the position (or whatever the rule for skipped
state does); the others are gathered, each with the positions it owes, and go on. The tokens of a request are those that
it would get alone, but for ties in the last digits of a sum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynamax.backbones.slots import SelectedRows, Slots
from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.decoding.session import Session, newest
from dynamax.errors import UserError
from dynamax.types import Evidence, Past, Span, Step

PROMPT_POSITIONS = 512
"""Positions of prompts that are read at once, padding included; a longer prompt is read alone.

A position costs least from there on in a small model, and from 128 on in a larger one (docs/decisions.md).
"""
TOGETHER = 8
"""Where more requests wait than rows are free, this part of the rows is free before they join: an eighth."""


class Told(NamedTuple):
    """One token of one request.

    Attributes:
        ticket: The request's, as ``submit`` gave it.
        step: The token and what it cost; a batch of one row.
        ended: Whether it is the request's last.
        states: With the last one, the states ``h_1TD`` of prompt and answer at the depths that are kept.
    """

    ticket: int
    step: Step
    ended: bool
    states: Mapping[int, Tensor] = MappingProxyType({})


@dataclass
class Row:
    """A request.

    Attributes:
        ticket: Its number.
        session: Its run.
        eos_token_id: Tokens that end it.
        told: Tokens it has got.
        token: The newest one.
        reads: (depth, positions) of logits that recurrent gates have read in the step under way.
        last: Its last token, while that has not been read yet and its states are wanted.
    """

    ticket: int
    session: Session
    eos_token_id: Collection[int]
    told: int = 0
    token: int = 0
    reads: tuple[tuple[int, int], ...] = ()
    last: Told | None = None

    def end(self, step: Step, token: int) -> Told:
        """Take note of a token; whether it was the last."""
        self.told, self.token = self.told + 1, token
        return Told(self.ticket, step, token in self.eos_token_id or self.told == self.session.max_new_tokens)

    def with_states(self) -> Told:
        """Its last token, now that it has been read."""
        assert self.last is not None
        return self.last._replace(states={depth: torch.cat(h, 1) for depth, h in self.session.watched.items()})


@final
class Scheduler:
    """Answers requests side by side, as many as it has rows; others wait until a row is free.

    Args:
        decoder: Says how each row decodes: Full, or EarlyExit with a rule for skipped state that any row can follow.
        rows: Most requests at a time.
        keep: Depths at which the states of all positions are kept, those of the last token too; with Full alone. A
            request's last token is told a step later then.

    Raises:
        UserError: If the decoder's rows cannot go their own ways, or states are to be kept that it does not run.
    """

    def __init__(self, decoder: Decoder, rows: int = 8, *, keep: Sequence[int] = ()) -> None:
        if rows < 1:
            raise UserError(f"rows is {rows}; it must be at least 1.")
        reason = refusal(decoder)
        if reason is not None:
            raise UserError(f"{reason} Answer its prompts one after the other, or choose another decoder.")
        if keep and not isinstance(decoder, Full):
            raise UserError(f"{type(decoder).__name__} leaves early, so it has no states to keep. Decode with Full.")
        self.backbone = decoder.backbone
        self.rows = rows
        self._together = max(1, rows // TOGETHER)
        self._keep = tuple(keep)
        self._decoder = decoder
        self._exits, self._policy = decoder.exits, decoder.policy
        self._rule = decoder.skipped_state if isinstance(decoder, EarlyExit) else None
        self._gates = None if self._exits is None else self._exits.recordings()
        self._depths = () if self._exits is None else self._exits.depths
        depth = self.backbone.spec.depth
        kinds = [self.backbone.state_kinds(index) for index in range(depth)]
        self._slots = Slots(Span(0, depth), kinds, rows)
        self._running: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._tickets = 0

    def submit(
        self,
        prompt_1T: Tensor,
        *,
        max_new_tokens: int,
        eos_token_id: Sequence[int] = (),
        sampler: Sampler | None = None,
    ) -> int:
        """Add a request; its ticket.

        Args:
            prompt_1T: Token ids of one text.
            max_new_tokens: Most tokens to generate.
            eos_token_id: Tokens that end it.
            sampler: How its tokens are drawn, its own; the decoder's if left out, which then goes from row to row.

        Raises:
            UserError: If the prompt is not token ids of the vocabulary, or does not fit the context.
        """
        session = self._decoder.begin(prompt_1T, max_new_tokens=max_new_tokens, sampler=sampler)
        if len(prompt_1T) != 1:
            raise UserError(f"A request has one prompt; {len(prompt_1T)} were given. Submit them one by one.")
        self._tickets += 1
        self._waiting.append(Row(self._tickets, session, frozenset(eos_token_id)))
        return self._tickets

    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """Forget a request; nothing happens if it has ended."""
        self._waiting = deque(row for row in self._waiting if row.ticket != ticket)
        self._remove({ticket})

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._running or self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Told]:
        """Let waiting requests join where rows are free, and give every running one its next token.

        Those that join get their first token from their prompts' own pass. It is one chunk of ``PROMPT_POSITIONS`` at
        most, so that running rows do not wait long; if none are running, all rows are filled. Where more requests wait
        than rows are free, an eighth of the rows must be free, since prompts read together cost less. Without requests,
        nothing happens.
        """
        read = [row for row in self._running if row.last is not None]
        told = self._step() if self._running else []
        self._remove({row.ticket for row in read})
        told = self._hold_last(told) + [row.with_states() for row in read]
        running = len(self._running)
        while self._waiting and self.rows - len(self._running) >= min(len(self._waiting), self._together):
            told += self._hold_last(self._join())
            if running:  # they would wait for the next chunk
                break
        return told

    def _hold_last(self, told: list[Told]) -> list[Told]:
        """Rows that have ended go; where states are kept, they stay for a step more, in which their token is read."""
        last = {each.ticket: each for each in told if each.ended}
        if not self._keep:
            self._remove(set(last))
            return told
        for row in self._running:
            row.last = last.get(row.ticket, row.last)
        return [each for each in told if not each.ended]

    # -- joining and leaving ----------------------------------------------------------------------------

    def _join(self) -> list[Told]:
        """Requests that have waited move into free slots; their prompts are read at full depth, in one chunk."""
        rows: list[Row] = []
        longest = 0
        while self._waiting and len(self._running) < self.rows:
            longest = max(longest, self._waiting[0].session.prompt_BT.shape[1])
            if rows and (len(rows) + 1) * longest > PROMPT_POSITIONS:
                break
            row = self._waiting.popleft()
            row.session.watched = {depth: [] for depth in self._keep}
            row.session.history.keep = max(1, 0 if self._policy is None else self._policy.recent)
            self._slots.add(row.session.cache)
            self._running.append(row)
            rows.append(row)
        prompts = [row.session.prompt_BT[0] for row in rows]
        lengths = [len(prompt_T) for prompt_T in prompts]
        chosen = self._slots.select(range(len(self._running) - len(rows), len(self._running)), lengths)
        recurrent = () if self._exits is None else self._exits.recurrent_depths
        depths = sorted({*recurrent, *self._keep, self.backbone.spec.depth})
        start_RTD = self.backbone.embed(pad_sequence(prompts, batch_first=True), chosen)
        parts: list[Tensor] = []
        for depth, h_RTD in self.backbone.walk(start_RTD, depths, chosen):
            parts = [h_1TD[:, :length] for h_1TD, length in zip(h_RTD.split(1), lengths, strict=True)]
            for row, h_1TD in zip(rows, parts, strict=True):
                if depth in self._keep:
                    row.session.watched[depth].append(h_1TD)
                if self._exits is not None and depth in recurrent:
                    site = self.backbone.site(depth, chosen)
                    row.reads += self._exits.catch_up(site, h_1TD, [row.session.cache], recordings=self._gates)[1][0]
        logits_RV = self.backbone.unembed(torch.cat([h_1TD[:, -1:] for h_1TD in parts]))[:, 0]
        top = self.backbone.spec.depth
        return self._tell(rows, logits_RV, (), top, prefill=True, more_reads=((top, 1),))

    def _remove(self, tickets: set[int]) -> None:
        """Rows end; their slots are free."""
        for slot in reversed(range(len(self._running))):
            if self._running[slot].ticket in tickets:
                self._slots.remove(slot)
                last = self._running.pop()
                if slot < len(self._running):
                    self._running[slot] = last

    # -- a step -------------------------------------------------------------------------------------------

    def _step(self) -> list[Told]:
        rows, told, policy, past = list(self._running), [], self._policy, None
        token_R = torch.tensor([row.token for row in rows], device=rows[0].session.prompt_BT.device)
        for row, token_1 in zip(rows, token_R.split(1), strict=True):
            row.session.history.read(token_1)
        chosen = self._slots.select(range(len(rows)))
        trail: list[Evidence] = []
        read: list[Evidence] = []
        total = self.backbone.spec.depth
        start_R1D = self.backbone.embed(token_R[:, None], chosen)
        for depth, h_R1D in self.backbone.walk(start_R1D, sorted({*self._depths, *self._keep, total}), chosen):
            if depth in self._keep:
                for row, h_11D in zip(rows, h_R1D.split(1), strict=True):
                    row.session.watched[depth].append(h_11D)
            if depth not in self._depths:
                if depth == total:
                    on = [place for place, row in enumerate(rows) if row.last is None]
                    told += self._tell_top(h_R1D, rows, on, read)
                continue
            past = past or joined([row.session.history.past() for row in rows])
            evidence, recurrent = self._evidence(depth, h_R1D, rows, chosen, trail, past)
            assert policy is not None, "exits come with a policy"
            leave = policy(evidence).tolist()
            read, trail = [*read, evidence], [*trail, evidence]
            on = [place for place, left in enumerate(leave) if not left]
            if any(leave):
                out = [place for place, left in enumerate(leave) if left]
                given = [rows[i] for i in out]
                told += self._leave(evidence, h_R1D[out], given, chosen.only(out), out, read, recurrent)
            if depth == total:
                told += self._tell_top(h_R1D, rows, on, read)
            if depth == total or not on:
                break
            if any(leave):
                chosen.keep(on)
                rows, past = [rows[i] for i in on], None
                trail = [earlier.select(on) for earlier in trail if depth < max(self._depths)]  # copies logits
        return told

    def _evidence(
        self,
        depth: int,
        h_R1D: Tensor,
        rows: Sequence[Row],
        chosen: SelectedRows,
        trail: Sequence[Evidence],
        past: Past,
    ) -> tuple[Evidence, Mapping[str, Tensor]]:
        """What the exit says of all rows, and what its recurrent heads do."""
        assert self._exits is not None
        site = self.backbone.site(depth, chosen)
        step_R = torch.tensor([row.told for row in rows], device=h_R1D.device)
        scores, reads = self._exits.catch_up(site, h_R1D, chosen.rows, step=step_R, recordings=self._gates)
        for row, own in zip(rows, reads, strict=True):
            row.reads += own
        given: dict[str, Any] = {"step": step_R, "trail": trail, "past": past, "recordings": self._gates}
        return self._exits.evidence(site, h_R1D, pick=newest, recurrent=scores, **given), scores

    def _leave(
        self,
        evidence: Evidence,
        h_R1D: Tensor,
        rows: Sequence[Row],
        chosen: SelectedRows,
        places: Sequence[int],
        read: Sequence[Evidence],
        recurrent: Mapping[str, Tensor],
    ) -> list[Told]:
        """Rows leave at an exit, where they stood at ``places``; their tokens."""
        assert self._exits is not None
        assert self._rule is not None
        depth = evidence.depth
        if evidence.logits_read or evidence.answers_from_few:
            logits_RV = evidence.answer[places]
        else:  # of these rows alone
            site = self.backbone.site(depth, chosen)
            mine = {name: said_R1[places] for name, said_R1 in recurrent.items()}
            evidence = self._exits.evidence(site, h_R1D, pick=newest, recurrent=mine)
            logits_RV, read = evidence.answer, [*read, evidence]
        if depth < self.backbone.spec.depth:
            ran = self._exits.lens(depth).writes_last_block
            self._rule.leave(self.backbone, chosen, depth, h_R1D, last_block_ran=ran)
        if self._rule.gates_read_exit:
            for above in self._exits.recurrent_depths:
                if above > depth:
                    for row, h_1TD in zip(rows, h_R1D.split(1), strict=True):
                        self._exits.advance(self.backbone.site(above, chosen), h_1TD, row.session.cache)
        return self._tell(rows, logits_RV, read, depth)

    def _tell_top(self, h_R1D: Tensor, rows: Sequence[Row], on: Sequence[int], read: Sequence[Evidence]) -> list[Told]:
        """Tokens of the rows that the top decides, those in the places ``on``."""
        if not on:
            return []
        chosen = [rows[i] for i in on]
        total = self.backbone.spec.depth
        if read and read[-1].depth == total and read[-1].logits_read:  # an exit there has them
            return self._tell(chosen, read[-1].logits[on], read, total)
        logits_RV = self.backbone.unembed(h_R1D if len(on) == len(rows) else h_R1D[on])[:, 0]
        return self._tell(chosen, logits_RV, read, total, more_reads=((total, 1),))

    def _tell(
        self,
        rows: Sequence[Row],
        logits_RV: Tensor,
        read: Sequence[Evidence],
        depth: int,
        *,
        prefill: bool = False,
        more_reads: tuple[tuple[int, int], ...] = (),
    ) -> list[Told]:
        """Draw the next token of rows that have come to the same depth, and account for it."""
        token_R = logits_RV.argmax(-1)
        if any(type(row.session.sampler) is not Greedy for row in rows):
            token_R = torch.cat(
                [row.session.sampler(logits_1V) for row, logits_1V in zip(rows, logits_RV.split(1), strict=True)]
            )
        reads = tuple((evidence.depth, 1) for evidence in read if evidence.logits_read)
        gates = tuple((evidence.depth, gate) for evidence in read for gate in evidence.gates_read)
        few = tuple((evidence.depth, evidence.rows_read) for evidence in read if evidence.rows_read)
        depth_1 = torch.tensor([depth])
        told = []
        parts = zip(rows, token_R.split(1), token_R.tolist(), logits_RV.split(1), strict=True)
        for row, token_1, token, logits_1V in parts:
            work, own = row.session.cache.count_anew(), reads + row.reads + more_reads
            row.session.history.say(logits_1V, sum(work.calls), depth)
            step = Step(token_1, depth_1, logits_1V, own, gates, work, prefill, rows_read=few)
            row.reads = ()
            told.append(row.end(step, token))
        return told


def refusal(decoder: Decoder) -> str | None:
    """Why rows of this decoder cannot go their own ways; None if they can."""
    if not isinstance(decoder, Full | EarlyExit):
        return f"{type(decoder).__name__} decodes rows in step."
    if isinstance(decoder, EarlyExit) and not decoder.skipped_state.any_row:
        return f"The rule {type(decoder.skipped_state).__name__} for skipped state works on rows in step."
    return None


def joined(pasts: Sequence[Past]) -> Past:
    """What rows of their own have read and said, as one."""
    return Past(
        lambda: [each.texts[0] for each in pasts],
        lambda steps, count: [each.likely(steps, count)[0] for each in pasts],
        blocks=lambda: [each.blocks()[0] for each in pasts if each.blocks is not None],
        seconds=lambda: [each.seconds()[0] for each in pasts if each.seconds is not None],
        exits=lambda count: [each.exits(count)[0] for each in pasts if each.exits is not None],
    )
