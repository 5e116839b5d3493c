"""Lossless decoding: draft at the exits, verify at the top, undo the wrong tokens.

The text is full decoding's (greedy), or drawn from full decoding's distribution (sampled).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, final

import torch

from dynamax.backbones.base import Backbone
from dynamax.decoding.base import Decoder, read_exits
from dynamax.decoding.sampling import Sampler
from dynamax.decoding.session import Session
from dynamax.decoding.verification import verify
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Step


@final
class SelfSpeculative(Decoder):
    """Steps that leave early are drafts; a step that does not, or the limit, verifies them all in one pass.

    Args:
        backbone: The model.
        exits: Its exits.
        policy: When to leave, and so when to draft.
        sampler: How tokens are drawn; greedy by default.
        draft_limit: Most drafted tokens before a verification.
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
        draft_limit: int = 4,
    ) -> None:
        if draft_limit < 1:
            raise UserError(f"draft_limit is {draft_limit}; it must be at least 1. For no drafts, decode with Full.")
        super().__init__(backbone, exits, policy, sampler)
        _, self._policy = read_exits(self)
        self.draft_limit = draft_limit

    def options(self) -> dict[str, object]:
        """Most drafts before a verification."""
        return {"draft_limit": self.draft_limit}

    def steps(self, session: Session) -> Iterator[Step]:
        """Rounds of drafting and verifying."""
        yield session.prefill()
        while True:
            yield from exit_round(session, self._policy, self.draft_limit)


def exit_round(session: Session, policy: TerminationPolicy, draft_limit: int) -> list[Step]:
    """Draft at the exits for as long as the policy lets rows leave, then verify all drafts in one pass.

    The verifying step bears the cost of rejected drafts.

    Args:
        session: The run; nothing is owed in it.
        policy: When to leave, and so when to draft.
        draft_limit: Most drafts.

    Returns:
        The steps of the drafts that stood up to verification, and of the pass that verified them.
    """
    most = min(draft_limit, session.max_new_tokens - session.steps - 1)
    sampler = session.sampler
    session.snapshot()
    token_B, steps, draft_TBV = session.token_B, [], []
    while True:
        arrival = session.run_to_exit(policy, token_B, ahead=len(steps))
        session.cache.group.owe(arrival.depth, arrival.h_BTD)
        if not arrival.left or len(steps) == most:
            break
        logits_BV = arrival.trail[-1].answer
        draft_TBV.append(sampler.distribution(logits_BV))
        token_B = sampler.draw(draft_TBV[-1])
        steps.append(session.step(arrival, logits_BV, token_B))
    logits_BTV = session.backbone.unembed(session.settle())
    draft_BT = torch.stack([step.token_B for step in steps], 1) if steps else token_B.new_zeros(len(token_B), 0)
    kept, token_B = verify(sampler.distribution(logits_BTV), draft_TBV, draft_BT, session.finished_B, sampler)
    if kept < len(steps):
        session.rollback(kept + 1)
    last = session.step(arrival._replace(left=False), logits_BTV[:, kept], token_B, top_rows=logits_BTV.shape[1])
    for rejected in steps[kept:]:
        last = replace(
            last,
            work=last.work + rejected.work,
            logits_read=last.logits_read + rejected.logits_read,
            gates_read=last.gates_read + rejected.gates_read,
            rows_read=last.rows_read + rejected.rows_read,
        )
    return [*(replace(step, accepted=True) for step in steps[:kept]), last]
