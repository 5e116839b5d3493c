"""CoQA (Reddy et al., 2019, arXiv 1808.07042): a passage and a conversation about it, one question after another.

The prompt is lm-evaluation-harness's (``coqa``): passage, the turns before with their first gold answers, the
question. Scores are those of the official script: F1 and exact match against every gold answer, leave-one-out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from dynamax.errors import at_least
from dynamax.paths import InputPath
from dynamax.tasks.base import Example, GenerationTask
from dynamax.tasks.rows import HubDataset, Row, load, select
from dynamax.tasks.scores import coqa_exact, coqa_f1, leave_one_out

STOPS = ("\nQ:", "\n\n")
WANTED = (
    "the official coqa-dev-v1.0.json, with data[] of story, questions[] and answers[] (input_text, turn_id), "
    "and additional_answers{}, which may be missing"
)


@dataclass(frozen=True)
class Conversation:
    """A passage, its questions, and for each question all gold answers, the first of which goes into the history."""

    id: str
    passage: str
    questions: tuple[str, ...]
    golds: tuple[tuple[str, ...], ...]


class ConversationTask(GenerationTask):
    """Asks questions about passages, one turn after another, with CoQA's prompt and scores."""

    headline = "f1"
    headline_scale = "fraction"
    limit: int | None
    offset: int
    max_new_tokens: int
    last_turn_only: bool = False

    @abstractmethod
    def conversations(self) -> Iterable[Conversation]:
        """The conversations, in the data set's order."""

    @final
    def examples(self) -> list[Example]:
        """The turns, passage by passage, each with the turns before it in the prompt; the references are all golds."""
        examples: list[Example] = []
        for each in self.conversations():
            turns: list[Example] = []
            prompt = f"{each.passage}\n\n"
            for turn, (question, golds) in enumerate(zip(each.questions, each.golds, strict=True), 1):
                prompt += f"Q: {question}\n\nA:"
                name = f"{each.id}-{turn}"
                turns.append(Example(name, prompt, golds, (), STOPS, self.max_new_tokens, each.passage))
                prompt += f" {golds[0]}\n\n"
            examples += turns[-1:] if self.last_turn_only else turns
        return select(examples, skip=self.offset, limit=self.limit)

    @final
    def score(self, example: Example, answer: str) -> dict[str, float]:
        """``f1`` and ``em``, in [0, 1], of the answer's first line."""
        line = answer.strip().split("\n")[0]
        golds = example.references
        return {"f1": leave_one_out(coqa_f1, golds, line), "em": leave_one_out(coqa_exact, golds, line)}


@final
class CoQA(ConversationTask):
    """Conversational questions; every turn is an example.

    Equal golds each count, as in the official script; the harness drops repeats, which lowers its scores.

    Args:
        path: A local coqa-dev-v1.0.json; without it, ``EleutherAI/coqa`` from the Hub, the layout with all golds.
        limit: Turns to use; all if left out.
        offset: Turns to leave out at the start.
        max_new_tokens: Most tokens of an answer.
        last_turn_only: Ask only the last question of each passage (the harness up to 0.4.13, and DYNAMAX).
    """

    def __init__(
        self,
        path: InputPath | None = None,
        *,
        limit: int | None = None,
        offset: int = 0,
        max_new_tokens: int = 64,
        last_turn_only: bool = False,
    ) -> None:
        at_least(self, 1, limit=limit, max_new_tokens=max_new_tokens)
        at_least(self, 0, offset=offset)
        self.path, self.limit, self.offset = path, limit, offset
        self.max_new_tokens, self.last_turn_only = max_new_tokens, last_turn_only

    def conversations(self) -> Iterable[Conversation]:
        """The passages of the data set."""
        hub = HubDataset("EleutherAI/coqa", None, "validation")
        return map(_conversation, load(self.path, hub=hub, suffixes=(".json",), wanted=WANTED))


def _conversation(row: Row) -> Conversation:
    questions = row.records("questions")
    golds: dict[int, list[str]] = {q.get("turn_id", int): [] for q in questions}
    fields = ["answers"]
    if row.values.get("additional_answers") is not None:
        more = row.get("additional_answers", dict)
        fields += [f"additional_answers.{name}" for name, answers in more.items() if answers is not None]
    for field in fields:
        for answer in row.records(field):
            turn = answer.get("turn_id", int)
            if turn not in golds:
                raise row.error(f"answers turn {turn}, which has no question")
            golds[turn].append(answer.get("input_text", str))
    unanswered = [str(turn) for turn, found in golds.items() if not found]
    if unanswered:
        raise row.error(f"has no answer to turn {', '.join(unanswered)}")
    if not questions or len(golds) < len(questions):
        raise row.error(f"has {len(questions)} questions with {len(golds)} different turn_id's")
    return Conversation(
        id=f"coqa-{row.number}",
        passage=row.text("story"),
        questions=tuple(q.get("input_text", str) for q in questions),
        golds=tuple(map(tuple, golds.values())),
    )
