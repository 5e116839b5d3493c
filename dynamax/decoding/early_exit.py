"""Early-exit decoding: climb, ask, leave. The text may differ from full decoding's; the state need not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.backbones.skipped_state import Exact, SkippedState
from dynamax.decoding.ascent import Arrival, Ascent, gates_asked, logits_depths
from dynamax.decoding.base import Decoder, Probe
from dynamax.decoding.loop import checked_prompt, drive
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Span, Step


class EarlyExit(Decoder):
    """Leaves at the first exit where every live row wishes to. The prompt runs at full depth.

    Args:
        backbone: The model.
        bank: Its exits.
        policy: When to leave.
        rule: What becomes of the state of skipped blocks; exact catch-up by default.
        sampler: How tokens are drawn; greedy by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        bank: ExitBank,
        policy: TerminationPolicy,
        *,
        rule: SkippedState | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        policy.validate(bank.depths)
        self.backbone = backbone
        self.bank = bank.select_gates(policy.gates)
        self.policy = policy
        self.rule = rule or Exact()
        self.rule.validate(backbone)
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
        """See ``Decoder.decode``."""
        checked_prompt(prompt_BT, limit=limit, spec=self.backbone.spec)
        cache = self.backbone.new_cache(prompt_BT.shape[1] + limit, pad_B)
        ascent = Ascent(self.backbone, self.bank, cache)
        clock = probe or Probe()

        def step(tokens_BT: Tensor, index: int, ended_B: Tensor) -> Step:
            if index == 0:
                return prefilled(ascent, tokens_BT, self.sampler, clock)
            return self._step(ascent, tokens_BT, index, ended_B, clock)

        yield from drive(step, prompt_BT, limit=limit, stop=stop, forced_BT=forced_BT)

    def _step(self, ascent: Ascent, tokens_BT: Tensor, index: int, ended_B: Tensor, clock: Probe) -> Step:
        clock.begin(prefill=False)
        arrival = ascent.ask(tokens_BT, self.policy, ended_B, step=index, probe=clock)
        if arrival.left:
            depth, logits_BV = arrival.depth, arrival.trail[-1].logits_BV
            ascent.leave(arrival, self.rule)
        else:
            h_BTD = self.backbone.run(arrival.h_BTD, Span(arrival.depth, ascent.total), ascent.cache)
            depth, logits_BV = ascent.total, self.backbone.unembed(h_BTD)[:, 0]
        token_B = self.sampler(logits_BV)
        clock.end(depth)
        return told(arrival, token_B, logits_BV, depth, ascent)


def prefilled(ascent: Ascent, prompt_BT: Tensor, sampler: Sampler, clock: Probe) -> Step:
    """The prompt, run at full depth, and the first token."""
    clock.begin(prefill=True)
    h_BTD = ascent.climb(ascent.backbone.embed(prompt_BT, ascent.cache), Span(0, ascent.total))
    logits_BV = ascent.backbone.unembed(h_BTD[:, -1:])[:, 0]
    token_B = sampler(logits_BV)
    clock.end(ascent.total)
    return Step(token_B, ascent.total, logits_BV, logits_read=(ascent.total,), work=ascent.work(), prefill=True)


def told(arrival: Arrival, token_B: Tensor, logits_BV: Tensor, depth: int, ascent: Ascent) -> Step:
    """The record of a step that asked its exits."""
    read = logits_depths(arrival.trail) + ((depth,) if depth == ascent.total else ())
    wish_BE = torch.stack(arrival.wishes, -1)
    return Step(token_B, depth, logits_BV, wish_BE, read, gates_asked(arrival.trail), ascent.work())
