"""Learning rates over a run."""

from __future__ import annotations

from functools import partial

import pytest

from dynamax.modules.schedule import warm_cosine, warm_flat_linear


def test_learning_rates_rise_and_fall_in_their_phase():
    factor = partial(warm_cosine, length=20, warmup=0.1)
    assert [factor(step) for step in (-10, -1, 20, 89)] == [0.0] * 4
    assert [factor(step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert factor(11) == pytest.approx(0.5)
    assert 0 < factor(19) < 0.01


def test_the_learning_rate_rises_stays_and_falls() -> None:
    factor = partial(warm_flat_linear, length=100, warmup=10, flat=0.3)
    assert [factor(step) for step in (0, 9, 10, 29, 30)] == [0.1, 1.0, 1.0, 1.0, 1.0]
    assert factor(65) == pytest.approx(0.5)
    assert factor(99) == pytest.approx(1 / 70)
    assert factor(100) == factor(101) == 0.0
    assert warm_flat_linear(3, length=4, warmup=10, flat=0.3) == 0.4
