"""Lossless decoding with drafts from several sources, as many as pay on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.decoding.base import Decoder, read_exits
from dynamax.decoding.drafts import DraftSource, PromptLookup, TokenTable
from dynamax.decoding.pace import Pace
from dynamax.decoding.sampling import Sampler
from dynamax.decoding.session import Session
from dynamax.decoding.speculative import exit_round
from dynamax.decoding.verification import verify
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Step

EXITS, SOURCES = "exits", "sources"
"""The two ways to draft."""


@final
class Speculative(Decoder):
    """Drafts come from earlier text, and from the exits if it has some; the full model verifies them.

    A round either takes what the sources suggest and verifies it in one pass over all blocks, or drafts at the exits as
    ``SelfSpeculative`` does. Which of the two, and how many drafts, is decided by the tokens a second they gave so far;
    where no draft pays, it is full decoding. The decoder learns from text to text. Its tokens do not depend on what it
    decides, but for ties in the last digits.

    Args:
        backbone: The model.
        exits: Its exits; None to draft from the sources alone.
        policy: When to leave, and so when to draft at an exit; given where exits are.
        sampler: How tokens are drawn; greedy by default.
        sources: Where drafts come from, the one to ask first in front; PromptLookup and TokenTable by default.
        draft_limit: Most drafted tokens before a verification.

    Raises:
        UserError: If there is nothing to draft from.
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
        sources: list[DraftSource] | None = None,
        draft_limit: int = 4,
    ) -> None:
        if draft_limit < 1:
            raise UserError(f"draft_limit is {draft_limit}; it must be at least 1. For no drafts, decode with Full.")
        super().__init__(backbone, exits if policy is not None else None, policy, sampler)
        self.sources = [PromptLookup(), TokenTable()] if sources is None else list(sources)
        if not self.sources and policy is None:
            raise UserError(
                "Speculative was given no draft sources and no policy, so there is nothing to draft from. Give it "
                "sources such as PromptLookup, or exits and a policy; or decode with Full."
            )
        self._policy = None if policy is None else read_exits(self)[1]
        self.draft_limit = draft_limit
        self.pace = Pace()
        for place, source in enumerate(self.sources):
            for match, (right, wrong) in source.tried().items():
                self.pace.begin((place, match), right, wrong)

    def options(self) -> dict[str, object]:
        """Most drafts before a verification, and where they come from."""
        return {"draft_limit": self.draft_limit, "sources": [type(source).__name__ for source in self.sources]}

    def steps(self, session: Session) -> Iterator[Step]:
        """Rounds of drafting and verifying."""
        pad_B = session.cache.pad_B
        pads = [0] * len(session.prompt_BT) if pad_B is None else pad_B.tolist()
        texts = [text[pad:] for text, pad in zip(session.prompt_BT.tolist(), pads, strict=True)]
        for source in self.sources:
            source.begin(texts)
        yield session.prefill()
        self._extend(texts, session)
        while True:
            begin, way = time.perf_counter(), SOURCES if self._policy is None else self.pace.way((SOURCES, EXITS))
            if way == EXITS:
                assert self._policy is not None
                steps = exit_round(session, self._policy, self.draft_limit)
            else:
                steps = self._source_round(session, texts)
            self.pace.gave(way, len(steps), time.perf_counter() - begin)
            for step in steps:
                yield step
                self._extend(texts, session)

    def _source_round(self, session: Session, texts: list[list[int]]) -> list[Step]:
        """Verify what the sources suggest, in one pass; without a suggestion that pays, one step of full decoding."""
        most = min(self.draft_limit, session.max_new_tokens - session.steps - 1)
        draft_BT, kinds = self._suggested(session, texts, most)
        length = 1 + len(kinds)
        begin = time.perf_counter()
        if length == 1:
            arrival = session.embed()
            logits_BV = session.run_to_top(arrival)
            steps = [session.step(arrival, logits_BV, self.sampler(logits_BV))]
            self.pace.took(1, time.perf_counter() - begin)
            return steps
        session.snapshot()
        arrival, logits_BTV = session.run_chunk(torch.cat([session.token_B[:, None], draft_BT], 1))
        p_BTV = self.sampler.distribution(logits_BTV)
        kept, token_B = verify(p_BTV, [None] * len(kinds), draft_BT, session.finished_B, self.sampler)
        if kept < len(kinds):
            session.rollback(kept + 1)
        steps = [session.verified(draft_BT[:, index], logits_BTV[:, index]) for index in range(kept)]
        steps.append(session.step(arrival, logits_BTV[:, kept], token_B, top_rows=length))
        self.pace.took(length, time.perf_counter() - begin)
        self.pace.learn(kinds, kept)
        return steps

    def _suggested(self, session: Session, texts: list[list[int]], most: int) -> tuple[Tensor, list[Hashable]]:
        """Drafts for all rows, ``[B, T]``, as many as are expected to pay, and the kind of each.

        Rows are in step, so a draft is taken where every row has one; its kind is that of the least sure row. A row
        that has ended takes any.
        """
        ended = session.finished_B.tolist()
        rows = [self._chain(row, text, most) for row, text in enumerate(texts) if not ended[row]]
        shared = [list(found) for found in zip(*rows, strict=False)]
        kinds: list[Hashable] = [min(found, key=lambda each: each[1][1])[1] for found in shared]
        count = self.pace.length(kinds)
        drafts, alive = [], iter(rows)
        for row in range(len(texts)):
            chain = [(0, ())] * count if ended[row] else next(alive)
            drafts.append([token for token, _ in chain[:count]])
        return session.token_B.new_tensor(drafts), kinds[:count]

    def _chain(self, row: int, text: Sequence[int], most: int) -> list[tuple[int, tuple[int, int]]]:
        """Suggestions for one row, each after the one before: tokens, and (source, tokens it was found by)."""
        text, chain = list(text), []
        while len(chain) < most:
            for place, source in enumerate(self.sources):
                found = source.suggest(row, text)
                if found is not None:
                    chain.append((found.token, (place, found.match)))
                    text.append(found.token)
                    break
            else:
                break
        return chain

    def _extend(self, texts: list[list[int]], session: Session) -> None:
        """Tell the sources of the tokens that were told last."""
        ended = session.finished_B.tolist()
        for row, token in enumerate(session.token_B.tolist()):
            if not ended[row]:
                texts[row].append(token)
                for source in self.sources:
                    source.add(row, texts[row])
