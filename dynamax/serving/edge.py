"""How an edge decodes: alone, or with a cloud that finishes what its exits are not sure of.

Each is a decoder like the others; the blocks and exits are those of ``dynamax split``'s edge folder. The source of the
first two is CE-CoLLM (arXiv 2411.02829), whose modes are called standalone and collaborative.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, final

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.decoding.base import Decoder, read_exits
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.decoding.session import Arrival, Session
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.serving.link import CloudDown, Link
from dynamax.serving.waits import DraftLength, Waits
from dynamax.serving.wire import MOST_DRAFTS
from dynamax.types import Step

LOG = logging.getLogger("dynamax.edge")

EXIT, CLOUD, ALONE = "exit", "cloud", "alone"
"""Where a token came from: an exit that the policy trusts, the cloud, or the last exit as the cloud would be late."""


@final
class Standalone(Decoder):
    """The edge alone: a token that no exit is sure of is the last exit's. Nothing is sent."""

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitBank | None = None,
        policy: TerminationPolicy | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__(backbone, exits, policy, sampler)
        _, self._policy = read_exits(self)
        self.origins: list[str] = []

    def steps(self, session: Session) -> Iterator[Step]:
        """Run to an exit; the last one says what it can."""
        self.origins = []
        session.probe.begin(prefill=True)
        arrival = Arrival(session.backbone.embed(session.prompt_BT, session.cache), 0)
        arrival = session.run_to_exit(self._policy, arrival=arrival)
        while True:
            self.origins.append(EXIT if arrival.left else ALONE)
            yield leave(session, arrival, self.sampler, prefill=not session.steps)
            arrival = session.run_to_exit(self._policy)


@final
class Collaborative(Decoder):
    """The edge says what its exits are sure of; the cloud says the rest, with a context that it keeps.

    The prompt is finished by the cloud. With float32 on the wire the tokens are those of ``EarlyExit`` in one process.

    Args:
        backbone: The edge's blocks.
        exits: Its exits.
        policy: When to leave.
        sampler: How tokens are drawn at exits; the cloud's are the most likely ones, so it must be greedy.
        link: The connection to the cloud.
        deadline: Seconds that a token of the cloud may take; if it would take longer, the last exit says it. None waits
            as long as the link does, and then fails.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitBank | None = None,
        policy: TerminationPolicy | None = None,
        sampler: Sampler | None = None,
        *,
        link: Link,
        deadline: float | None = None,
    ) -> None:
        super().__init__(backbone, exits, policy, sampler)
        _, self._policy = read_exits(self)
        check_greedy(self)
        if deadline is not None and not 0 < deadline < math.inf:
            raise UserError(
                f"deadline is {deadline}; it must be above 0, in seconds. Leave it out to wait for the cloud."
            )
        self.link, self.deadline = link, deadline
        self.origins: list[str] = []
        self._waits = Waits(deadline)

    def options(self) -> dict[str, object]:
        """How long a token of the cloud may take."""
        return {"deadline": self.deadline}

    def steps(self, session: Session) -> Iterator[Step]:
        """Run to an exit; leave there, or ask the cloud."""
        self.origins = []
        send_up(session, self.link)
        try:
            arrival = read_prompt(session, self._policy, asked=self.deadline is not None)
            while True:
                if arrival.left and session.steps:
                    self.origins.append(EXIT)
                    yield leave(session, arrival, self.sampler)
                else:
                    yield self._asked(session, arrival)
                arrival = session.run_to_exit(self._policy)
        finally:
            self.link.end()

    def _asked(self, session: Session, arrival: Arrival) -> Step:
        """The cloud's token; or, if it would be late, the last exit's."""
        session.run_to_end(arrival)
        prefill = not session.steps
        if self._waits.worth_asking():
            begin = time.perf_counter()
            try:
                likely, _ = self.link.next(timeout=self.deadline)
                self._waits.took(time.perf_counter() - begin)
                self.origins.append(CLOUD)
                logits_BV = as_logits(likely, session.backbone.spec.vocab, arrival.h_BTD)
                return session.step(arrival._replace(left=False), logits_BV, logits_BV.argmax(-1), prefill=prefill)
            except CloudDown as error:
                if self.deadline is None:
                    raise
                if CLOUD not in self.origins and self._waits.begins:
                    LOG.warning("%s The last exit answers.", error)
                self._waits.late()
        self.origins.append(ALONE)
        return say(session, arrival, self.sampler, prefill=prefill)  # it has gone on already: nothing is owed


@final
class Drafting(Decoder):
    """The edge drafts at its exits, the cloud verifies the drafts in one pass: the tokens are the whole model's.

    How many are drafted goes by how often drafts are right and how long the cloud takes.

    Args:
        backbone: The edge's blocks.
        exits: Its exits.
        policy: When to leave, and so when to draft.
        sampler: Greedy; drafts are compared with the most likely tokens.
        link: The connection to the cloud.
        draft_limit: Most drafts of a round.
    """

    lossless: ClassVar[bool] = True
    drafts: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitBank | None = None,
        policy: TerminationPolicy | None = None,
        sampler: Sampler | None = None,
        *,
        link: Link,
        draft_limit: int = 8,
    ) -> None:
        if not 1 <= draft_limit <= MOST_DRAFTS:
            raise UserError(f"draft_limit is {draft_limit}; it must be from 1 to {MOST_DRAFTS}.")
        if not link.exact:
            raise UserError("Drafting is lossless, so hidden states travel as they are: wire float32. Choose that.")
        super().__init__(backbone, exits, policy, sampler)
        _, self._policy = read_exits(self)
        check_greedy(self)
        self.link, self.draft_limit = link, draft_limit
        self.origins: list[str] = []
        self._length = DraftLength(draft_limit)

    def options(self) -> dict[str, object]:
        """Most drafts of a round."""
        return {"draft_limit": self.draft_limit}

    def steps(self, session: Session) -> Iterator[Step]:
        """Rounds of drafting here and verifying there."""
        self.origins = []
        send_up(session, self.link)
        try:
            arrival = read_prompt(session, self._policy, asked=False)
            logits_BV, _ = self._verified(session, arrival, [])
            self.origins.append(CLOUD)
            yield session.step(arrival._replace(left=False), logits_BV, logits_BV.argmax(-1), prefill=True)
            while True:
                yield from self._round(session)
        finally:
            self.link.end()

    def _round(self, session: Session) -> list[Step]:
        most = min(self._length.best(), session.max_new_tokens - session.steps - 1)
        session.snapshot()
        begin, token_B, steps = time.perf_counter(), session.token_B, []
        while True:
            arrival = session.run_to_exit(self._policy, token_B, ahead=len(steps))
            if not arrival.left or len(steps) == most:
                break
            steps.append(leave(session, arrival, self.sampler))
            token_B = steps[-1].token_B
        session.run_to_end(arrival)
        between = time.perf_counter()
        logits_BV, kept = self._verified(session, arrival, [int(step.token_B) for step in steps])
        self._length.learn(between - begin, time.perf_counter() - between, len(steps), kept)
        if kept < len(steps):
            session.rollback(kept + 1)
        self.origins += [EXIT] * kept + [CLOUD]
        last = session.step(arrival._replace(left=False), logits_BV, logits_BV.argmax(-1), top_rows=1 + len(steps))
        for rejected in steps[kept:]:
            last = replace(last, work=last.work + rejected.work)
        return [*(replace(step, accepted=True) for step in steps[:kept]), last]

    def _verified(self, session: Session, arrival: Arrival, drafts: list[int]) -> tuple[Tensor, int]:
        likely, kept = self.link.next(drafts)
        return as_logits(likely, session.backbone.spec.vocab, arrival.h_BTD), kept


# -- what they share ---------------------------------------------------------------------------------------


def check_greedy(decoder: Decoder) -> None:
    """Refuse to draw tokens by chance where the cloud says the most likely ones."""
    if not isinstance(decoder.sampler, Greedy):
        raise UserError(
            f"{type(decoder).__name__} was given the sampler {type(decoder.sampler).__name__}, but the cloud says the "
            f"most likely token. Leave sampling out (do_sample: false), or decode with Standalone."
        )


def send_up(session: Session, link: Link) -> None:
    """Begin an answer: whatever passes the depth of the cut goes up, each position once."""
    if len(session.prompt_BT) > 1:
        raise UserError(f"An edge answers one prompt at a time, but {len(session.prompt_BT)} rows were given.")
    link.begin(session.prompt_BT.shape[1] + session.max_new_tokens)
    session.cache.outlets[link.start] = lambda h_BTD: link.send(h_BTD[0].float().cpu())


def read_prompt(session: Session, policy: TerminationPolicy, *, asked: bool) -> Arrival:
    """Run the prompt through the edge's blocks; with the evidence of its exits only where it is ``asked`` for."""
    session.probe.begin(prefill=True)
    arrival = Arrival(session.backbone.embed(session.prompt_BT, session.cache), 0)
    if not asked:
        return Arrival(session.run_to_end(arrival), session.end)
    return session.run_to_exit(policy, arrival=arrival)


def leave(session: Session, arrival: Arrival, sampler: Sampler, *, prefill: bool = False) -> Step:
    """The positions leave where they arrived: blocks of the edge above it are owed them."""
    if arrival.depth < session.end:
        session.cache.owe(arrival.depth, arrival.h_BTD)
    return say(session, arrival, sampler, prefill=prefill)


def say(session: Session, arrival: Arrival, sampler: Sampler, *, prefill: bool = False) -> Step:
    """The token that the exit says where the positions arrived."""
    logits_BV = arrival.trail[-1].answer
    return session.step(arrival._replace(left=True), logits_BV, sampler(logits_BV), prefill=prefill)


def as_logits(likely: list[int], vocab: int, like: Tensor) -> Tensor:
    """Logits ``[1, V]`` that say no more than which tokens are the most likely, surest first."""
    logits_BV = torch.full((1, vocab), -torch.inf, device=like.device)
    logits_BV[0, likely] = torch.arange(0.0, -len(likely), -1.0, device=like.device)
    return logits_BV
