"""Rows of a report about scores and answers of single examples; the others are in ``results``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dynamax.metrics.reliability import Reliability

Threshold = float | Mapping[int, float] | None


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram: how many scores (``tokens``), their mean, and the share that was right."""

    tokens: int
    score: float | None
    right: float | None


@dataclass(frozen=True)
class ReliabilityRow:
    """A policy's score at one exit against whether the exit was right, along the full model's own answers.

    Attributes:
        policy: The policy's label; its threshold does not change the score.
        depth: Of the exit.
        tokens: Positions.
        ece: Expected calibration error over the bins.
        brier: Brier score.
        bins: Of equal width over [0, 1], the lowest first.
    """

    policy: str
    depth: int
    tokens: int
    ece: float
    brier: float
    bins: list[Bin]


@dataclass(frozen=True)
class GivenAnswer:
    """One policy's own answer: the text of each token (may be empty), and the depth that the token left at."""

    policy: str
    threshold: Threshold
    tokens: list[str]
    depths: list[int]


@dataclass(frozen=True)
class AnswersRow:
    """One example: its name in the task, its prompt, and what the full model and each policy answered."""

    id: str
    prompt: str
    given: list[GivenAnswer]


def reliability_row(policy: str, depth: int, metric: Reliability) -> ReliabilityRow:
    """One line of the reliability of scores."""
    found = metric.compute()
    columns = zip(found.count_K.tolist(), found.score_K.tolist(), found.right_K.tolist(), strict=True)
    bins = [Bin(int(count), *((score, right) if count else (None, None))) for count, score, right in columns]
    return ReliabilityRow(policy, depth, sum(each.tokens for each in bins), float(found.ece), float(found.brier), bins)
