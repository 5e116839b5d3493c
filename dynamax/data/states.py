"""Runs documents through a backbone and keeps what the exits would see, and what the full model says. Knows no disk.

Never asks transformers for ``output_hidden_states``: ``walk`` stops at the exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynamax.backbones.base import Backbone
from dynamax.data.store import StoredDocument
from dynamax.data.text import Document, origin_hash
from dynamax.errors import UserError
from dynamax.types import Site

StoreDtype = Literal["float16", "bfloat16", "float32"]
POSITIONS = 4096
"""Positions that go through the backbone at a time, padding counted."""
LOGITS = 1 << 25
"""Logits that are held at a time."""
BLOCK = 128
"""Logits of which only the greatest is looked at first."""
CACHED = 1 << 21
"""Bytes of logits that are handled at a time on a CPU, so that they stay in its cache."""


class Labels(NamedTuple):
    """The most likely tokens at N positions, surest first, their probabilities, and the logsumexp of all logits."""

    tokens_NK: Tensor
    probs_NK: Tensor
    logsumexp_N: Tensor


@final
class StateReader:
    """Turns documents into documents with states and labels.

    Args:
        backbone: The model.
        exits: Depths to keep, each at least 1; the model's own keeps the states at the top.
        k: Labels a position.
        dtype: What states are kept in.
        readout: A place with the backbone's final norm and output matrix in float32; wanted if the
            backbone computes in a half precision, where logits tie.

    Raises:
        UserError: If an exit or ``k`` is out of range, or a half-precision backbone has no readout.
    """

    def __init__(
        self, backbone: Backbone, exits: Sequence[int], *, k: int, dtype: StoreDtype, readout: Site | None = None
    ) -> None:
        self.exits = check_exits(exits, depth=backbone.spec.depth)
        if not 1 <= k <= backbone.spec.vocab:
            raise UserError(f"k={k} labels were asked for; wanted 1 to {backbone.spec.vocab}, the vocabulary's size.")
        parameter = next(backbone.parameters())
        if readout is None and parameter.dtype.itemsize < 4:
            raise UserError(
                f"The backbone computes in {parameter.dtype}, where logits tie and labels would be wrong. Give a "
                f"readout in float32 (Source.output_stage().site(depth)), or load the backbone in float32."
            )
        self.backbone, self.k, self.dtype = backbone, k, dtype
        self.device = parameter.device
        self.readout = readout

    @torch.inference_mode()
    def read(self, documents: Sequence[Document]) -> list[StoredDocument]:
        """States and labels of some documents, in their order.

        Raises:
            UserError: If a document is empty, longer than the context, or names a prompt longer than itself; or if
                states are not finite, or too large for the dtype they are kept in.
        """
        context = self.backbone.spec.context
        for document in documents:
            length = len(document.tokens)
            if not 1 <= length <= context or not 0 <= document.prompt <= length:
                raise UserError(
                    f"The text source gave a document of {length} tokens with a prompt of {document.prompt}; wanted "
                    f"are 1 to {context} tokens (the backbone's context), and a prompt no longer than the document. "
                    f"Lower the source's length, or correct the source."
                )
        found: dict[int, StoredDocument] = {}
        for batch in batches([len(document.tokens) for document in documents]):
            found.update(zip(batch, self._read([documents[index] for index in batch]), strict=True))
        return [found[index] for index in range(len(documents))]

    def _read(self, documents: Sequence[Document]) -> Iterator[StoredDocument]:
        lengths = [len(document.tokens) for document in documents]
        rows = [torch.tensor(document.tokens, dtype=torch.int32) for document in documents]
        hidden: dict[int, tuple[Tensor, ...]] = {}
        columns: list[tuple[Tensor, ...]] = []
        for depth, h_ND in self._states(documents, rows):
            if depth in self.exits:
                hidden[depth] = self._kept(h_ND, depth).cpu().split(lengths)
            if depth == self.backbone.spec.depth:
                asked = [torch.arange(len(each.tokens)) >= each.prompt - 1 for each in documents]
                columns = [column.split(lengths) for column in self._labels(h_ND, torch.cat(asked))]
        for index, document in enumerate(documents):
            # A document that names no origin goes by the tokens it was given, or by all if none were.
            origin = document.origin or str(document.tokens[: document.prompt or None])
            yield StoredDocument(
                rows[index],
                document.prompt,
                origin_hash(origin),
                {depth: states[index] for depth, states in hidden.items()},
                *(column[index] for column in columns),
            )

    def _states(self, documents: Sequence[Document], rows: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """States of the N positions, document behind document, at each exit and at the top: given, or of a pass."""
        depths = sorted({*self.exits, self.backbone.spec.depth})
        given = [document.hidden for document in documents if document.hidden is not None]
        if len(given) == len(documents):
            yield from ((depth, torch.cat([hidden[depth] for hidden in given])) for depth in depths)
            return
        lengths_B1 = torch.tensor([len(row) for row in rows], device=self.device)[:, None]
        tokens_BT = pad_sequence(list(rows), batch_first=True).long().to(self.device)
        live_BT = torch.arange(tokens_BT.shape[1], device=self.device) < lengths_B1
        for depth, h_BTD in self.backbone.walk(self.backbone.embed(tokens_BT), depths):
            yield depth, h_BTD[live_BT]

    def _kept(self, h_ND: Tensor, depth: int) -> Tensor:
        """States in the dtype they are kept in; see ``read`` for what is refused."""
        h_ND = h_ND[:, : self.backbone.spec.width]
        kept_ND = h_ND.to(getattr(torch, self.dtype))
        if not h_ND.isfinite().all():
            raise UserError(
                f"The backbone's states after {depth} blocks are not finite. Load it in float32 or bfloat16."
            )
        if not kept_ND.isfinite().all():
            raise UserError(
                f"A state after {depth} blocks reaches {h_ND.abs().max().item():.3g}, and {self.dtype} ends at "
                f"{torch.finfo(kept_ND.dtype).max:.3g}. Keep states in bfloat16 or float32 (option dtype)."
            )
        return kept_ND

    def _labels(self, h_ND: Tensor, asked_N: Tensor) -> Labels:
        """Labels of the positions that are asked for; zeros at the others."""
        found = self._labels_of(h_ND[asked_N.to(h_ND.device)])
        whole = Labels(*(column.new_zeros(len(asked_N), *column.shape[1:]) for column in found))
        for column, values in zip(whole, found, strict=True):
            column[asked_N] = values
        return whole

    def _labels_of(self, h_ND: Tensor) -> Labels:
        site = self.readout or self.backbone.site(self.backbone.spec.depth)
        parts = []
        for part_ND in h_ND.split(max(1, LOGITS // self.backbone.spec.vocab)):
            if self.readout is not None:
                part_ND = part_ND.float()
            part = labels(site.project(site.normalize(part_ND[None]))[0], self.k)
            parts.append(tuple(column.cpu() for column in part))
        return Labels(*(torch.cat(column) for column in zip(*parts, strict=True)))


def check_exits(exits: Sequence[int], *, depth: int) -> tuple[int, ...]:
    """Depths to keep states at, ascending; the model's own is the top.

    Raises:
        UserError: If there are none, one is repeated, or one is outside the model.
    """
    wanted = f"Wanted are different depths from 1 to {depth}, for this backbone has {depth} blocks."
    if not exits:
        raise UserError(f"No exits were given. {wanted}")
    if len(set(exits)) < len(exits):
        raise UserError(f"The exits {list(exits)} repeat a depth. {wanted}")
    outside = [exit for exit in exits if not 1 <= exit <= depth]
    if outside:
        raise UserError(f"The exits {outside} of {list(exits)} are outside the model. {wanted}")
    return tuple(sorted(exits))


def batches(lengths: Sequence[int], *, positions: int = POSITIONS) -> Iterator[list[int]]:
    """Group documents of similar length, so that each group padded holds at most ``positions`` positions.

    >>> list(batches([3, 9, 2, 8], positions=18))
    [[2, 0], [3, 1]]
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and lengths[index] * (len(batch) + 1) > positions:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def labels(logits_NV: Tensor, k: int) -> Labels:
    """The ``k`` most likely tokens of every position, with true probabilities.

    Args:
        logits_NV: Float32 (or wider) logits over the whole vocabulary.
        k: How many; at most V.
    """
    wide = logits_NV.shape[1] * logits_NV.element_size()
    rows = max(1, CACHED // wide) if logits_NV.device.type == "cpu" else len(logits_NV)
    parts = []
    for part_NV in logits_NV.split(rows):
        top_NK, tokens_NK = fast_topk(part_NV, k)
        logsumexp_N = top_NK[:, 0] + (part_NV - top_NK[:, :1]).exp_().sum(-1).log()
        probs_NK = (top_NK - logsumexp_N[:, None]).exp()
        parts.append((tokens_NK.int(), probs_NK.float(), logsumexp_N.float()))
    return Labels(*(torch.cat(column) for column in zip(*parts, strict=True)))


def fast_topk(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What ``torch.topk`` gives, in a third of its time on a CPU.

    The k greatest logits lie in the k blocks with the greatest maxima, so only those are sorted.

    Returns:
        Values and indices, both [N, k], greatest first.
    """
    width = logits_NV.shape[1]
    if width < 4 * k * BLOCK:
        return logits_NV.topk(k, -1)
    whole = width // BLOCK * BLOCK
    blocks_NMW = logits_NV[:, :whole].unflatten(1, (-1, BLOCK))
    chosen_NK = blocks_NMW.amax(-1).topk(k, -1, sorted=False).indices
    rows_N1 = torch.arange(len(logits_NV), device=logits_NV.device)[:, None]
    inside_NC = blocks_NMW[rows_N1, chosen_NK].flatten(1)
    values_NK, at_NK = torch.cat([inside_NC, logits_NV[:, whole:]], 1).topk(k, -1)
    behind_NK = whole + at_NK - k * BLOCK
    block_NK = chosen_NK.gather(1, (at_NK // BLOCK).clamp_max(k - 1))
    return values_NK, torch.where(at_NK < k * BLOCK, block_NK * BLOCK + at_NK % BLOCK, behind_NK)
