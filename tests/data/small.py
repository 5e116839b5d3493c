"""A small backbone with a tokenizer of characters, and sources of random text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dynamax.backbones.hf import HFBackbone
from dynamax.data.text import Document, TextSource
from tests.tiny import tiny

SIGNS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP ?.,:'\n"
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}a:"
VOCAB = 61


def small_backbone(dtype: torch.dtype = torch.float32, **options: Any) -> HFBackbone:
    return HFBackbone(tiny("llama", dtype=dtype, vocab=VOCAB, **options))


def characters(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    """One token a character; unknown ones become ``<unk>``, ``<end>`` ends a text."""
    vocabulary = {sign: index for index, sign in enumerate(("<unk>", "<end>", *SIGNS))}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


class RandomText(TextSource):
    """Groups of random documents; every third document shares its origin with another."""

    def __init__(self, groups: int = 6, size: int = 5, longest: int = 20, seed: int = 0) -> None:
        self.size, self.longest, self.seed, self._count = size, longest, seed, groups
        self.asked: list[int] = []

    def identity(self) -> dict[str, Any]:
        return {"source": "RandomText", "size": self.size, "longest": self.longest, "seed": self.seed}

    def count(self) -> int | None:
        return self._count

    def groups(self, engine, *, skip: int = 0) -> Iterator[list[Document]]:
        for index in range(skip, self._count):
            self.asked.append(index)
            draw = random.Random(1000 * self.seed + index)
            lengths = [draw.randint(1, self.longest) for _ in range(self.size)]
            yield [
                Document(
                    [draw.randrange(VOCAB) for _ in range(length)],
                    draw.randint(0, length),
                    "shared" if number % 3 == 0 else f"{index}/{number}",
                )
                for number, length in enumerate(lengths)
            ]

    def documents(self) -> list[Document]:
        return [document for group in self.groups(None) for document in group]
