"""What an edge learns of the cloud."""

from __future__ import annotations

from dynamax.serving.waits import DraftLength, Waits


def test_a_late_cloud_is_asked_less_often_until_it_is_in_time() -> None:
    waits = Waits(0.1)
    asked = []
    for _ in range(100):
        asked.append(waits.worth_asking())
        if asked[-1]:
            waits.late()
    gaps = "".join("x" if each else "." for each in asked).split("x")[1:]
    assert [len(gap) for gap in gaps][:6] == [1, 2, 4, 8, 16, 32]
    waits = Waits(0.1)
    waits.late()
    assert not waits.worth_asking()
    assert waits.worth_asking()
    waits.took(0.05)
    assert all(waits.worth_asking() for _ in range(10))
    waits.late()
    assert [waits.worth_asking() for _ in range(2)] == [False, True]  # the next silence begins small again


def test_a_cloud_that_is_always_slower_than_allowed_is_late() -> None:
    waits = Waits(0.1)
    waits.took(0.2)
    assert not waits.worth_asking()
    patient = Waits(None)
    patient.took(9.0)
    assert patient.worth_asking()


def test_the_longer_the_wait_the_longer_the_drafts() -> None:
    lengths = []
    for wait in (0.001, 0.02, 0.08, 1.0):
        length = DraftLength(8)
        for _ in range(20):
            length.learn(0.01 * 5, wait, 4, 3)
        lengths.append(length.best())
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_drafts_that_are_never_right_are_short() -> None:
    length = DraftLength(8)
    assert length.best() == 8  # nothing is known yet
    for _ in range(20):
        length.learn(0.05, 0.02, 4, 0)
    assert length.best() == 1


def test_drafts_that_are_always_right_are_long() -> None:
    length = DraftLength(8)
    for _ in range(20):
        length.learn(0.05, 0.02, 4, 4)
    assert length.best() == 8
