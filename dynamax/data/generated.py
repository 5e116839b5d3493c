"""Text that the backbone writes itself, from prompts: needs no data. Knows decoding, no hidden states."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple, final

import torch

from dynamax.data.prompts import Prompt, from_file, shipped
from dynamax.data.text import Document, TextSource, check_positive, derived_seed
from dynamax.decoding.sampling import Sampled
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.paths import InputPath


class Encoded(NamedTuple):
    """A prompt in tokens."""

    tokens: list[int]
    prompt: Prompt


class Answered(NamedTuple):
    """A prompt in tokens and the tokens of its answer.

    Attributes:
        asked: The prompt.
        answer: The answer, the token that ended it included.
        ended: Whether an end token ended it; else it ran out of room.
    """

    asked: Encoded
    answer: list[int]
    ended: bool


@final
class SelfGenerated(TextSource):
    """Answers the backbone itself gives to prompts, sampled in batches; one batch is a group.

    Prompts take turns until there are enough documents. Those of similar length share a batch, and
    batches come in shuffled order.

    Args:
        prompts: File of prompts (csv, json, jsonl, parquet; txt with one a line); the shipped ones if left out.
        field: Column of the file with the prompt; a txt file has the one column ``text``.
        questions: Use only so many of the shipped questions, from the first on; the rest stays unseen.
        passages: Use only so many of the shipped passages, from the first on.
        chat: Ask through the tokenizer's chat template; else in plain text.
        temperature: Of the sampling.
        top_k: Sample among the k most likely tokens only.
        top_p: Sample among the most likely tokens that hold this mass.
        documents: How many documents to write.
        max_new_tokens: Most tokens of an answer.
        batch: Answers written at a time.
        seed: Of sampling and order.
    """

    def __init__(
        self,
        prompts: InputPath | None = None,
        *,
        field: str = "prompt",
        questions: int | None = None,
        passages: int | None = None,
        chat: bool = True,
        temperature: float = 0.7,
        top_k: int | None = None,
        top_p: float = 1.0,
        documents: int = 1000,
        max_new_tokens: int = 96,
        batch: int = 48,
        seed: int = 0,
    ) -> None:
        check_positive(self, documents=documents, max_new_tokens=max_new_tokens, batch=batch)
        if prompts is not None and (questions is not None or passages is not None):
            raise UserError(
                f"prompts={prompts!r} was given together with questions={questions} and passages={passages}, which "
                f"count shipped prompts. Leave out one or the other."
            )
        Sampled(temperature, top_k=top_k, top_p=top_p)  # refuses what it cannot sample with, before a model is loaded
        self.prompts = None if prompts is None else str(prompts)
        self.field, self.questions, self.passages = field, questions, passages
        self.chat = chat
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.documents, self.max_new_tokens, self.batch, self.seed = documents, max_new_tokens, batch, seed

    def identity(self) -> dict[str, Any]:
        """The prompts' contents and all options."""
        content = json.dumps([asdict(prompt) for prompt in self._prompts]).encode()
        names = ("chat", "temperature", "top_k", "top_p", "documents", "max_new_tokens", "batch", "seed")
        options = {name: getattr(self, name) for name in names}
        return {"source": "SelfGenerated", "prompts": hashlib.sha256(content).hexdigest(), **options}

    def count(self) -> int | None:
        """Batches."""
        return -(-self.documents // self.batch)

    def groups(self, engine: Engine, *, skip: int = 0) -> Iterator[list[Document]]:
        """See ``TextSource.groups``."""
        for group in self.answers(engine, skip=skip):
            yield [Document(a.asked.tokens + a.answer, len(a.asked.tokens), a.asked.prompt.origin) for a in group]

    def answers(self, engine: Engine, *, skip: int = 0) -> Iterator[list[Answered]]:
        """The groups again, with each document's prompt; see ``TextSource.groups``."""
        encoded = [self._encode(prompt, engine) for prompt in self._prompts]
        for index, batch in enumerate(self._batches(encoded)[skip:], skip):
            yield self._answer(batch, engine, index)

    @cached_property
    def _prompts(self) -> list[Prompt]:
        if self.prompts is not None:
            return from_file(self.prompts, self.field)
        chosen = shipped(first_questions=self.questions, first_passages=self.passages)
        if not chosen:
            raise UserError("questions=0 and passages=0 leave no prompts. Use some of either, or a file of prompts.")
        return chosen

    def _batches(self, encoded: Sequence[Encoded]) -> list[list[Encoded]]:
        turns = (encoded[turn % len(encoded)] for turn in range(self.documents))
        ordered = sorted(turns, key=lambda prompt: len(prompt.tokens))
        batches = [ordered[start : start + self.batch] for start in range(0, len(ordered), self.batch)]
        random.Random(self.seed).shuffle(batches)
        return batches

    def _encode(self, prompt: Prompt, engine: Engine) -> Encoded:
        roles = ("user", "assistant")
        turns = [{"role": roles[turn % 2], "content": said} for turn, said in enumerate(prompt.turns)]
        tokens = engine.encode(turns if self.chat else prompt.plain, chat=self.chat)[0].tolist()
        context = engine.backbone.spec.context
        if len(tokens) + self.max_new_tokens > context:
            raise UserError(
                f"A prompt of {len(tokens)} tokens and an answer of up to {self.max_new_tokens} do not fit the context "
                f"of {context}: {prompt.plain!r:.80}. Shorten the prompt, or lower max_new_tokens."
            )
        return Encoded(tokens, prompt)

    def _answer(self, batch: Sequence[Encoded], engine: Engine, index: int) -> list[Answered]:
        longest = max(len(prompt.tokens) for prompt in batch)
        pads = [longest - len(prompt.tokens) for prompt in batch]
        rows = [[0] * pad + prompt.tokens for pad, prompt in zip(pads, batch, strict=True)]
        sampler = Sampled(self.temperature, top_k=self.top_k, top_p=self.top_p, seed=derived_seed(self.seed, index))
        options = engine.options(sampler=sampler, max_new_tokens=self.max_new_tokens)
        steps = engine.decoder(sampler=sampler).decode(
            torch.tensor(rows, device=engine.device),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=options.eos_token_id,
            pad_B=torch.tensor(pads, device=engine.device) if any(pads) else None,
        )
        answers = torch.stack([step.token_B for step in steps], 1).tolist()
        ends = options.eos_token_id
        answers = [until(answer, ends) for answer in answers]
        return [Answered(asked, answer, answer[-1] in ends) for asked, answer in zip(batch, answers, strict=True)]


def until(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Tokens up to the first stop token, that one included.

    >>> until([5, 6, 2, 2], [2])
    [5, 6, 2]
    """
    ends = [index for index, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens
