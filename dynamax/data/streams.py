"""Corpora as streams of tokens on disk, with the tokenizer trained on them or given. Knows texts and files, no batches.

A folder of streams is named after all its contents depend on, and appears whole or not at all. In it lie the
tokenizer's files, for each corpus ``train-0.npy`` and ``validation-0.npy`` (token ids, one behind the other,
each text closed by the end of text), and ``streams.json``, which says what went in.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynamax.backbones.downloads import appear
from dynamax.data.manifest import fingerprint
from dynamax.data.text import Corpus
from dynamax.data.vocabulary import train_tokenizer
from dynamax.data.writer import origin_hash
from dynamax.errors import UserError

FORMAT = 1
NAME = "streams.json"
BATCH = 1024
SMALL = 1 << 16
"""Token ids below it take two bytes, others four."""
SplitName = Literal["train", "validation"]
PARTS: tuple[SplitName, SplitName] = ("train", "validation")


@final
class Streams:
    """Token streams of several corpora, for reading. They are mapped into memory.

    Args:
        folder: As ``make_streams`` left it.

    Attributes:
        inputs: What the streams were made from; see ``stream_inputs``.
        tokenizer: The tokenizer they were encoded with.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs: dict[str, Any] = json.loads((folder / NAME).read_text("utf-8"))
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        count = len(self.inputs["corpora"])
        self._streams = {part: [np.load(file(folder, part, i), mmap_mode="r") for i in range(count)] for part in PARTS}

    @property
    def fingerprint(self) -> str:
        """Hash of the inputs."""
        return fingerprint(self.inputs)

    def lengths(self, part: SplitName) -> list[int]:
        """Tokens of each corpus."""
        return [len(stream) for stream in self._streams[part]]

    def window(self, part: SplitName, corpus: int, start: int, length: int) -> Tensor:
        """Tokens ``[start, start + length)`` of one corpus, int64."""
        return torch.from_numpy(self._streams[part][corpus][start : start + length].astype(np.int64))


def stream_inputs(
    corpora: Sequence[Corpus], *, vocab: int | None, tokenizer: str | None, validation: float
) -> dict[str, Any]:
    """All that streams depend on, as JSON values.

    Args:
        corpora: Where texts come from.
        vocab: Size of the vocabulary to train; None if a tokenizer is given.
        tokenizer: Hash of the tokenizer that is given; None to train one.
        validation: Part of the origins whose texts are kept for validation.
    """
    identities = [corpus.identity() for corpus in corpora]
    given = {"vocab": vocab} if tokenizer is None else {"tokenizer": tokenizer}
    return {"format": FORMAT, "corpora": identities, **given, "validation": validation}


def stream_folder(folder: str | Path, inputs: dict[str, Any]) -> Path:
    """Where the streams made from these inputs lie."""
    return Path(folder) / f"streams-{fingerprint(inputs)}"


def make_streams(
    target: Path, corpora: Sequence[Corpus], inputs: dict[str, Any], given: PreTrainedTokenizerBase | None = None
) -> None:
    """Read all texts, train the tokenizer on those for training, unless one is given, and write the folder.

    Args:
        target: The folder; see ``stream_folder``.
        corpora: Where texts come from.
        inputs: See ``stream_inputs``.
        given: The tokenizer to take.

    Raises:
        UserError: If a corpus leaves nothing for training or validation, texts do not fill the vocabulary, or the
            tokenizer that is given has no end of text.
    """
    if given is not None and given.eos_token_id is None:
        raise UserError(f"The tokenizer {type(given).__name__} that was given has no end of text. Give another one.")
    parted = [part_texts(corpus, inputs["validation"]) for corpus in corpora]
    training = (text for parts in parted for text in parts["train"])
    tokenizer = train_tokenizer(training, vocab=inputs["vocab"]) if given is None else given
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        for index, parts in enumerate(parted):
            for part in PARTS:
                np.save(file(fresh, part, index), encode(parts[part], tokenizer))
        tokenizer.save_pretrained(fresh)
        (fresh / NAME).write_text(json.dumps(inputs), "utf-8")
        appear(fresh, target)


def file(folder: Path, part: SplitName, corpus: int) -> Path:
    """The file of one stream."""
    return folder / f"{part}-{corpus}.npy"


def part_texts(corpus: Corpus, validation: float) -> dict[SplitName, list[str]]:
    """The texts of a corpus, parted by their origins' hashes.

    Raises:
        UserError: If either part is empty.
    """
    parts: dict[SplitName, list[str]] = {"train": [], "validation": []}
    for text, origin in corpus.texts():
        held = origin_hash(origin) / 2.0**64 + 0.5 < validation
        parts["validation" if held else "train"].append(text)
    for part, texts in parts.items():
        if not texts:
            raise UserError(
                f"validation={validation} leaves no text of {type(corpus).__name__} for {part}: {corpus.identity()}. "
                f"Change validation, or give more text; texts of one origin stay together."
            )
    return parts


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Texts as one stream of token ids, uint16 where the vocabulary allows; each is closed by the end of text."""
    texts = list(texts)
    kind = np.uint16 if len(tokenizer) <= SMALL else np.uint32
    pieces: list[np.ndarray] = []
    for start in range(0, len(texts), BATCH):
        for tokens in tokenizer(texts[start : start + BATCH], verbose=False)["input_ids"]:
            pieces.append(np.array([*tokens, tokenizer.eos_token_id], dtype=kind))
    return np.concatenate(pieces)
