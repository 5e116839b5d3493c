"""TriviaQA without context (Joshi et al., 2017, arXiv 1705.03551): questions whose answers go by many names.

The prompt and the stop strings are lm-evaluation-harness's (``triviaqa`` version 3), the scores those of the
official script: F1 and exact match, the best over the normalised aliases and what people answered.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dynamax.errors import at_least
from dynamax.paths import InputPath
from dynamax.tasks.base import Example, GenerationTask
from dynamax.tasks.rows import HubDataset, Row, load, select
from dynamax.tasks.scores import triviaqa_exact, triviaqa_f1


class Fields(NamedTuple):
    """Where a layout keeps what is needed."""

    id: str
    question: str
    value: str
    aliases: str
    human: str | None


HUB_FIELDS = Fields("question_id", "question", "answer.value", "answer.normalized_aliases", None)
RELEASE_FIELDS = Fields("QuestionId", "Question", "Answer.Value", "Answer.NormalizedAliases", "Answer.HumanAnswers")
WANTED = (
    "rows as in the Hub's mandarjoshi/trivia_qa (.jsonl or .parquet; question_id, question, answer with value and "
    "normalized_aliases), or a .json of the official release (Data[] of QuestionId, Question, Answer with Value and "
    "NormalizedAliases)"
)


class TriviaQA(GenerationTask):
    """Closed-book questions.

    The prompt puts a question mark after the question even where it has its own, because the harness does.

    Args:
        path: A local file in the Hub's or the official schema; without it, ``mandarjoshi/trivia_qa``
            (``rc.nocontext``, validation) from the Hub.
        limit: Questions to use; all if left out.
        offset: Questions to leave out at the start, after those that serve as shots.
        max_new_tokens: Most tokens of an answer.
        shots: Solved questions before each question: the first rows of the data, which are then not asked.
    """

    headline = "em"
    headline_scale = "binary"

    def __init__(
        self,
        path: InputPath | None = None,
        *,
        limit: int | None = None,
        offset: int = 0,
        max_new_tokens: int = 64,
        shots: int = 2,
    ) -> None:
        at_least(self, 1, limit=limit, max_new_tokens=max_new_tokens)
        at_least(self, 0, offset=offset, shots=shots)
        self.path, self.limit, self.offset = path, limit, offset
        self.max_new_tokens, self.shots = max_new_tokens, shots

    def examples(self) -> list[Example]:
        """The questions; the references are the normalised aliases, and in the release what people answered."""
        hub = HubDataset("mandarjoshi/trivia_qa", "rc.nocontext", "validation")
        rows = load(self.path, hub=hub, suffixes=(".jsonl", ".parquet", ".json"), wanted=WANTED)
        release = self.path is not None and Path(self.path).suffix.lower() == ".json"
        fields = RELEASE_FIELDS if release else HUB_FIELDS
        solved = "".join(f"{_prompt(row, fields)} {row.text(fields.value)}\n\n" for row in rows[: self.shots])
        asked = select(rows, skip=self.shots + self.offset, limit=self.limit)
        return [
            Example(
                id=row.text(fields.id),
                prompt=solved + _prompt(row, fields),
                references=row.texts(fields.aliases) + row.texts(fields.human, optional=True),
                stop_strings=("\n", ".", ","),
                max_new_tokens=self.max_new_tokens,
            )
            for row in asked
        ]

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """``em`` and ``f1`` in [0, 1]."""
        aliases = example.references
        return {"em": triviaqa_exact(aliases, answer), "f1": triviaqa_f1(aliases, answer)}


def _prompt(row: Row, fields: Fields) -> str:
    return f"Question: {row.text(fields.question)}?\nAnswer:"
