"""What a training step gets: documents of similar length, padded to one length. Knows tensors, no trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from dynamax.data.store import StoredDocument
from dynamax.data.text import derived_seed
from dynamax.past import KnownText

POOL = 32
"""Batches' worth of documents that are sorted by length together; fewer shuffle better, more pad less."""


@dataclass(frozen=True)
class HiddenBatch:
    """Documents of similar length, padded at the right. Entry ``t`` is the state *after* token ``t``.

    Attributes:
        tokens_BT: Token ids, int64; 0 on padding.
        hidden: Residual stream ``h_BTD`` by depth, float32; 0 on padding.
        top_tokens_BTK: The full model's most likely tokens at ``t + 1``, surest first, int64.
        top_probs_BTK: Their probabilities, float32; they sum to less than one.
        live_BT: False on padding.
        answer_BT: Positions whose next token stands in the document and was not given with the prompt.
        documents_B: Number of each document in the store.
        origins_B: Hash of what each document goes back to, int64; splits go by it.
    """

    tokens_BT: Tensor
    hidden: dict[int, Tensor]
    top_tokens_BTK: Tensor
    top_probs_BTK: Tensor
    live_BT: Tensor
    answer_BT: Tensor
    documents_B: Tensor
    origins_B: Tensor

    def __len__(self) -> int:
        return len(self.tokens_BT)

    @property
    def text(self) -> KnownText:
        """What gates may read beside the hidden states; the prompt's last position is step 0."""
        step_BT = (self.answer_BT.long().cumsum(1) - 1).clamp_min(0)
        return KnownText(self.tokens_BT, step_BT, self.top_tokens_BTK[..., 0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> HiddenBatch:
        """The batch on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def rows(self, chosen_B: Tensor) -> HiddenBatch:
        """Some of the documents, by index, with no more padding than the longest of them needs."""
        longest = int(self.live_BT[chosen_B].sum(1).max())
        return self._mapped(lambda tensor: tensor[chosen_B] if tensor.ndim == 1 else tensor[chosen_B, :longest])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> HiddenBatch:
        changed = {each.name: change(getattr(self, each.name)) for each in fields(self) if each.name != "hidden"}
        return HiddenBatch(hidden={depth: change(h_BTD) for depth, h_BTD in self.hidden.items()}, **changed)


def collate(documents: Sequence[StoredDocument], numbers: Sequence[int]) -> HiddenBatch:
    """Pad documents to one length.

    Args:
        documents: At least one.
        numbers: Their numbers in the store.
    """
    padded = partial(pad_sequence, batch_first=True)
    lengths_B1 = torch.tensor([len(document.tokens_T) for document in documents])[:, None]
    prompts_B1 = torch.tensor([document.prompt for document in documents])[:, None]
    positions_T = torch.arange(int(lengths_B1.max()))
    return HiddenBatch(
        tokens_BT=padded([document.tokens_T for document in documents]).long(),
        hidden={
            depth: padded([document.hidden[depth] for document in documents]).float() for depth in documents[0].hidden
        },
        top_tokens_BTK=padded([document.top_tokens_TK for document in documents]).long(),
        top_probs_BTK=padded([document.top_probs_TK for document in documents]).float(),
        live_BT=positions_T < lengths_B1,
        answer_BT=(positions_T >= prompts_B1 - 1) & (positions_T < lengths_B1 - 1),
        documents_B=torch.tensor(numbers),
        origins_B=torch.tensor([document.origin for document in documents]),
    )


@final
class LengthBuckets(Sampler[list[int]]):
    """Yields batches of positions in ``lengths``, each position once an epoch.

    Args:
        lengths: Tokens of each document.
        batch_size: Documents a batch; the last may be smaller.
        seed: Of the order; None for one fixed order, by length.

    Attributes:
        epoch: Decides the order.
        skipped: Batches at the beginning of the epoch that are passed over.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int | None) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = self.skipped = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Lightning calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            batches = self.lengths.argsort(stable=True).split(self.batch_size)
            turns = list(range(len(batches)))
        else:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
            order = torch.randperm(len(self.lengths), generator=generator)
            pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in order.split(POOL * self.batch_size)]
            batches = [batch for pool in pools for batch in pool.split(self.batch_size)]
            turns = torch.randperm(len(batches), generator=generator).tolist()
        for index in turns[self.skipped :]:
            yield batches[index].tolist()


class AnswerBatch(NamedTuple):
    """Documents side by side, padded at their ends.

    Attributes:
        tokens_BT: Token ids; behind a document's end anything.
        counted_BT: Where the next token of the row is one of the answer: the positions that losses and scores count.
    """

    tokens_BT: Tensor
    counted_BT: Tensor

    @property
    def next_N(self) -> Tensor:  # noqa: N802 - a shape
        """The text's next token at each counted position, row after row."""
        return self.tokens_BT.roll(-1, 1)[self.counted_BT]
