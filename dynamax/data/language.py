"""The DataModule of ``train``: blocks of tokens out of several corpora. Knows streams, no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dynamax.backbones.sources import Source
from dynamax.data.fill import tokenizer_hash
from dynamax.data.store import fingerprint
from dynamax.data.streams import FORMAT, Streams, make_streams
from dynamax.data.text import Corpus, derived_seed
from dynamax.errors import UserError, at_least

VOCAB = 4096


@dataclass
class Portion:
    """A corpus, and how many rows of each batch it fills."""

    corpus: Corpus
    rows: int = 1


@final
class LanguageData(LightningDataModule):
    """Blocks of tokens to train a language model on, with a tokenizer trained on the same text or another model's.

    Texts are read and encoded once; a later run with the same corpora finds them on disk. Every batch has the
    same mixture of corpora. Which blocks it holds depends on the seed and on its number alone, so models that
    are trained with one seed see one text, and a resumed run continues where it stopped.

    Args:
        portions: The corpora, and the rows of a batch each fills; a batch has as many rows as all together.
        folder: Where encoded text lies.
        vocab: Tokens of the vocabulary to train; 4096 if neither it nor a tokenizer is given.
        tokenizer: Model whose tokenizer is taken, instead of training one.
        length: Tokens of a block.
        validation: Part of the texts, in (0, 1), that is kept for validation; texts of one origin stay together.
        validation_blocks: Blocks to validate on, in the mixture of a batch, spread evenly over what was kept.
        seed: Of the order of blocks.

    Attributes:
        streams: The encoded corpora, and their tokenizer; there once ``setup`` has run.
        rows: Rows of a batch, by corpus.
        order: All that batches depend on beside the streams, as JSON values.
    """

    streams: Streams

    def __init__(
        self,
        portions: list[Portion],
        *,
        folder: str = "runs/language",
        vocab: int | None = None,
        tokenizer: Source | None = None,
        length: int = 256,
        validation: float = 0.05,
        validation_blocks: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not portions:
            raise UserError("LanguageData was given no portions. Give at least one corpus.")
        if not 0 < validation < 1:
            raise UserError(f"validation={validation} was given; wanted a part of the texts, between 0 and 1.")
        if vocab is not None and tokenizer is not None:
            raise UserError(f"vocab={vocab} was given beside a tokenizer, which has its own. Leave one of them out.")
        self.rows = [portion.rows for portion in portions]
        at_least(self, 1, rows=min(self.rows), validation_blocks=validation_blocks)
        at_least(self, 2, length=length)
        self.portions, self.folder, self.length = portions, folder, length
        self.vocab, self.tokenizer = VOCAB if vocab is None and tokenizer is None else vocab, tokenizer
        self.validation, self.validation_blocks, self.seed = validation, validation_blocks, seed
        self.order: dict[str, Any] = {"rows": self.rows, "length": length, "seed": seed}

    def prepare_data(self) -> None:
        """Read and encode the corpora, unless that has been done."""
        if not self._target.is_dir():
            make_streams(self._target, [each.corpus for each in self.portions], self._inputs, self._given)

    def setup(self, stage: str) -> None:
        """Open the streams.

        Raises:
            UserError: If a corpus is shorter than a block.
        """
        self.streams = Streams(self._target)
        for part in ("train", "validation"):
            for portion, tokens in zip(self.portions, self.streams.lengths(part), strict=True):
                if tokens < 2 * self.length:
                    raise UserError(
                        f"{type(portion.corpus).__name__} has {tokens} tokens for {part}, too few for blocks of "
                        f"{self.length}. Give more text, lower length, or change validation."
                    )

    def train_dataloader(self) -> Batches:
        """Batches ``tokens_BT`` in one endless order."""
        return Batches(self.streams, self.rows, length=self.length, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """The same blocks each time: ``validation_blocks``, at least one a corpus, in the mixture of a batch."""
        chosen = []
        for corpus, tokens in enumerate(self.streams.lengths("validation")):
            blocks = tokens // self.length
            wanted = min(blocks, max(1, round(self.validation_blocks * self.rows[corpus] / sum(self.rows))))
            for block in torch.linspace(0, blocks - 1, wanted).long().tolist():
                chosen.append(self.streams.window("validation", corpus, block * self.length, self.length))
        batches = torch.stack(chosen).split(sum(self.rows))
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        """All that streams depend on, as JSON values."""
        identities = [portion.corpus.identity() for portion in self.portions]
        given = {"vocab": self.vocab} if self._given is None else {"tokenizer": tokenizer_hash(self._given)}
        return {"format": FORMAT, "corpora": identities, **given, "validation": self.validation}

    @property
    def _target(self) -> Path:
        return Path(self.folder) / f"streams-{fingerprint(self._inputs)}"

    @cached_property
    def _given(self) -> PreTrainedTokenizerBase | None:
        return None if self.tokenizer is None else self.tokenizer.tokenizer()


class NumberedBatches(ABC):
    """Endless training batches, each a function of its number; one iteration is about one pass over the text.

    Attributes:
        drawn: Batches handed out so far: all the state there is.
    """

    drawn = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches of one pass."""

    @abstractmethod
    def batch(self, number: int) -> Any:  # noqa: ANN401 - what a training step takes
        """Batch ``number``, counted from 0 over all passes."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self) - self.drawn % len(self)):
            self.drawn += 1
            yield self.batch(self.drawn - 1)

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that were handed out."""
        self.drawn = state["drawn"]


@final
class Batches(NumberedBatches):
    """Blocks of several corpora, in one endless order.

    Each corpus is cut into blocks, and each pass over the corpus cuts at other places and takes the blocks
    in another order. All of it follows from the seed and the number of the batch.

    Args:
        streams: The tokens.
        rows: Rows of a batch, by corpus.
        length: T.
        seed: Of the order.
    """

    def __init__(self, streams: Streams, rows: Sequence[int], *, length: int, seed: int) -> None:
        self.streams, self.rows, self.length, self.seed = streams, tuple(rows), length, seed
        self.blocks = [tokens // length - 1 for tokens in streams.lengths("train")]
        self._passes: dict[int, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        return max(1, sum(self.blocks) // sum(self.rows))

    def batch(self, number: int) -> Tensor:
        """Batch ``number``, ``tokens_BT``; rows of one corpus stand together."""
        return torch.stack(
            [self._block(corpus, number * rows + row) for corpus, rows in enumerate(self.rows) for row in range(rows)]
        )

    def _block(self, corpus: int, turn: int) -> Tensor:
        number, place = divmod(turn, self.blocks[corpus])
        seed = derived_seed(derived_seed(self.seed, corpus), number)
        if self._passes.get(corpus, (None,))[0] != number:  # the order of the newest pass of each corpus is kept
            generator = torch.Generator().manual_seed(seed)
            self._passes[corpus] = number, torch.randperm(self.blocks[corpus], generator=generator)
        start = int(self._passes[corpus][1][place]) * self.length + seed % self.length
        return self.streams.window("train", corpus, start, self.length)
