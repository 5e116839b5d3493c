"""Promises against simulated draws whose true risk is known, and against formulas by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from dynamax.calibration.risk import METHODS, documents_needed, last_of, promised

EPSILON, DELTA = 0.1, 0.2
TRUE_C = np.array([0.0, 0.02, 0.05, 0.08, 0.095, 0.105, 0.12, 0.2])
"""Risks of eight policies, the surest first; the last three must not be promised."""


def draw(count: int, rng: np.random.Generator, *, binary: bool) -> np.ndarray:
    """Losses of documents, greater at less sure policies: as of thresholds."""
    luck_D1 = rng.random((count, 1))
    if binary:
        return (luck_D1 < TRUE_C).astype(float)
    return np.clip(2 * TRUE_C * luck_D1 * (0.5 + rng.random((count, 1))), 0, 1)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("method", ["ltt", "ucb"])
def test_a_promise_is_broken_as_rarely_as_it_says(method: str, binary: bool) -> None:
    rng = np.random.default_rng(0)
    rounds, broken, given = 200, 0, 0
    true_C = TRUE_C if binary else draw(400_000, rng, binary=False).mean(0)
    for _ in range(rounds):
        place = promised(draw(300, rng, binary=binary), EPSILON, DELTA, method, binary=binary)
        given += place is not None
        broken += place is not None and true_C[place] > EPSILON
    assert given == rounds
    assert broken <= rounds * DELTA + 3 * (rounds * DELTA * (1 - DELTA)) ** 0.5


def test_the_naive_rule_breaks_what_it_does_not_promise() -> None:
    rng = np.random.default_rng(1)
    places = [promised(draw(300, rng, binary=True), EPSILON, DELTA, "naive") for _ in range(200)]
    assert sum(TRUE_C[place] > EPSILON for place in places if place is not None) > 200 * DELTA * 1.5


def test_crc_keeps_the_mean() -> None:
    rng = np.random.default_rng(2)
    places = [promised(draw(50, rng, binary=True), EPSILON, DELTA, "crc") for _ in range(2000)]
    risks = [0.0 if place is None else TRUE_C[place] for place in places]
    assert np.mean(risks) <= EPSILON + 3 * np.std(risks) / 2000**0.5
    assert np.mean(risks) > 0.5 * EPSILON, "or it would be of no use"


def test_crc_by_hand() -> None:
    losses_DC = np.zeros((19, 3))
    losses_DC[:1, 1] = 1.0  # (1 + 1) / 20 = 0.1
    losses_DC[:2, 2] = 1.0  # (2 + 1) / 20 = 0.15
    assert promised(losses_DC, 0.1, 0.5, "crc") == 1
    assert promised(losses_DC, 0.0999, 0.5, "crc") == 0  # 1 / 20
    assert promised(losses_DC, 0.0499, 0.5, "crc") is None


def test_ltt_without_a_loss_is_a_binomial_tail() -> None:
    for count in (20, 21, 22, 44, 45, 46):  # (1 - 0.1)^22 is the first below 0.1, (1 - 0.05)^45 is
        none = np.zeros((count, 1))
        for epsilon in (0.1, 0.05):
            holds = binom.pmf(0, count, epsilon) <= 0.1
            assert (promised(none, epsilon, 0.1, "ltt", binary=True) == 0) == holds


def test_no_policy_behind_one_that_fails_is_promised() -> None:
    losses_DC = np.zeros((200, 3))
    losses_DC[:100, 1] = 1.0  # the third would hold by itself
    for method in METHODS:
        assert promised(losses_DC, 0.1, 0.1, method) == 0


def test_last_of() -> None:
    assert last_of(np.array([True, True, False, True])) == 1
    assert last_of(np.array([False, True])) is None


def test_documents_needed() -> None:
    count = documents_needed(0.02, 0.05, 0.1)
    assert count is not None
    losses_D1 = np.zeros((count, 1))
    losses_D1[: int(0.02 * count)] = 1.0
    assert promised(losses_D1, 0.05, 0.1, "ltt") == 0
    fewer = losses_D1[: int(0.8 * count)] * 0 + 0.02
    assert promised(fewer, 0.05, 0.1, "ltt") is None
    assert documents_needed(0.05, 0.05, 0.1) is None
