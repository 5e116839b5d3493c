"""Two small tasks over the questions and passages that come with the package: they need no data and no network.

They are for demonstrations and smoke tests; a score on them is not a benchmark's.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import as_file, files

from dynamax.errors import at_least
from dynamax.tasks.base import Example, GenerationTask
from dynamax.tasks.coqa import Conversation, ConversationTask
from dynamax.tasks.rows import Row, load, select
from dynamax.tasks.scores import contains, triviaqa_f1

QUESTIONS = "rows of question, answers[] and topic"
PASSAGES = "rows of passage and turns[] (question, answer)"


class Questions(GenerationTask):
    """Factual questions: does one of the right answers occur in what the model says?

    Args:
        limit: Questions to use; all if left out.
        offset: Questions to leave out at the start, after the shots; for instance those that heads were trained on.
        max_new_tokens: Most tokens of an answer.
        shots: Solved questions before each question: the first of the file, which are then not asked.
    """

    headline = "accuracy"
    headline_scale = "binary"

    def __init__(self, *, limit: int | None = None, offset: int = 0, max_new_tokens: int = 48, shots: int = 0) -> None:
        at_least(self, 1, limit=limit, max_new_tokens=max_new_tokens)
        at_least(self, 0, offset=offset, shots=shots)
        self.limit, self.offset, self.max_new_tokens, self.shots = limit, offset, max_new_tokens, shots

    def examples(self) -> list[Example]:
        """The questions; the references are all right answers."""
        rows = _rows("questions.jsonl", QUESTIONS)
        solved = "".join(f"{_prompt(row)} {row.texts('answers')[0]}\n\n" for row in rows[: self.shots])
        return [
            Example(
                id=f"questions-{row.number}",
                prompt=solved + _prompt(row),
                references=row.texts("answers"),
                stop_strings=("\nQuestion:",),
                max_new_tokens=self.max_new_tokens,
            )
            for row in select(rows, skip=self.shots + self.offset, limit=self.limit)
        ]

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """``accuracy`` (an answer occurs, as whole words) and ``f1`` over the right answers, in [0, 1]."""
        return {"accuracy": contains(example.references, answer), "f1": triviaqa_f1(example.references, answer)}


class Passages(ConversationTask):
    """Short passages with turns of questions, prompted and scored like CoQA.

    Args:
        limit: Turns to use; all if left out.
        offset: Turns to leave out at the start.
        max_new_tokens: Most tokens of an answer.
    """

    def __init__(self, *, limit: int | None = None, offset: int = 0, max_new_tokens: int = 48) -> None:
        at_least(self, 1, limit=limit, max_new_tokens=max_new_tokens)
        at_least(self, 0, offset=offset)
        self.limit, self.offset, self.max_new_tokens = limit, offset, max_new_tokens

    def conversations(self) -> Iterable[Conversation]:
        """The passages of the file."""
        for row in _rows("passages.jsonl", PASSAGES):
            turns = row.records("turns")
            yield Conversation(
                id=f"passages-{row.number}",
                passage=row.text("passage"),
                questions=tuple(turn.text("question") for turn in turns),
                golds=tuple((turn.text("answer"),) for turn in turns),
            )


def _rows(name: str, wanted: str) -> list[Row]:
    with as_file(files("dynamax") / "data" / "prompts" / name) as path:
        return load(path, suffixes=(".jsonl",), wanted=wanted)


def _prompt(row: Row) -> str:
    return f"Question: {row.text('question')}\nAnswer:"
