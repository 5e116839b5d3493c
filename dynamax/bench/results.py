"""Figures of a measurement: percentiles, agreement, floors. Knows records, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamax.bench.answers import Answer, common
from dynamax.bench.floors import Floor, known
from dynamax.bench.memory import METHOD
from dynamax.bench.runner import Findings, Record

Spread = dict[str, float]
"""Percentiles ``p10``, ``p50`` and ``p95``."""

MEANING = {
    "ms_per_token": "of each answer, milliseconds a token after the first; percentiles over answers of all rounds",
    "first_token_ms": "of each answer, milliseconds until its first token: the prompt's own pass",
    "tokens_per_second": "all tokens over all time, the prompts' own passes included",
    "memory_bytes": METHOD,
    "tokens": "all tokens of all answers of all rounds, end tokens included",
    "ended": "answers that an end token ended; the others reached max_new_tokens",
    "equal_share": "tokens equal to the reference's until the first difference, over the reference's tokens",
    "identical": "answers that are the reference's, token for token",
    "floor_ms": "median time of the bare products of all linear layers and the output matrix for one position, by "
    "torch, in the format floor_weights",
}
"""What the figures of a contender are."""


@dataclass(frozen=True)
class Row:
    """The figures of one contender.

    Attributes:
        name: Its name.
        about: What it runs.
        ours: Whether it is this package's.
        weights: Format of its weights.
        ms_per_token: Percentiles; None where no answer had a second token.
        first_token_ms: Percentiles.
        tokens_per_second: All tokens over all time.
        load_seconds: Time of loading.
        memory_bytes: Growth of the process; None where that is unknown.
        answers: Answers.
        tokens: Tokens of all of them.
        ended: Answers that an end token ended.
        equal_share: Share of tokens equal to the reference's; None without a reference.
        identical: Answers equal to the reference's; None without a reference.
        floor_ms: Median of the floor; None where there is none.
        floor_weights: Format of the floor.
    """

    name: str
    about: str
    ours: bool
    weights: str
    ms_per_token: Spread | None
    first_token_ms: Spread
    tokens_per_second: float
    load_seconds: float
    memory_bytes: int | None
    answers: int
    tokens: int
    ended: int
    equal_share: float | None
    identical: int | None
    floor_ms: float | None
    floor_weights: str | None


def rows(found: Findings, reference: str) -> list[Row]:
    """The figures of every contender, in the order of the findings.

    Args:
        found: What was measured.
        reference: Name of the contender that answers are compared with.
    """
    base = next((each.answers for each in found.records if each.contender.name == reference), None)
    wanted = {answer.prompt: answer.tokens for answer in reversed(base)} if base else None  # of the first round
    floors = {floor.weights: floor for floor in found.floors}
    return [_row(record, wanted, floors.get(known(record.contender.weights))) for record in found.records]


def _row(record: Record, wanted: Mapping[int, Sequence[int]] | None, floor: Floor | None) -> Row:
    answers, contender = record.answers, record.contender
    tokens = sum(len(answer.tokens) for answer in answers)
    equal_share, identical = agreement(answers, wanted) if wanted else (None, None)
    return Row(
        contender.name,
        contender.about,
        contender.ours,
        contender.weights,
        spread([answer.ms_per_token for answer in answers if answer.ms_per_token is not None]),
        spread([answer.first_ms for answer in answers]) or {},
        1000 * tokens / sum(answer.total_ms for answer in answers),
        record.load_seconds,
        record.memory,
        len(answers),
        tokens,
        sum(answer.ended for answer in answers),
        equal_share,
        identical,
        float(np.median(floor.ms)) if floor else None,
        floor.weights if floor else None,
    )


def agreement(answers: Sequence[Answer], wanted: Mapping[int, Sequence[int]]) -> tuple[float, int]:
    """Share of equal tokens until the first difference, and how many answers are the same.

    Args:
        answers: Those of one contender.
        wanted: The reference's tokens by the number of the prompt.
    """
    equal = sum(common(answer.tokens, wanted[answer.prompt]) for answer in answers)
    same = sum(list(answer.tokens) == list(wanted[answer.prompt]) for answer in answers)
    return equal / sum(len(wanted[answer.prompt]) for answer in answers), same


def spread(values: Sequence[float]) -> Spread | None:
    """Percentiles 10, 50 and 95, between values by their distance; None of nothing."""
    if not values:
        return None
    return {f"p{part}": float(np.percentile(values, part)) for part in (10, 50, 95)}


def as_json(found: Findings, table: Sequence[Row], reference: str) -> dict[str, Any]:
    """The part of the report that was measured."""
    answers = {each.contender.name: [answer._asdict() for answer in each.answers] for each in found.records}
    return {
        "loading": found.loading,
        "reference": reference,
        "meaning": MEANING,
        "contenders": [{**vars(row), "raw": answers[row.name]} for row in table],
        "floors": {floor.weights: {"ms": spread(floor.ms), "raw_ms": floor.ms} for floor in found.floors},
        "absent": [{"name": name, "reason": reason} for name, reason in found.absent.items()],
    }
