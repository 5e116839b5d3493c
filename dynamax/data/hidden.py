"""The DataModule of ``fit``: fills the store if need be, splits it by prompt, hands out padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, final

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from dynamax.backbones.precision import check_precision
from dynamax.backbones.sources import Source
from dynamax.data.batch import HiddenBatch, LengthBuckets, collate
from dynamax.data.fill import fill_store, find_store, store_folder, store_inputs
from dynamax.data.states import StoreDtype
from dynamax.data.store import Store
from dynamax.data.text import TextSource, held_out
from dynamax.device import chosen
from dynamax.engine import load
from dynamax.errors import UserError, at_least

Compute = Literal["float32", "bfloat16", "float16"]


@dataclass(eq=False)
class _Documents(Dataset[HiddenBatch]):
    """Part of a store, asked for a batch of positions at a time."""

    store: Store
    numbers: Sequence[int]
    limit: int | None

    def __getitem__(self, batch: list[int]) -> HiddenBatch:
        numbers = [self.numbers[position] for position in batch]
        return collate([self.store.read(number, limit=self.limit) for number in numbers], numbers)


@final
class ResumableLoader:
    """A loader whose place in an epoch is saved in the trainer's checkpoints.

    A run that resumes in the middle of an epoch gets the next batches of that epoch; earlier ones are not read again.

    Args:
        loader: Its sampler is a ``LengthBuckets``; Lightning sets the sampler's epoch.
    """

    def __init__(self, loader: DataLoader) -> None:
        assert isinstance(loader.sampler, LengthBuckets), "it can pass batches over"
        self.loader, self.sampler = loader, loader.sampler
        self._epoch = self._given = self._behind = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[HiddenBatch]:
        begun = self._behind if self._epoch == self.sampler.epoch else 0
        self._epoch, self._given, self._behind = self.sampler.epoch, begun, 0
        self.sampler.skipped = begun % len(self)
        for batch in self.loader:
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self._epoch, "given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip those batches, if the run resumes in this epoch."""
        self._epoch, self._behind = state["epoch"], state["given"]


@final
class HiddenStates(LightningDataModule):
    """Hidden states of a frozen backbone at the exits, from a store that is filled once.

    The backbone is loaded only while something is missing from the store, and is released before training.
    Each training step gets whole documents, since recurrent gates read sequences.

    Args:
        backbone: Whose states.
        text: Where the text comes from.
        exits: Depths to keep states at.
        folder: Where stores lie; each has a folder of its own in it.
        k: Labels a position: the full model's most likely tokens.
        dtype: What states are kept in.
        compute: What the backbone computes in while the store is filled; labels are always made in float32.
        precision: How the backbone's weights are held while the store is filled: float32, float16, bfloat16, int8 or
            int4; auto takes the faster of the first two here. Left out, transformers' modules run as they are. On a
            CPU. Another precision fills another store.
        device: Where the backbone runs while the store is filled; ``auto`` takes a GPU if there is one.
        batch_size: Documents a step.
        max_length: Read only so many tokens of each document; all if left out.
        validation: Part of the prompts, in (0, 1), whose documents are kept for validation.
        workers: Processes that read ahead; 0 reads in the training process.
        seed: Of the order of training batches.
    """

    def __init__(
        self,
        backbone: Source,
        text: TextSource,
        exits: list[int],
        *,
        folder: str = "runs/store",
        k: int = 16,
        dtype: StoreDtype = "float16",
        compute: Compute = "float32",
        precision: str | None = None,
        device: str = "auto",
        batch_size: int = 8,
        max_length: int | None = None,
        validation: float = 0.1,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < validation < 1:
            raise UserError(f"validation={validation} was given; wanted a part of the prompts, between 0 and 1.")
        at_least(self, 1, batch_size=batch_size, max_length=max_length)
        at_least(self, 0, workers=workers)
        check_precision(precision)
        self.backbone, self.text, self.exits, self.folder = backbone, text, exits, folder
        self.dtype: StoreDtype = dtype
        self.k, self.compute, self.precision, self.device = k, compute, precision, device
        self.batch_size, self.max_length, self.validation = batch_size, max_length, validation
        self.workers, self.seed = workers, seed
        self._parts: dict[str, _Documents] = {}

    def prepare_data(self) -> None:
        """Fill what is missing of the store, or damaged; see ``fill_store``."""
        if find_store(self.folder, self._inputs) is None:
            self.fill()

    def fill(self) -> Store:
        """Load the backbone, complete the store, and release the backbone."""
        device, readout = chosen(self.device), None
        rank_zero_info(f"Loading {self.backbone} to fill the store in {self.folder}")
        engine = load(self.backbone, dtype=self.compute, precision=self.precision, device=device)
        if self.compute != "float32" or engine.precision is not None:
            top = self.backbone.output_stage(dtype="float32", device=device)
            readout = top.site(top.spec.depth)
        options = {"k": self.k, "dtype": self.dtype, "precision": self.precision, "readout": readout}
        return fill_store(self.folder, engine, self.text, self.exits, **options)

    def setup(self, stage: str) -> None:
        """Open the store and split it.

        Raises:
            UserError: If one side of the split would be empty.
        """
        store = Store(store_folder(self.folder, self._inputs))
        held_N = held_out(store.origins(), self.validation)
        for name, chosen_N in (("training", ~held_N), ("validation", held_N)):
            numbers = chosen_N.nonzero()[:, 0].tolist()
            if not numbers:
                raise UserError(
                    f"validation={self.validation} leaves no documents for {name}: the store has {len(store)} "
                    f"documents of {len(store.origins().unique())} prompts, and a prompt's documents stay together. "
                    f"Change validation, or use more prompts."
                )
            self._parts[name] = _Documents(store, numbers, self.max_length)

    def train_dataloader(self) -> ResumableLoader:
        """Batches of similar length, in another order each epoch."""
        return ResumableLoader(self._loader("training", self.seed))

    def val_dataloader(self) -> DataLoader:
        """Batches by length, in one order."""
        return self._loader("validation", None)

    def _loader(self, part: str, seed: int | None) -> DataLoader:
        documents = self._parts[part]
        lengths = documents.store.lengths()[documents.numbers]
        buckets = LengthBuckets(lengths.tolist(), batch_size=self.batch_size, seed=seed)
        return DataLoader(
            documents,
            batch_size=None,  # each position the sampler gives is a batch already
            sampler=buckets,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        return store_inputs(
            self.backbone.output_stage().spec,
            self.backbone.tokenizer(),
            self.backbone.generation_config(),
            self.text,
            self.exits,
            k=self.k,
            dtype=self.dtype,
            compute=self.compute,
            precision=self.precision,
        )
