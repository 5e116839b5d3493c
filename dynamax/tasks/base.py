"""What a task is: questions to be put to a model, and the field's own way of scoring what it answers.

Three kinds, by what the model is asked for: words (``GenerationTask``), the likelihood of given
continuations (``ChoiceTask``), the likelihood of running text (``TextTask``). Text only: a task knows no
tokenizer, no model and no decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log
from statistics import fmean
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar, final

from dynamax.errors import UserError

E = TypeVar("E")

Scale = Literal["binary", "fraction", "any"]
"""What a score of one example may be: 0 or 1; between 0 and 1, both counted; any number."""


@dataclass(frozen=True)
class Example:
    """A prompt to be answered in words.

    Attributes:
        id: Unique in its task.
        prompt: Text the model continues.
        references: Answers that count as right.
        incorrect: Answers known to be wrong; empty where a task has none.
        stop_strings: Strings that end the answer.
        max_new_tokens: Most tokens to generate.
        origin: Text that several examples go back to, such as a passage; they are on one side of every split. None for
            an example that shares nothing.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    incorrect: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int = 64
    origin: str | None = None


@dataclass(frozen=True)
class ChoiceExample:
    """A prompt, and continuations whose likelihoods are compared.

    Attributes:
        id: Unique in its task.
        prompt: Text before every candidate.
        candidates: Distinct continuations, each with its leading space.
        labels: For each score, the candidates it compares (indices into ``candidates``) and whether each is true.
    """

    id: str
    prompt: str
    candidates: tuple[str, ...]
    labels: Mapping[str, Mapping[int, bool]]


@dataclass(frozen=True)
class TextExample:
    """Running text whose likelihood is asked for."""

    id: str
    text: str


class Window(NamedTuple):
    """Run tokens ``start`` up to, not including, ``stop``; score tokens ``first`` up to ``stop``."""

    start: int
    stop: int
    first: int


class Task(ABC, Generic[E]):
    """A benchmark, whose examples are of one kind.

    A task refuses options out of range when it is built (``UserError``), and bad data when it is asked for examples.

    Attributes:
        headline: Name of the score that stands for the task, one of ``aggregate``'s keys.
        higher_is_better: Whether a greater headline is a better one.
        headline_scale: What the headline of one example may be. ``dynamax calibrate`` takes tasks whose headline is
            ``binary`` or a ``fraction``.
    """

    headline: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    headline_scale: ClassVar[Scale] = "any"

    @abstractmethod
    def examples(self) -> list[E]:
        """What is asked, in the data set's order.

        Raises:
            UserError: If the data cannot be read or leave nothing to ask, or a package that scores need is missing.
        """

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Scores of single examples to scores of the task: the mean of each.

        Raises:
            UserError: If there are none.
        """
        if not scores:
            raise UserError("No example was scored. Give the task at least one row: raise limit or lower offset.")
        return {name: fmean(score[name] for score in scores) for name in scores[0]}


class GenerationTask(Task[Example]):
    """Asks for words."""

    @abstractmethod
    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Scores of one answer, already cut at the example's stop strings."""


class ChoiceTask(Task[ChoiceExample]):
    """Asks how likely given continuations are."""

    @abstractmethod
    def score_choices(self, example: ChoiceExample, loglikelihoods: Sequence[float]) -> dict[str, float]:
        """Scores of one example.

        Args:
            example: The example.
            loglikelihoods: Of each of ``example.candidates`` after ``example.prompt``, summed over its tokens, in nats.
        """


class TextTask(Task[TextExample]):
    """Asks how likely running text is: perplexity a token, and bits a byte of UTF-8.

    Bits a byte does not depend on the tokenizer, perplexity does (Gao et al., 2020, arXiv 2101.00027, section 3.1).
    """

    headline = "perplexity"
    higher_is_better = False

    @abstractmethod
    def windows(self, total: int) -> list[Window]:
        """Overlapping windows that score each of ``total`` tokens once, except token 0, which has no context.

        Token 0 should be one that begins a text (BOS, else EOS); then all of the document's own tokens are scored.
        """

    @final
    def score_text(self, example: TextExample, loglikelihood: float, tokens: int) -> dict[str, float]:
        """The sums of one document: ``loglikelihood`` in nats over its scored ``tokens``, and its bytes."""
        size = len(example.text.encode("utf-8"))
        return {"loglikelihood": loglikelihood, "tokens": float(tokens), "bytes": float(size)}

    @final
    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Perplexity and bits a byte over all documents as one."""
        means = super().aggregate(scores)  # a ratio of means is the ratio of the sums
        nats_per_token = -means["loglikelihood"] / means["tokens"]
        return {
            "perplexity": exp(nats_per_token) if nats_per_token < 700 else inf,
            "bits_per_byte": -means["loglikelihood"] / (means["bytes"] * log(2)),
        }
