"""What a training step gets: stored documents, padded to one length. Knows tensors, no trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynamax.data.store import StoredDocument


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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> HiddenBatch:
        """The batch on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def rows(self, chosen_B: Tensor) -> HiddenBatch:
        """Some of the documents, by index, with no more padding than the longest of them needs."""
        longest = int(self.live_BT[chosen_B].sum(1).max())
        return self._mapped(lambda tensor: tensor[chosen_B] if tensor.ndim == 1 else tensor[chosen_B, :longest])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> HiddenBatch:
        def changed(value: Any) -> Any:  # noqa: ANN401 - a tensor, or a dictionary of them
            if isinstance(value, dict):
                return {depth: change(tensor) for depth, tensor in value.items()}
            return change(value)

        return HiddenBatch(**{field.name: changed(getattr(self, field.name)) for field in fields(self)})


def collate(documents: Sequence[StoredDocument], numbers: Sequence[int]) -> HiddenBatch:
    """Pad documents to one length.

    Args:
        documents: At least one.
        numbers: Their numbers in the store.
    """

    def padded(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return pad_sequence(list(tensors), batch_first=True).to(dtype)

    lengths_B1 = torch.tensor([len(document.tokens_T) for document in documents])[:, None]
    prompts_B1 = torch.tensor([document.prompt for document in documents])[:, None]
    positions_T = torch.arange(int(lengths_B1.max()))
    return HiddenBatch(
        tokens_BT=padded([document.tokens_T for document in documents], torch.int64),
        hidden={
            depth: padded([document.hidden[depth] for document in documents], torch.float32)
            for depth in documents[0].hidden
        },
        top_tokens_BTK=padded([document.top_tokens_TK for document in documents], torch.int64),
        top_probs_BTK=padded([document.top_probs_TK for document in documents], torch.float32),
        live_BT=positions_T < lengths_B1,
        answer_BT=(positions_T >= prompts_B1 - 1) & (positions_T < lengths_B1 - 1),
        documents_B=torch.tensor(numbers),
        origins_B=torch.tensor([document.origin for document in documents]),
    )


def as_it_is(batch: Any) -> Any:  # noqa: ANN401 - whatever a sampler or a data set hands out
    """A loader's ``collate_fn`` where each item is a batch already."""
    return batch
