"""The prompts that come with the package, and prompts from a file. Knows no tokenizer.

All shipped prompts were written for this project: factual questions with short answers, and short
passages with turns of questions and answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from dynamax.data.files import all_texts, read_file
from dynamax.errors import UserError


@dataclass(frozen=True)
class Question:
    """A factual question.

    Attributes:
        question: The question.
        answers: Right answers; the first is the usual form.
        topic: One word or two.
    """

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
    """A short text with a conversation about it; later questions may lean on earlier ones."""

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
    asked = [ask(question) for question in questions()[:first_questions]]
    told = [prompt for passage in passages()[:first_passages] for prompt in converse(passage)]
    return asked + told


def ask(question: Question) -> Prompt:
    """The prompt of a question."""
    return Prompt((question.question,), f"Question: {question.question}\nAnswer:", question.question)


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


def from_file(path: str, field: str) -> list[Prompt]:
    """Prompts of a user's own; every line of a txt file is one.

    Args:
        path: A csv, json, jsonl, parquet or txt file.
        field: Column with the prompt; a txt file has the one column ``text``.

    Raises:
        UserError: If the file cannot be read, or no row holds a prompt.
    """
    texts = all_texts(read_file(path), field, name=path)
    if not texts:
        raise UserError(f"{path} holds blank prompts alone. Give at least one row of text.")
    return [Prompt((text,), text, text) for text in texts]


def _rows(name: str) -> list[dict]:
    lines = files("dynamax").joinpath("data", "prompts", name).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
