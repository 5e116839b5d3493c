"""The cloud's work: it finishes tokens from hidden states, those of many sessions in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynamax.backbones.base import Backbone
from dynamax.serving.contexts import Context, Contexts

LIKELY = 16
"""Tokens that the cloud names, the one it says among them."""

ALONE = 512
"""Positions of a row that are read together with other rows'; those of a longer row are read before, by themselves."""


@dataclass(frozen=True, eq=False)
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
        likely: The most likely tokens after the drafts that were kept, surest first; none if the states that came gave
            no numbers.
        kept: How many were kept.
    """

    likely: list[int]
    kept: int

    @property
    def token(self) -> int:
        """The most likely one."""
        return self.likely[0]


def passes(asks: Sequence[Ask]) -> list[list[Ask]]:
    """What can be finished together: sessions that have read something, new ones, and each long new one by itself."""
    groups: dict[object, list[Ask]] = {}
    for ask in asks:
        key: object = ask.fresh
        if ask.fresh and ask.count > ALONE:
            key = ask
        groups.setdefault(key, []).append(ask)
    return list(groups.values())


@torch.inference_mode()
def finish(contexts: Contexts, asks: Sequence[Ask], lock: AbstractContextManager[object] | None = None) -> list[Said]:
    """Take what has come of each session to the top, and say its next token.

    Args:
        contexts: All sessions; none is opened or closed meanwhile.
        asks: What is asked, of another session each, whose positions have come; one of ``passes``.
        lock: Held while it is looked at what has come; states may come in at all other times.
    """
    lock = lock or nullcontext()
    slots = [contexts.slot(ask.context) for ask in asks]
    begin = [ask.context.cache.length for ask in asks]
    with lock:
        rows = [ask.context.take(ask.count) for ask in asks]
    read = [_read_alone(contexts, slot, h_TW, ask) for slot, h_TW, ask in zip(slots, rows, asks, strict=True)]
    before = [_recurrent(contexts, slot) if ask.drafts else [] for ask, slot in zip(asks, slots, strict=True)]
    late = [h_TW[count:] for h_TW, count in zip(rows, read, strict=True)]
    ranked = _ranked(contexts, slots, late, [len(ask.drafts) + 1 for ask in asks])
    said = []
    for ask, slot, start, h_TW, held, likely in zip(
        asks, slots, map(sum, zip(begin, read, strict=True)), late, before, ranked, strict=True
    ):
        kept = _kept(likely, ask.drafts)
        if kept < len(ask.drafts):
            length = ask.count - len(ask.drafts) + kept
            _take_back(contexts, ask.context, slot, start, h_TW[: length - start], held)
            with lock:
                ask.context.forget(length)
        said.append(Said(likely[kept], kept))
    return said


def _kept(likely: Sequence[Sequence[int]], drafts: Sequence[int]) -> int:
    """How many drafts are the most likely tokens, up to the first that is not."""
    pairs = enumerate(zip(likely, drafts, strict=False))
    return next((i for i, (own, draft) in pairs if own[:1] != [draft]), len(drafts))


def _read_alone(contexts: Contexts, slot: int, h_TW: Tensor, ask: Ask) -> int:
    """Read the beginning of a long row by itself, in pieces: with others it would be padding for all of them."""
    read = 0
    while len(h_TW) - read > ALONE + len(ask.drafts):
        chunk = contexts.slots.select([slot], [ALONE])
        contexts.backbone.run(h_TW[None, read : read + ALONE], contexts.span, chunk)
        read += ALONE
    return read


def _ranked(
    contexts: Contexts, slots: Sequence[int], rows: Sequence[Tensor], wanted: Sequence[int]
) -> list[list[list[int]]]:
    """Each row's new positions through all blocks; the most likely tokens after each of its last ``wanted`` ones.

    The first is what argmax says; the next ones are for policies of the edge that guess from them. None of a position
    whose logits are no numbers.
    """
    backbone: Backbone = contexts.backbone
    lengths = [len(h_TW) for h_TW in rows]
    h_BTW = pad_sequence(list(rows), batch_first=True)
    h_BTW = backbone.run(h_BTW, contexts.span, contexts.slots.select(slots, lengths))
    last = [h_TW[length - count : length] for h_TW, length, count in zip(h_BTW, lengths, wanted, strict=True)]
    logits_NV = backbone.unembed(torch.cat(last)[None])[0]
    finite, firsts = logits_NV.isfinite().all(-1).tolist(), logits_NV.argmax(-1).tolist()
    others = logits_NV.topk(min(LIKELY, logits_NV.shape[-1])).indices.tolist()
    ranked = [
        [first, *(token for token in found if token != first)][:LIKELY] if known else []
        for known, first, found in zip(finite, firsts, others, strict=True)
    ]
    ends = list(accumulate(wanted))
    return [ranked[end - count : end] for end, count in zip(ends, wanted, strict=True)]


def _recurrent(contexts: Contexts, slot: int) -> list[list[Tensor]]:
    """A copy of what the blocks remember of a row besides keys."""
    return [[held[slot].clone() for held in state.recurrent] for state in contexts.slots.states]


def _take_back(
    contexts: Contexts, context: Context, slot: int, start: int, h_TW: Tensor, held: Sequence[Sequence[Tensor]]
) -> None:
    """Forget the positions of a row behind ``start``, but for ``h_TW``: a recurrent state reads those anew."""
    if not any("recurrent" in state.kinds for state in contexts.slots.states):
        context.cache.group.crop(start + len(h_TW))
        return
    context.cache.group.crop(start)
    for state, copies in zip(contexts.slots.states, held, strict=True):
        for whole, copy in zip(state.recurrent, copies, strict=False):  # a row that is new had nothing
            whole[slot] = copy
    contexts.backbone.run(h_TW[None], contexts.span, contexts.slots.select([slot], [len(h_TW)]))
