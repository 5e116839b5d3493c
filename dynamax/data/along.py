"""Decoding that keeps the states it passes, so that a text need not be read again. Knows no exits and no disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.decoding.base import Decoder
from dynamax.decoding.sampling import Sampler
from dynamax.decoding.session import Arrival, Session
from dynamax.types import Step


@final
class KeepStates(Decoder):
    """Every block for every token, as ``Full``; keeps the states at some depths. For one run.

    Args:
        backbone: The model.
        depths: Where states are kept, ascending; the last one is the model's own depth.
        sampler: How tokens are drawn.
    """

    lossless: ClassVar[bool] = True

    def __init__(self, backbone: Backbone, depths: Sequence[int], sampler: Sampler) -> None:
        super().__init__(backbone, None, None, sampler)
        assert depths[-1] == backbone.spec.depth, "tokens are drawn at the top"
        self._kept: dict[int, list[Tensor]] = {depth: [] for depth in depths}
        self._session: Session | None = None

    def steps(self, session: Session) -> Iterator[Step]:
        """Embed, run to the top, draw."""
        self._session = session
        session.probe.begin(prefill=True)
        arrival, prefill = Arrival(self.backbone.embed(session.prompt_BT, session.cache), 0), True
        while True:
            h_BTD = self._run(arrival, session)
            logits_BV = self.backbone.unembed(h_BTD[:, -1:])[:, 0]
            yield session.step(arrival, logits_BV, self.sampler(logits_BV), prefill=prefill)
            arrival, prefill = session.embed(), False

    @torch.inference_mode()
    def states(self) -> dict[int, Tensor]:
        """States ``h_BTD`` of prompt and answer by depth; ends the run, whose last token has not been read yet."""
        assert self._session is not None, "decode comes first"
        self._run(self._session.embed(), self._session)
        return {depth: torch.cat(parts, 1) for depth, parts in self._kept.items()}

    def _run(self, arrival: Arrival, session: Session) -> Tensor:
        h_BTD = arrival.h_BTD
        for depth, h_BTD in self.backbone.walk(arrival.h_BTD, self._kept, session.cache):
            self._kept[depth].append(h_BTD)
        return h_BTD
