"""Draft lengths by expected gain, on made-up times; no clock runs here."""

from __future__ import annotations

import random

import pytest

from dynamax.decoding.pace import AGAIN, FIRST_ROUNDS, WARM_ROUNDS, Pace


def measured(costs: dict[int, float]) -> Pace:
    """A pace that has measured chunks of these lengths, in steps."""
    pace = Pace()
    for length, cost in costs.items():
        for seconds in [9.0] * WARM_ROUNDS + [cost]:  # the first ones do not count
            pace.took(length, seconds)
    return pace


def test_costs_are_measured_and_guessed_before() -> None:
    pace = measured({1: 2.0, 3: 5.0})
    assert pace.cost(1) == 1.0
    assert pace.cost(3) == 2.5
    assert pace.cost(2) == pytest.approx(1.12)


def test_one_slow_chunk_counts_little() -> None:
    pace = measured({1: 1.0, 2: 1.2})
    pace.took(2, 60.0)
    assert pace.cost(2) < 1.3
    for _ in range(3):
        pace.took(2, 1.0)
    assert pace.cost(2) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("cost", "share", "wanted"),
    [(1.1, 0.9, 4), (1.1, 0.3, 1), (1.1, 0.05, 0), (2.5, 0.9, 0), (1.9, 0.99, 4)],
)
def test_the_length_with_the_most_expected_tokens_a_second(cost: float, share: float, wanted: int) -> None:
    """``cost``: of two positions; further ones cost as much again."""
    pace = measured({length: 1 + (cost - 1) * (length - 1) for length in range(1, 6)})
    dice = random.Random(0)
    for _ in range(2000):
        pace.learn(["a"], int(dice.random() < share))
    best = max(range(5), key=lambda k: sum(share**i for i in range(k + 1)) / pace.cost(1 + k))
    assert abs(pace.length(["a"] * 4) - best) <= 1
    assert (pace.length(["a"] * 4) > 0) == (wanted > 0)


def test_drafts_that_do_not_pay_are_tried_again() -> None:
    pace = measured({1: 1.0, 2: 1.5})
    for _ in range(60):
        pace.learn(["a"], 0)
    taken = [pace.length(["a"]) for _ in range(3 * AGAIN)]
    assert sum(taken) == 3
    assert pace.length([]) == 0
    for _ in range(200):
        pace.learn(["a"], 1)  # the text has changed
    assert pace.length(["a"]) == 1


def test_what_was_right_elsewhere_is_where_a_kind_begins() -> None:
    """It counts little: a text of another kind is found out soon."""
    pace = measured({length: 1 + 0.1 * (length - 1) for length in range(1, 6)})
    pace.begin("good", 900, 100)
    pace.begin("bad", 1, 999)
    assert pace.length(["good"] * 4) == 4
    assert pace.length(["bad"] * 4) == 0
    for _ in range(200):
        pace.learn(["good"], 0)
        pace.learn(["bad"], 1)
    assert pace.length(["good"] * 4) == 0
    assert pace.length(["bad"] * 4) == 4


def test_kinds_are_apart() -> None:
    pace = measured({length: 1 + 0.1 * (length - 1) for length in range(1, 6)})
    for _ in range(100):
        pace.learn(["sure", "unsure"], 1)
    assert pace.length(["sure"] * 4) == 4
    assert pace.length(["unsure"] * 4) == 0
    assert pace.length(["sure", "unsure", "sure"]) == 1


def test_the_faster_way_is_taken_and_the_other_one_tried_ever_more_seldom() -> None:
    pace, taken = Pace(), []
    for _ in range(4000):
        way = pace.way(("slow", "fast"))
        taken.append(way)
        pace.gave(way, 2, 1.0 if way == "slow" else 0.5)
    assert taken[:FIRST_ROUNDS] == ["slow"] * FIRST_ROUNDS
    assert 8 <= taken.count("slow") <= 20
    assert taken[2000:].count("slow") <= 4


def test_a_way_that_has_become_faster_is_found() -> None:
    pace = Pace()
    for turn in range(3000):
        way = pace.way(("a", "b"))
        pace.gave(way, 1, (0.5 if turn < 500 else 2.0) if way == "a" else 1.0)
    assert pace.way(("a", "b")) == "b"
