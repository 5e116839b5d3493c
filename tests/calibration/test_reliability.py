"""Errors, bins and the temperature against scikit-learn, simulated scores and cases by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from dynamax.calibration.plot import draw
from dynamax.calibration.reliability import (
    COLDEST,
    EDGE,
    HOTTEST,
    TREATMENTS,
    at_temperature,
    binned,
    brier,
    calibration_error,
    fitted_temperature,
    isotonic,
    log_odds,
    reliability,
)
from dynamax.calibration.scores import Reads, Scores


def drawn(count: int, seed: int, *, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and outcomes at the probabilities that the scores have once divided by a temperature."""
    rng = np.random.default_rng(seed)
    score_N = rng.random(count)
    return score_N, rng.random(count) < at_temperature(score_N, temperature)


def test_expected_calibration_error_by_hand() -> None:
    score_N = np.array([0.9, 0.2, 0.8, 0.1])
    right_N = np.array([True, True, True, False])
    # two bins of two: |0.5 - 0.15| and |1 - 0.85|
    assert calibration_error(score_N, right_N, bins=2) == pytest.approx((0.35 + 0.15) / 2)
    # three bins of 2, 1 and 1
    assert calibration_error(score_N, right_N, bins=3) == pytest.approx((2 * 0.35 + 0.2 + 0.1) / 4)


def test_expected_calibration_error_of_probabilities_is_near_zero() -> None:
    assert calibration_error(*drawn(60_000, 0)) < 0.01
    assert calibration_error(*drawn(60_000, 0, temperature=3.0)) > 0.1


@pytest.mark.parametrize(
    ("score", "right", "error", "mean_square"),
    [
        ([0.9, 0.7], [True, True], 0.2, (0.01 + 0.09) / 2),
        ([0.9, 0.7], [False, False], 0.8, (0.81 + 0.49) / 2),
        ([0.3], [True], 0.7, 0.49),
        ([0.0, 1.0], [False, True], 0.0, 0.0),
        ([0.0, 1.0], [True, False], 1.0, 1.0),
    ],
    ids=["all right", "all wrong", "one", "0 and 1, sure and right", "0 and 1, sure and wrong"],
)
def test_edges(score: list[float], right: list[bool], error: float, mean_square: float) -> None:
    score_N, right_N = np.array(score), np.array(right)
    assert calibration_error(score_N, right_N) == pytest.approx(error)
    assert brier(score_N, right_N) == pytest.approx(mean_square)
    temperature = fitted_temperature(score_N, right_N)
    assert COLDEST <= temperature <= HOTTEST
    mended_N = at_temperature(score_N, temperature)
    assert np.isfinite(mended_N).all()
    assert log_loss(right_N, mended_N, labels=[False, True]) <= log_loss(right_N, score_N, labels=[False, True])


def test_equal_scores_count_alike_in_whatever_order_they_come() -> None:
    score_N = np.full(60, 0.5)
    right_N = np.arange(60) < 30  # the first bins would be all right, the last all wrong
    assert calibration_error(score_N, right_N) == pytest.approx(0.0)
    assert calibration_error(score_N, right_N[::-1]) == pytest.approx(0.0)
    order = np.random.default_rng(0).permutation(500)
    score_N, right_N = drawn(500, 1)
    score_N = score_N.round(1)
    assert calibration_error(score_N, right_N) == pytest.approx(calibration_error(score_N[order], right_N[order]))


def test_bins_hold_as_many_positions_each() -> None:
    score_N, right_N = drawn(103, 2)
    bins = binned(score_N, right_N, 10)
    assert sorted(each.positions for each in bins) == [10] * 7 + [11] * 3
    assert [each.score for each in bins] == sorted(each.score for each in bins)
    assert sum(each.positions * each.right for each in bins) == pytest.approx(right_N.sum())
    assert sum(each.positions * each.score for each in bins) == pytest.approx(score_N.sum())
    assert len(binned(score_N[:3], right_N[:3], 10)) == 3


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_the_temperature_is_a_logistic_regression_without_intercept(true: float) -> None:
    score_N, right_N = drawn(4000, 3, temperature=true)
    temperature = fitted_temperature(score_N, right_N)
    regression = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8)
    regression.fit(log_odds(score_N)[:, None], right_N)
    assert temperature == pytest.approx(1 / regression.coef_[0, 0], rel=1e-4)
    assert temperature == pytest.approx(true, rel=0.1)


def test_a_temperature_keeps_the_order_and_one_changes_nothing() -> None:
    score_N = np.linspace(EDGE, 1 - EDGE, 99)
    assert at_temperature(score_N, 1.0) == pytest.approx(score_N)
    assert (np.diff(at_temperature(score_N, 3.0)) > 0).all()
    assert at_temperature(np.array([0.5]), 7.0) == pytest.approx(0.5)
    assert at_temperature(np.array([0.0, 1.0]), COLDEST) == pytest.approx(np.array([0.0, 1.0]))


def test_isotonic_by_hand() -> None:
    shares = isotonic(np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, True, False, True]))
    assert shares(np.array([0.0, 0.1, 0.2, 0.3, 0.4, 1.0])) == pytest.approx([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])


def documents(count: int, seed: int) -> list[Scores]:
    """Two exits: the first's scores are probabilities, the second's are too sure by a temperature of 3."""
    found = []
    for number in range(count):
        pairs = [drawn(50, 1000 * seed + 2 * number + index, temperature=(1.0, 3.0)[index]) for index in (0, 1)]
        score_ET, right_ET = (np.stack(each) for each in zip(*pairs, strict=True))
        found.append(Scores(score_ET, right_ET, (Reads(True, 0, (), False),) * 2))
    return found


@pytest.mark.slow
def test_reliability_is_fitted_on_some_and_measured_on_others(tmp_path: Path) -> None:
    fitted, measured = documents(40, 0), documents(30, 1)
    first, second = reliability(fitted, measured, (2, 4))
    assert (first.depth, second.depth) == (2, 4)
    assert first.positions == 30 * 50
    assert second.right == pytest.approx(np.concatenate([each.right_ET[1] for each in measured]).mean())
    assert second.score == pytest.approx(np.concatenate([each.score_ET[1] for each in measured]).mean())
    assert first.temperature == pytest.approx(1.0, abs=0.15)
    assert second.temperature == pytest.approx(3.0, abs=0.5)
    assert second.errors["as scored"].ece > 2 * second.errors["temperature"].ece
    assert second.errors["as scored"].brier > second.errors["isotonic"].brier
    # what was fitted depends on the first documents alone: on those, isotonic regression has no error
    itself = reliability(fitted, fitted, (2, 4))[1]
    assert itself.temperature == second.temperature
    assert itself.errors["isotonic"].ece < second.errors["isotonic"].ece
    draw([first, second] * 3, title="Six exits", path=tmp_path / "six.png")
    draw([first], title="One exit", path=tmp_path / "one.png")
    assert (tmp_path / "six.png").read_bytes().startswith(b"\x89PNG")
    assert set(first.errors) == set(TREATMENTS)
