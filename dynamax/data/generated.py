"""Text that the backbone writes itself, from prompts: needs no data. Knows decoding, no hidden states.

All prompts that come with the package were written for this project: factual questions with short answers, and short
passages with turns of questions and answers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from dynamax.data.corpora import read_file, text_of
from dynamax.data.text import Document, TextSource, derived_seed, held_out, origin_hash
from dynamax.decoding.batching import Scheduler
from dynamax.decoding.sampling import Sampled
from dynamax.engine import Engine
from dynamax.errors import UserError, at_least
from dynamax.generation import DAY
from dynamax.paths import InputPath


@dataclass(frozen=True)
class Question:
    """A factual question with its right answers, the usual form first, and a topic of one word or two."""

    question: str
    answers: tuple[str, ...]
    topic: str


@dataclass(frozen=True)
class Turn:
    """One question about a passage, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Passage:
    """A short text with a conversation about it; later questions may refer to earlier ones."""

    passage: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Prompt:
    """Something to answer, in both forms a model may want.

    Attributes:
        turns: What user and assistant said in turn; the user has the first word and the last.
        plain: The same for a model without a chat template.
        origin: What splits must keep on one side.
    """

    turns: tuple[str, ...]
    plain: str
    origin: str


def questions() -> list[Question]:
    """The shipped questions, in the order of the file.

    >>> first = questions()[0]
    >>> first.question.endswith("?")
    True
    """
    rows = _rows("questions.jsonl")
    return [Question(row["question"], tuple(row["answers"]), row["topic"]) for row in rows]


def passages() -> list[Passage]:
    """The shipped passages, in the order of the file."""
    rows = _rows("passages.jsonl")
    return [Passage(row["passage"], tuple(Turn(**turn) for turn in row["turns"])) for row in rows]


def shipped(*, first_questions: int | None = None, first_passages: int | None = None) -> list[Prompt]:
    """Prompts of the shipped questions, and of every turn of the shipped passages.

    Args:
        first_questions: Use only so many questions, from the first on.
        first_passages: Use only so many passages, from the first on.
    """
    asked = [
        Prompt((each.question,), f"Question: {each.question}\nAnswer:", each.question)
        for each in questions()[:first_questions]
    ]
    return asked + [prompt for passage in passages()[:first_passages] for prompt in converse(passage)]


def converse(passage: Passage) -> list[Prompt]:
    """The prompts of a passage's turns, each behind the right answers to the turns before."""
    prompts = []
    said: list[str] = []
    plain = passage.passage + "\n"
    for turn in passage.turns:
        said.append(turn.question if said else f"{passage.passage}\n\n{turn.question}")
        plain += f"\nQ: {turn.question}\nA:"
        prompts.append(Prompt(tuple(said), plain, passage.passage))
        said.append(turn.answer)
        plain += f" {turn.answer}"
    return prompts


def _rows(name: str) -> list[dict]:
    lines = files("dynamax").joinpath("data", "prompts", name).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Answered(NamedTuple):
    """A prompt, its tokens, the tokens of its answer, and whether an end token, the last of them, ended it.

    ``hidden`` has the states ``h_TD`` of prompt and answer, at the depths that were asked for.
    """

    prompt: Prompt
    asked: list[int]
    answer: list[int]
    ended: bool
    hidden: dict[int, Tensor]


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
        part: Use only the prompts whose origin's hash lies between these two numbers in [0, 1], the first one counted.
            A part that begins with 0 is what a validation of that size holds back.
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
        part: tuple[float, float] = (0.0, 1.0),
        chat: bool = True,
        temperature: float = 0.7,
        top_k: int | None = None,
        top_p: float = 1.0,
        documents: int = 1000,
        max_new_tokens: int = 96,
        batch: int = 48,
        seed: int = 0,
    ) -> None:
        at_least(self, 1, documents=documents, max_new_tokens=max_new_tokens, batch=batch)
        if prompts is not None and (questions is not None or passages is not None):
            raise UserError(
                f"prompts={prompts!r} was given together with questions={questions} and passages={passages}, which "
                f"count shipped prompts. Leave out one or the other."
            )
        if not 0 <= part[0] < part[1] <= 1:
            raise UserError(f"part={tuple(part)} was given; wanted two numbers in [0, 1], the smaller one first.")
        Sampled(temperature, top_k=top_k, top_p=top_p)  # refuses what it cannot sample with, before a model is loaded
        self.prompts = None if prompts is None else str(prompts)
        self.field, self.questions, self.passages, self.part = field, questions, passages, tuple(part)
        self.chat = chat
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.documents, self.max_new_tokens, self.batch, self.seed = documents, max_new_tokens, batch, seed

    def parted(self, part: tuple[float, float], *, documents: int) -> SelfGenerated:
        """The same over a part of the prompts, and so many documents of it."""
        options = {name: getattr(self, name) for name in inspect.signature(SelfGenerated).parameters}
        return SelfGenerated(**{**options, "part": part, "documents": documents})

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
            yield [Document(each.asked + each.answer, len(each.asked), each.prompt.origin) for each in group]

    def groups_with_states(self, engine: Engine, depths: Sequence[int], *, skip: int = 0) -> Iterator[list[Document]]:
        """See ``TextSource``: the states are those of the pass that wrote the answers."""
        for group in self.answers(engine, skip=skip, depths=depths):
            yield [
                Document(each.asked + each.answer, len(each.asked), each.prompt.origin, each.hidden) for each in group
            ]

    def answers(self, engine: Engine, *, skip: int = 0, depths: Sequence[int] = ()) -> Iterator[list[Answered]]:
        """The groups again, with each document's prompt; see ``TextSource.groups_with_states``."""
        context = engine.backbone.spec.context
        encoded: list[tuple[Prompt, list[int]]] = []
        for prompt in self._prompts:
            roles = ("user", "assistant")
            said = [{"role": roles[turn % 2], "content": said} for turn, said in enumerate(prompt.turns)]
            tokens = engine.encode(said if self.chat else prompt.plain, chat=self.chat, day=DAY)[0].tolist()
            if len(tokens) + self.max_new_tokens > context:
                raise UserError(
                    f"A prompt of {len(tokens)} tokens and an answer of up to {self.max_new_tokens} do not fit the "
                    f"context of {context}: {prompt.plain!r:.80}. Shorten the prompt, or lower max_new_tokens."
                )
            encoded.append((prompt, tokens))
        turns = (encoded[turn % len(encoded)] for turn in range(self.documents))
        ordered = sorted(turns, key=lambda pair: len(pair[1]))
        batches = [ordered[start : start + self.batch] for start in range(0, len(ordered), self.batch)]
        random.Random(self.seed).shuffle(batches)
        for index, batch in enumerate(batches[skip:], skip):
            yield self._answer(batch, engine, index, depths)

    @cached_property
    def _prompts(self) -> list[Prompt]:
        everyone = self._all_prompts()
        if self.part == (0.0, 1.0):
            return everyone
        origins_N = torch.tensor([origin_hash(prompt.origin) for prompt in everyone])
        outside_N = held_out(origins_N, self.part[0]) | ~held_out(origins_N, self.part[1])
        chosen = [prompt for prompt, outside in zip(everyone, outside_N.tolist(), strict=True) if not outside]
        if not chosen:
            raise UserError(f"part={self.part} leaves none of {len(everyone)} prompts. Widen it, or give more prompts.")
        return chosen

    def _all_prompts(self) -> list[Prompt]:
        if self.prompts is None:
            chosen = shipped(first_questions=self.questions, first_passages=self.passages)
            if not chosen:
                raise UserError(
                    "questions=0 and passages=0 leave no prompts. Use some of either, or a file of prompts."
                )
            return chosen
        rows = enumerate(read_file(self.prompts), 1)
        texts = [text_of(dict(row), self.field, number=number, name=self.prompts) for number, row in rows]
        if not any(map(str.strip, texts)):
            raise UserError(f"{self.prompts} holds blank prompts alone. Give at least one row of text.")
        return [Prompt((text,), text, text) for text in texts if text.strip()]

    def _answer(
        self, batch: Sequence[tuple[Prompt, list[int]]], engine: Engine, index: int, depths: Sequence[int]
    ) -> list[Answered]:
        scheduler = Scheduler(engine.decoder(), len(batch), keep=depths)
        ends = engine.options(max_new_tokens=self.max_new_tokens).eos_token_id
        places = {}
        for place, (_, asked) in enumerate(batch):
            seed = derived_seed(derived_seed(self.seed, index), place)
            ticket = scheduler.submit(
                torch.tensor([asked], device=engine.device),
                max_new_tokens=self.max_new_tokens,
                eos_token_id=ends,
                sampler=Sampled(self.temperature, top_k=self.top_k, top_p=self.top_p, seed=seed),
            )
            places[ticket] = place
        self.tell(f"reading {len(batch)} prompts")
        answers: list[list[int]] = [[] for _ in batch]
        states: list[dict[int, Tensor]] = [{} for _ in batch]
        done = 0
        while scheduler.busy:
            for told in scheduler.step():
                answers[places[told.ticket]].append(int(told.step.token_B))
                states[places[told.ticket]] = {depth: h_1TD[0] for depth, h_1TD in told.states.items()}
                done += told.ended
            self.tell(f"writing, {done} of {len(batch)} answers done")
        return [
            Answered(prompt, asked, answer, answer[-1] in ends, hidden)
            for (prompt, asked), answer, hidden in zip(batch, answers, states, strict=True)
        ]


def until(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Tokens up to the first stop token, that one included.

    >>> until([5, 6, 2, 2], [2])
    [5, 6, 2]
    """
    ends = [index for index, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens
