"""Lossless decoding: draft at the exits, verify at the top, take back what was wrong.

The text is full decoding's (greedy), or drawn from full decoding's distribution (sampled).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.decoding.ascent import Ascent
from dynamax.decoding.base import Decoder, Probe
from dynamax.decoding.early_exit import prefilled, told
from dynamax.decoding.loop import checked_prompt
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Step


class SelfSpeculative(Decoder):
    """Steps that leave early are drafts; a step that does not, or the limit, verifies them all in one pass.

    Args:
        backbone: The model.
        bank: Its exits.
        policy: When to leave, and so when to draft.
        draft_limit: Most drafted tokens before a verification.
        sampler: How tokens are drawn; greedy by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        bank: ExitBank,
        policy: TerminationPolicy,
        *,
        draft_limit: int = 4,
        sampler: Sampler | None = None,
    ) -> None:
        if draft_limit < 1:
            raise UserError(f"draft_limit is {draft_limit}; it must be at least 1. For no drafts, decode with Full.")
        policy.validate(bank.depths)
        self.backbone = backbone
        self.bank = bank.select_gates(policy.gates)
        self.policy = policy
        self.draft_limit = draft_limit
        self.sampler = sampler or Greedy()

    @torch.inference_mode()
    def decode(
        self,
        prompt_BT: Tensor,
        *,
        limit: int,
        stop: Sequence[int] = (),
        pad_B: Tensor | None = None,
        forced_BT: Tensor | None = None,
        probe: Probe | None = None,
    ) -> Iterator[Step]:
        """See ``Decoder.decode``. Forced tokens are refused: what is lossless has nothing to compare."""
        if forced_BT is not None:
            raise UserError(
                "Lossless decoding was given forced tokens, but its own are full decoding's already. "
                "Force tokens on EarlyExit, or leave forced_BT out."
            )
        checked_prompt(prompt_BT, limit=limit, spec=self.backbone.spec)
        cache = self.backbone.new_cache(prompt_BT.shape[1] + limit + self.draft_limit, pad_B)
        ascent = Ascent(self.backbone, self.bank, cache)
        clock = probe or Probe()
        stop_S = torch.tensor(stop, device=prompt_BT.device, dtype=torch.long)
        ended_B = torch.zeros(prompt_BT.shape[0], dtype=torch.bool, device=prompt_BT.device)
        steps = [prefilled(ascent, prompt_BT, self.sampler, clock)]
        token_B, given = steps[0].token_B, 0
        while True:
            for step in steps:
                token_B = torch.where(ended_B, stop_S[0], step.token_B) if len(stop_S) else step.token_B
                yield replace(step, token_B=token_B)
                ended_B = ended_B | torch.isin(token_B, stop_S)
                given += 1
                if given == limit or bool(ended_B.all()):
                    return
            drafts = min(self.draft_limit, limit - given - 1)
            steps = self._round(ascent, token_B, ended_B, drafts, given, clock)

    def _round(
        self, ascent: Ascent, token_B: Tensor, ended_B: Tensor, drafts: int, index: int, clock: Probe
    ) -> list[Step]:
        mark = ascent.mark()
        steps: list[Step] = []
        q_TBV: list[Tensor] = []
        while True:
            clock.begin(prefill=False)
            arrival = ascent.ask(token_B[:, None], self.policy, ended_B, step=index + len(steps), probe=clock)
            ascent.cache.owe(arrival.depth, arrival.h_BTD)
            if not arrival.left or len(steps) == drafts:
                break
            logits_BV = arrival.trail[-1].logits_BV
            q_TBV.append(self.sampler.distribution(logits_BV))
            token_B = self.sampler.draw(q_TBV[-1])
            clock.end(arrival.depth)
            steps.append(told(arrival, token_B, logits_BV, arrival.depth, ascent))
        h_BTD = ascent.settle()
        assert h_BTD is not None
        logits_BTV = self.backbone.unembed(h_BTD)
        p_BTV = self.sampler.distribution(logits_BTV)
        draft_BT = torch.stack([step.token_B for step in steps], 1) if steps else token_B.new_zeros(len(token_B), 0)
        kept, token_B = verify(p_BTV, q_TBV, draft_BT, ended_B, self.sampler)
        if kept < len(steps):
            ascent.rollback(mark, kept + 1)
        clock.end(ascent.total)
        last = told(arrival, token_B, logits_BTV[:, kept], ascent.total, ascent)
        return _charged(steps, kept, last)


def verify(
    p_BTV: Tensor, q_TBV: Sequence[Tensor], draft_BT: Tensor, ended_B: Tensor, sampler: Sampler
) -> tuple[int, Tensor]:
    """Speculative sampling's acceptance (arXiv 2211.17192, algorithm 1), rows in lockstep.

    Args:
        p_BTV: The full model's distributions, one more than there are drafts.
        q_TBV: The distributions the drafts were drawn from.
        draft_BT: Drafted tokens.
        ended_B: Rows whose text has ended; they accept everything.
        sampler: Draws and tosses.

    Returns:
        How many drafts all rows keep, and the token that follows them in each row.
    """
    drafts = draft_BT.shape[1]
    for index in range(drafts):
        p_BV, q_BV, draft_B1 = p_BTV[:, index], q_TBV[index], draft_BT[:, index, None]
        p_B, q_B = p_BV.gather(1, draft_B1)[:, 0], q_BV.gather(1, draft_B1)[:, 0]
        accepted_B = (sampler.uniform(p_B) * q_B < p_B) | ended_B
        if not bool(accepted_B.all()):
            rest_BV = (p_BV - q_BV).clamp_min(0)
            return index, torch.where(accepted_B, draft_B1[:, 0], sampler.draw(rest_BV))
    return drafts, sampler.draw(p_BTV[:, drafts])


def _charged(steps: list[Step], kept: int, last: Step) -> list[Step]:
    """The steps told: drafts kept, then the verifying one, which bears the cost of drafts rejected."""
    for lost in steps[kept:]:
        last = replace(
            last,
            work=last.work + lost.work,
            logits_read=last.logits_read + lost.logits_read,
            gates_read=last.gates_read + lost.gates_read,
        )
    return [*(replace(step, accepted=True) for step in steps[:kept]), last]
