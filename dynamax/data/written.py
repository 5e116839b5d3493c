"""The DataModule of ``tune``: answers that a model writes itself, as token ids, written as they are needed.

The text is one long fixed sequence of pieces; a piece is one batch of answers. What lies on disk is the part of it that
was written before. So training may begin with little text, stop and go on at any moment, and reads the same as if all
had been there.
"""

from __future__ import annotations

import fcntl
import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.nn.utils.rnn import pad_sequence

from dynamax.backbones.sources import Source
from dynamax.data.batch import AnswerBatch
from dynamax.data.fill import tokenizer_hash
from dynamax.data.generated import SelfGenerated
from dynamax.data.language import NumberedBatches
from dynamax.data.store import fingerprint
from dynamax.data.streams import SMALL
from dynamax.data.text import Document
from dynamax.device import chosen
from dynamax.engine import Engine, load
from dynamax.errors import UserError, at_least
from dynamax.files import write_atomically
from dynamax.progress import Bar

FORMAT = 1


@final
class Pieces:
    """Answers of one model to several sets of prompts, which take turns; a piece is a batch of answers.

    Args:
        writer: Which model writes.
        texts: What it is asked, and how its answers are sampled, in whole batches.
        folder: Where pieces lie; those of each set in a folder of their own, named after all they depend on.
        dtype: What the writer computes in.
        precision: How its weights are held.
        device: Where it runs.
    """

    def __init__(
        self,
        writer: Source,
        texts: Sequence[SelfGenerated],
        folder: Path,
        *,
        dtype: str,
        precision: str | None,
        device: str,
    ) -> None:
        self.writer, self.texts, self.folder = writer, texts, folder
        self.dtype, self.precision, self.device = dtype, precision, device
        counts = [int(text.count() or 0) for text in texts]
        self.plan = [(text, group) for group in range(max(counts)) for text, n in enumerate(counts) if group < n]

    def __len__(self) -> int:
        return len(self.plan)

    def size(self, number: int) -> int:
        """Documents of a piece, known before it is written."""
        return self.texts[self.plan[number][0]].batch

    @cached_property
    def identities(self) -> list[dict[str, Any]]:
        """All that each set of answers depends on, as JSON values; the writer's weights are read once."""
        model = {"writer": self.writer.output_stage().spec.fingerprint}
        model |= {"tokenizer": tokenizer_hash(self.writer.tokenizer()), "dtype": self.dtype}
        model |= {"precision": self.precision}
        return [{"format": FORMAT, **model, "text": text.identity()} for text in self.texts]

    @cached_property
    def engine(self) -> Engine:
        """The writer, loaded when there is something to write."""
        return load(self.writer, dtype=self.dtype, precision=self.precision, device=self.device)

    def file(self, number: int) -> Path:
        """Where a piece lies, or will."""
        text, group = self.plan[number]
        return self.folder / fingerprint(self.identities[text]) / f"piece-{group:05d}.npz"

    def read(self, number: int) -> list[Document]:
        """The documents of a piece, shortest first; it is written now if it is not there.

        Raises:
            UserError: If the file is damaged.
        """
        file = self.file(number)
        self.write(number)
        try:
            with np.load(file) as held:
                parts = np.split(held["tokens"].astype(np.int64), held["stops"][:-1])
                prompts = held["prompts"].tolist()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{file} is damaged: {error}. Remove it, and it is written anew.") from error
        documents = [Document(part.tolist(), prompt) for part, prompt in zip(parts, prompts, strict=True)]
        return sorted(documents, key=lambda each: len(each.tokens))

    def write(self, number: int) -> int:
        """Write a piece if it is not there; another process that writes one of its set is waited for.

        Returns:
            Tokens of answers that were written, 0 if it was there.
        """
        file, (text, group) = self.file(number), self.plan[number]
        file.parent.mkdir(parents=True, exist_ok=True)
        with (file.parent / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # free as soon as its holder has ended, however that was
            if file.is_file():
                return 0
            documents = next(iter(self.texts[text].groups(self.engine, skip=group)))
            tokens = [document.tokens for document in documents]
            kind = np.uint16 if self.engine.backbone.spec.vocab <= SMALL else np.uint32
            content = io.BytesIO()
            np.savez_compressed(
                content,
                tokens=np.concatenate([np.array(each, dtype=kind) for each in tokens]),
                stops=np.cumsum([len(each) for each in tokens]),
                prompts=np.array([document.prompt for document in documents], dtype=np.int32),
            )
            write_atomically(file, content.getvalue())
            return sum(len(document.tokens) - document.prompt for document in documents)


@final
class WrittenText(LightningDataModule):
    """Answers that a model writes itself, to be tuned on. Token ids on disk, about a byte and a half a token.

    Answers are written a batch at a time, when they are needed, and kept; ``dynamax cache`` writes all of them ahead.
    Several processes read the same batches, and only what is there.
    Prompts are parted by the hash of their origin: those below ``validation`` are never trained on.

    Args:
        writer: Which model writes: the one that is tuned.
        texts: What it is asked, and how its answers are sampled; sets of prompts take turns, a batch of answers each.
            Their ``documents`` are rounded up to whole batches. Training that outlasts them begins anew.
        folder: Where pieces of text lie.
        dtype: What the writer computes in; many answers at a time are written fastest in bfloat16.
        precision: How the writer's weights are held, if its steps are to be recorded; see ``dynamax generate``.
        device: Where it runs; ``auto`` takes a GPU if there is one.
        rows: Documents of a training batch, which several processes share.
        validation: Part of the prompts, in (0, 1), that is kept for validation.
        validation_documents: Answers to validate on, for each set of prompts; written before training starts.

    Attributes:
        train: The text to train on.
        held_out: The text to validate on.
    """

    def __init__(
        self,
        writer: Source,
        texts: list[SelfGenerated],
        *,
        folder: str = "runs/written",
        dtype: str = "float32",
        precision: str | None = None,
        device: str = "auto",
        rows: int = 8,
        validation: float = 0.1,
        validation_documents: int = 64,
    ) -> None:
        super().__init__()
        if not texts:
            raise UserError("WrittenText was given no texts. Give at least one, such as texts: [SelfGenerated].")
        if not 0 < validation < 1:
            raise UserError(f"validation={validation} was given; wanted a part of the prompts, between 0 and 1.")
        at_least(self, 1, rows=rows, validation_documents=validation_documents)
        if parted := [text.part for text in texts if text.part != (0.0, 1.0)]:
            raise UserError(f"A text was given part={parted[0]}; validation decides it here. Leave part out.")
        self.writer, self.folder, self.rows, self.validation = writer, folder, rows, validation
        options = {"dtype": dtype, "precision": precision, "device": chosen(device)}
        held = [text.parted((0.0, validation), documents=validation_documents) for text in texts]
        whole = [text.parted((validation, 1.0), documents=(text.count() or 1) * text.batch) for text in texts]
        self.train = Pieces(writer, whole, Path(folder), **options)
        self.held_out = Pieces(writer, held, Path(folder), **options)

    @cached_property
    def order(self) -> dict[str, Any]:
        """All that batches depend on, as JSON values."""
        return {"train": self.train.identities, "held_out": self.held_out.identities, "rows": self.rows}

    def prepare_data(self) -> None:
        """Write what validation reads, unless it is there, and the first piece to train on."""
        for number in Bar(iterable=range(len(self.held_out)), desc="held-out text"):
            self.held_out.write(number)
        self.train.write(0)

    def write_all(self) -> None:
        """Write all text that is not there yet, in the order in which it is read."""
        self.prepare_data()
        with Bar(desc="text", total=len(self.train)) as bar:
            tokens = 0
            for number in range(len(self.train)):
                tokens += self.train.write(number)
                bar.update()
                bar.say(f"{tokens:,} tokens of answers written")

    def check_processes(self, processes: int) -> None:
        """Raise a UserError for text that several processes cannot share.

        A process that wrote while the others wait would hold a second model, and each batch needs a document for each.
        """
        parts = (self.train, self.held_out)
        if missing := sum(not part.file(number).is_file() for part in parts for number in range(len(part))):
            raise UserError(
                f"{missing} of {sum(map(len, parts))} pieces of text are not in {self.folder}, and {processes} "
                f"processes only read. Write them first, with the same configuration: dynamax cache -c ..."
            )
        loader = self.train_dataloader()
        fewest = min(min(self.rows, self.train.size(piece) - start) for piece, start in loader.places)
        if fewest < processes:
            raise UserError(
                f"A batch of {fewest} documents cannot be shared by {processes} processes. Set data.rows to at least "
                f"{processes}, and the batch of each text to a multiple of it."
            )

    def train_dataloader(self) -> PieceBatches:
        """Batches of documents in one endless order."""
        return PieceBatches(self.train, self.rows)

    def val_dataloader(self) -> HeldOut:
        """The same documents each time, and all of them in every process."""
        batches = []
        for number in range(len(self.held_out)):
            documents = self.held_out.read(number)
            batches += [documents[start : start + self.rows] for start in range(0, len(documents), self.rows)]
        return HeldOut([batch_of(each) for each in batches])


@final
class HeldOut:
    """Batches to validate on. No DataLoader, since Lightning would give each process a part of it.

    Args:
        batches: The batches.
    """

    def __init__(self, batches: Sequence[AnswerBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[AnswerBatch]:
        return iter(self.batches)


@final
class PieceBatches(NumberedBatches):
    """Batches of documents of similar length, piece after piece, in the order in which pieces are written.

    Args:
        pieces: The text.
        rows: Documents of a batch.
    """

    def __init__(self, pieces: Pieces, rows: int) -> None:
        self.pieces, self.rows = pieces, rows
        self.places = [
            (number, start) for number in range(len(pieces)) for start in range(0, pieces.size(number), rows)
        ]
        self._held: tuple[int, list[Document]] = (-1, [])

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, number: int) -> AnswerBatch:
        """Batch ``number``; what is missing of the text is written now."""
        piece, start = self.places[number % len(self.places)]
        if self._held[0] != piece:
            self._held = (piece, self.pieces.read(piece))
        return batch_of(self._held[1][start : start + self.rows])


def batch_of(documents: Sequence[Document]) -> AnswerBatch:
    """Documents side by side, padded by 0; counted is where the next token is one of the answer.

    >>> batch_of([Document([5, 6, 7], prompt=1), Document([8, 9], prompt=1)]).counted_BT.tolist()
    [[True, True, False], [True, False, False]]
    """
    rows = [torch.tensor(document.tokens) for document in documents]
    tokens_BT = pad_sequence(rows, batch_first=True)
    at_T = torch.arange(tokens_BT.shape[1])
    begin_B1 = torch.tensor([[document.prompt - 1] for document in documents])
    end_B1 = torch.tensor([[len(document.tokens) - 1] for document in documents])
    return AnswerBatch(tokens_BT, (at_T >= begin_B1) & (at_T < end_B1))
