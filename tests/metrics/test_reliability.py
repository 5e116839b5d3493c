"""Reliability of scores against sums that are written out, and against MAPIE's ECE."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mapie.metrics.calibration import expected_calibration_error

from dynamax.metrics.reliability import BINS, Reliability


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    score_N = rng.random(500) ** 0.5
    return score_N, rng.random(500) < score_N**2


def test_it_is_the_same_in_parts(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    score_N, right_N = map(torch.from_numpy, drawn)
    whole, parts = Reliability(), Reliability()
    whole.update(score_N, right_N)
    for start in range(0, 500, 100):
        parts.update(score_N[start : start + 100].view(10, 10), right_N[start : start + 100].view(10, 10))
    for mine, theirs in zip(parts.compute(), whole.compute(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_ece_is_mapies_and_brier_and_bins_those_by_hand(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    score_N, right_N = drawn
    metric = Reliability()
    metric.update(torch.from_numpy(score_N), torch.from_numpy(right_N))
    found = metric.compute()
    assert found.ece.item() == pytest.approx(expected_calibration_error(right_N.astype(int), score_N, num_bins=BINS))
    assert found.brier.item() == pytest.approx(np.mean((score_N - right_N) ** 2))
    for index in range(BINS):
        inside = (score_N >= index / BINS) & (score_N < (index + 1) / BINS)
        assert found.count_K[index] == inside.sum()
        assert found.score_K[index].item() == pytest.approx(score_N[inside].mean())
        assert found.right_K[index].item() == pytest.approx(right_N[inside].mean())


def test_the_ends_belong_to_the_outer_bins() -> None:
    metric = Reliability()
    metric.update(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([True, True, False]))
    found = metric.compute()
    assert found.count_K.tolist() == [1, *[0] * (BINS - 2), 2]
    assert found.ece.item() == pytest.approx((1 + 2 * 0.5) / 3)
    assert found.score_K[1:-1].isnan().all()


@pytest.mark.parametrize(
    ("score", "told"), [([0.5, 1.5], r"from 0.5 to 1.5"), ([0.5, float("nan")], "probabilities"), ([0.5], "a label a")]
)
def test_what_is_no_probability_is_refused(score: list[float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Reliability().update(torch.tensor(score), torch.tensor([True, False]))
