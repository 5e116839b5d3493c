"""Plain decoding at full depth: the baseline that everything is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.decoding.base import Decoder, Probe
from dynamax.decoding.loop import checked_prompt, drive
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.types import Span, Step


class Full(Decoder):
    """Every block for every token.

    Args:
        backbone: The model.
        sampler: How tokens are drawn; greedy by default.
    """

    def __init__(self, backbone: Backbone, sampler: Sampler | None = None) -> None:
        self.backbone = backbone
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
        spec = self.backbone.spec
        checked_prompt(prompt_BT, limit=limit, spec=spec)
        cache = self.backbone.new_cache(prompt_BT.shape[1] + limit, pad_B)
        clock = probe or Probe()

        def step(tokens_BT: Tensor, index: int, ended_B: Tensor) -> Step:
            clock.begin(prefill=index == 0)
            before = cache.work()
            h_BTD = self.backbone.run(self.backbone.embed(tokens_BT, cache), Span(0, spec.depth), cache)
            logits_BV = self.backbone.unembed(h_BTD[:, -1:])[:, 0]
            token_B = self.sampler(logits_BV)
            clock.end(spec.depth)
            return Step(
                token_B,
                spec.depth,
                logits_BV,
                logits_read=(spec.depth,),
                work=cache.work() - before,
                prefill=index == 0,
            )

        yield from drive(step, prompt_BT, limit=limit, stop=stop, forced_BT=forced_BT)
