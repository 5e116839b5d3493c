"""Corpora as streams of tokens on disk, with the tokenizer trained on them or given. Knows texts and files, no batches.

A folder of streams is named after all its contents depend on, and is there complete or not at all. In it lie the
tokenizer's files, for each corpus ``train-0.npy`` and ``validation-0.npy`` (token ids, one behind the other,
each text closed by the end of text), and ``streams.json``, which says what went in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dynamax.backbones.loading import read_tokenizer
from dynamax.data.store import fingerprint
from dynamax.data.text import Corpus, held_out, origin_hash
from dynamax.errors import UserError, shown
from dynamax.files import read_mapping, whole_folder

FORMAT = 1
END = "<|endoftext|>"
BYTES = 256
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}\n"
    "{% else %}Question: {{ message['content'] }}\nAnswer:{% endif %}{% endfor %}"
)
"""A chat as the corpus ``Answers`` writes it."""
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
        inputs: What the streams were made from; see ``LanguageData``.
        tokenizer: The tokenizer they were encoded with.

    Raises:
        UserError: If a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.inputs = read_mapping(folder / NAME)
            count = len(self.inputs["corpora"])
            self._streams = {
                part: [np.load(folder / f"{part}-{i}.npy", mmap_mode="r") for i in range(count)] for part in PARTS
            }
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(
                f"The streams in {folder} are damaged: {shown(repr(error))}. Remove the folder; the next run makes it "
                f"again."
            ) from error
        self.tokenizer = read_tokenizer(folder)

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


def make_streams(
    target: Path, corpora: Sequence[Corpus], inputs: dict[str, Any], given: PreTrainedTokenizerBase | None = None
) -> None:
    """Read all texts, train the tokenizer on those for training, unless one is given, and write the folder.

    Args:
        target: The folder.
        corpora: Where texts come from.
        inputs: All that the streams depend on, as JSON values.
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
    with whole_folder(target) as fresh:
        for index, parts in enumerate(parted):
            for part in PARTS:
                np.save(fresh / f"{part}-{index}.npy", encode(parts[part], tokenizer))
        tokenizer.save_pretrained(fresh)
        (fresh / NAME).write_text(json.dumps(inputs), "utf-8")


def part_texts(corpus: Corpus, validation: float) -> dict[SplitName, list[str]]:
    """The texts of a corpus, parted by their origins' hashes.

    Raises:
        UserError: If either part is empty.
    """
    texts = list(corpus.texts())
    held = held_out(torch.tensor([origin_hash(origin) for _, origin in texts]), validation).tolist()
    parts: dict[SplitName, list[str]] = {"train": [], "validation": []}
    for (text, _), kept in zip(texts, held, strict=True):
        parts["validation" if kept else "train"].append(text)
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


def train_tokenizer(texts: Iterable[str], *, vocab: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE as GPT-2's; every text can be encoded and comes back unchanged.

    Args:
        texts: What merges are counted on.
        vocab: Tokens, bytes and the end of text among them.

    Raises:
        UserError: If the vocabulary is too small for the bytes, or the texts do not fill it.
    """
    if vocab <= BYTES:
        raise UserError(f"A vocabulary of {vocab} was asked for; {BYTES} bytes and the end of text need more.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab:
        raise UserError(
            f"A vocabulary of {vocab} was asked for, but the text has pairs for {tokenizer.get_vocab_size()} tokens "
            f"only. Give more text, or lower vocab."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
