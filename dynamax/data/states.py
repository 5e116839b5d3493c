"""Runs documents through a backbone and keeps what the exits would see. Knows no disk.

Never asks transformers for ``output_hidden_states``: ``walk`` stops at the exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, final

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.data.labels import Labels, labels
from dynamax.data.store import StoredDocument
from dynamax.data.text import Document
from dynamax.data.writer import origin_hash
from dynamax.errors import UserError
from dynamax.types import Site

StoreDtype = Literal["float16", "bfloat16", "float32"]
DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
POSITIONS = 4096
"""Positions that go through the backbone at a time, padding counted."""
LOGITS = 1 << 25
"""Logits that are held at a time."""


@final
class StateReader:
    """Turns documents into documents with states and labels.

    Args:
        backbone: The model.
        exits: Depths to keep, ascending, each at least 1 and below the model's own.
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
        """States and labels of some documents, in their order."""
        check_documents(documents, context=self.backbone.spec.context)
        found: dict[int, StoredDocument] = {}
        for batch in batches([len(document.tokens) for document in documents]):
            found.update(zip(batch, self._read([documents[index] for index in batch]), strict=True))
        return [found[index] for index in range(len(documents))]

    def _read(self, documents: Sequence[Document]) -> Iterator[StoredDocument]:
        lengths = [len(document.tokens) for document in documents]
        rows = [
            document.tokens + [0] * (max(lengths) - length) for document, length in zip(documents, lengths, strict=True)
        ]
        tokens_BT = torch.tensor(rows, device=self.device)
        live_BT = torch.arange(max(lengths), device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
        h_BTD = embedded_BTD = self.backbone.embed(tokens_BT)
        hidden: dict[int, tuple[Tensor, ...]] = {}
        for depth, h_BTD in self.backbone.walk(embedded_BTD, [*self.exits, self.backbone.spec.depth]):
            if depth in self.exits:
                hidden[depth] = self._kept(h_BTD[live_BT][:, : self.backbone.spec.width], depth).split(lengths)
        columns = [column.split(lengths) for column in self._labels(h_BTD[live_BT])]
        for index, document in enumerate(documents):
            yield StoredDocument(
                torch.tensor(document.tokens, dtype=torch.int32),
                document.prompt,
                origin_hash(origin_of(document)),
                {depth: states[index] for depth, states in hidden.items()},
                *(column[index] for column in columns),
            )

    def _kept(self, h_ND: Tensor, depth: int) -> Tensor:
        kept_ND = h_ND.to(DTYPES[self.dtype])
        if not kept_ND.isfinite().all():
            if not h_ND.isfinite().all():
                raise UserError(
                    f"The backbone's states after {depth} blocks are not finite. Load it in float32 or bfloat16."
                )
            raise UserError(
                f"A state after {depth} blocks reaches {h_ND.abs().max().item():.3g}, and {self.dtype} ends at "
                f"{torch.finfo(kept_ND.dtype).max:.3g}. Keep the states in bfloat16 or float32 (option dtype)."
            )
        return kept_ND.cpu()

    def _labels(self, h_ND: Tensor) -> Labels:
        site = self.readout or self.backbone.site(self.backbone.spec.depth)
        parts = []
        for part_ND in h_ND.split(max(1, LOGITS // self.backbone.spec.vocab)):
            if self.readout is not None:
                part_ND = part_ND.float()
            part = labels(site.project(site.normalize(part_ND[None]))[0], self.k)
            parts.append(tuple(column.cpu() for column in part))
        return Labels(*(torch.cat(column) for column in zip(*parts, strict=True)))


def origin_of(document: Document) -> str:
    """A document's origin; where it names none, the tokens it was given, or all if none were."""
    return document.origin or str(document.tokens[: document.prompt or None])


def check_exits(exits: Sequence[int], *, depth: int) -> tuple[int, ...]:
    """Exits in ascending order.

    Raises:
        UserError: If there are none, one is repeated, or one is outside the model.
    """
    wanted = f"Wanted are different depths from 1 to {depth - 1}, for this backbone has {depth} blocks."
    if not exits:
        raise UserError(f"No exits were given. {wanted}")
    if len(set(exits)) < len(exits):
        raise UserError(f"The exits {list(exits)} repeat a depth. {wanted}")
    outside = [exit for exit in exits if not 1 <= exit < depth]
    if outside:
        raise UserError(f"The exits {outside} of {list(exits)} are outside the model. {wanted}")
    return tuple(sorted(exits))


def check_documents(documents: Sequence[Document], *, context: int) -> None:
    """Refuse documents that a backbone cannot read.

    Raises:
        UserError: If one is empty, longer than the context, or names a prompt longer than itself.
    """
    for document in documents:
        length = len(document.tokens)
        if not 1 <= length <= context or not 0 <= document.prompt <= length:
            raise UserError(
                f"The text source gave a document of {length} tokens with a prompt of {document.prompt}; wanted are "
                f"1 to {context} tokens (the backbone's context), and a prompt no longer than the document. "
                f"Lower the source's length, or mend the source."
            )


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
