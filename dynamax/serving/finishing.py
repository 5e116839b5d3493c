"""The cloud's work: it finishes tokens from hidden states, those of many sessions in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynamax.backbones.base import Backbone
from dynamax.serving.contexts import Context, Contexts

LIKELY = 16
"""Tokens that the cloud names beside the one it says."""


@dataclass(frozen=True)
class Ask:
    """A token that is asked for.

    Attributes:
        context: The session.
        count: Positions that the token comes after.
        drafts: Tokens that the edge took for the last positions; the cloud says how many of them it would have said.
    """

    context: Context
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def fresh(self) -> bool:
        """Whether it is the session's first."""
        return self.context.cache.length == 0


@dataclass(frozen=True)
class Said:
    """What the cloud says.

    Attributes:
        likely: The most likely tokens after the drafts that were kept, surest first.
        kept: How many were kept.
    """

    likely: list[int]
    kept: int

    @property
    def token(self) -> int:
        """The most likely one."""
        return self.likely[0]


@torch.inference_mode()
def finish(contexts: Contexts, asks: Sequence[Ask]) -> list[Said]:
    """Take what has come of each session to the top, and say its next token.

    Args:
        contexts: All sessions.
        asks: What is asked, of another session each, whose positions have come. Those that have read nothing yet, and
            those that have, do not go together.
    """
    slots = [contexts.slot(ask.context) for ask in asks]
    remembers = any("recurrent" in state.kinds for state in contexts.slots.states)
    before = [_recurrent(contexts, slot) if ask.drafts else [] for ask, slot in zip(asks, slots, strict=True)]
    begin = [ask.context.cache.length for ask in asks]
    rows = [ask.context.take(ask.count) for ask in asks]
    logits = _logits(contexts, slots, rows, [len(ask.drafts) + 1 for ask in asks])
    said = []
    for ask, slot, start, h_TW, held, logits_TV in zip(asks, slots, begin, rows, before, logits, strict=True):
        tokens = logits_TV.argmax(-1).tolist()
        kept = next((i for i, (own, draft) in enumerate(zip(tokens, ask.drafts, strict=False)) if own != draft), None)
        if kept is not None:
            length = ask.count - len(ask.drafts) + kept
            ask.context.take_back(start if remembers else length)
            if remembers:
                _read_again(contexts, ask.context, slot, h_TW[: length - start], held)
        kept = len(ask.drafts) if kept is None else kept
        said.append(Said([tokens[kept], *_others(logits_TV[kept], tokens[kept])], kept))
    return said


def _others(logits_V: Tensor, first: int) -> list[int]:
    """The tokens that are most likely after the first: policies of the edge may guess from them."""
    found = logits_V.topk(min(LIKELY, len(logits_V))).indices.tolist()
    return [token for token in found if token != first][: LIKELY - 1]


def _logits(contexts: Contexts, slots: Sequence[int], rows: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
    """Each row's new positions through all blocks; the logits of the last ``wanted`` ones, ``[wanted, V]``."""
    backbone: Backbone = contexts.backbone
    lengths = [len(h_TW) for h_TW in rows]
    h_BTW = pad_sequence(list(rows), batch_first=True)
    h_BTW = backbone.run(h_BTW, contexts.span, contexts.slots.select(slots, lengths))
    last = [h_TW[length - count : length] for h_TW, length, count in zip(h_BTW, lengths, wanted, strict=True)]
    return list(backbone.unembed(torch.cat(last)[None])[0].split(list(wanted)))


def _recurrent(contexts: Contexts, slot: int) -> list[list[Tensor]]:
    """A copy of what the blocks remember of a row besides keys."""
    return [[held[slot].clone() for held in state.recurrent] for state in contexts.slots.states]


def _read_again(
    contexts: Contexts, context: Context, slot: int, h_TW: Tensor, held: Sequence[Sequence[Tensor]]
) -> None:
    """Put back what the blocks remembered of a row, and let them read these positions anew."""
    for state, copies in zip(contexts.slots.states, held, strict=True):
        for whole, copy in zip(state.recurrent, copies, strict=False):  # a row that is new had nothing
            whole[slot] = copy
    contexts.backbone.run(h_TW[None], contexts.span, contexts.slots.select([slot], [len(h_TW)]))
    context.received = context.cache.length
