"""Timed answers, and how they are compared: against counts made another way."""

from __future__ import annotations

import itertools
import os.path
import random
from collections.abc import Sequence

import pytest

from dynamax.backbones.sources import Folder
from dynamax.bench.answers import Answer, Clock, common, timed
from dynamax.bench.base import Contender, Subject, Told
from dynamax.bench.results import agreement, rows, spread
from dynamax.bench.runner import Runner
from dynamax.errors import UserError

LIMIT = 6
SUBJECT = Subject(Folder("nowhere"), None, ends=(0,), max_new_tokens=LIMIT, context=16, threads=1)


class Scripted(Contender):
    """Says what it is told to say, in bursts, and notes when it is asked."""

    about, ours = "a script", True

    def __init__(self, name: str, script: dict[int, list[list[int]]], log: list[str] | None = None) -> None:
        super().__init__(name, SUBJECT)
        self.script = script
        self.log = log if log is not None else []

    def load(self) -> None:
        self.log.append(f"load {self.name}")

    def decode(self, prompt: Sequence[int], told: Told) -> None:
        self.log.append(f"{self.name}{prompt[0]}")
        for burst in self.script[prompt[0]]:
            told(burst)

    def unload(self) -> None:
        self.log.append(f"unload {self.name}")


class Broken(Scripted):
    ours = False

    def absent(self) -> str | None:
        return None

    def decode(self, prompt: Sequence[int], told: Told) -> None:
        raise KeyError("no such layer")


def at(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Set the moments that the clock reads, the beginning first."""
    moments = iter(seconds)
    monkeypatch.setattr("dynamax.bench.answers.time.perf_counter", lambda: next(moments))


def test_a_token_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 10.0, 10.5, 10.7, 10.9)
    answer = timed(Scripted("a", {1: [[5], [6], [7]]}), [1], index=3, number=2)
    assert answer[:3] == (3, 2, [5, 6, 7])
    assert answer[3:6] == pytest.approx((500, 900, 200))
    assert not answer.ended


def test_tokens_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 0.0, 1.0, 1.2, 1.5)
    answer = timed(Scripted("a", {1: [[5, 6], [7, 8], [9]]}), [1])
    assert answer.tokens == [5, 6, 7, 8, 9]
    assert answer.ms_per_token == pytest.approx(500 / 3)  # of the three behind the first two


def test_what_lies_behind_an_end_token_or_the_limit_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 0.0, 1.0, 1.2, 9.0)
    answer = timed(Scripted("a", {1: [[5], [6, 0, 7], [8]]}), [1])
    assert (answer.tokens, answer.ended) == ([5, 6, 0], True)
    assert answer.ms_per_token == pytest.approx(100)
    at(monkeypatch, 0.0, 1.0, 1.5, 9.0)
    answer = timed(Scripted("a", {1: [[5], [6, 7, 8, 9, 10, 11], [12]]}), [1])
    assert (answer.tokens, answer.ended) == ([5, 6, 7, 8, 9, 10], False)
    assert answer.ms_per_token == pytest.approx(100)


def test_one_token_has_no_time_a_token() -> None:
    answer = timed(Scripted("a", {1: [[0]]}), [1])
    assert (answer.tokens, answer.ms_per_token, answer.ended) == ([0], None, True)
    assert spread([]) is None


def test_common_is_the_length_of_the_common_prefix() -> None:
    every = [list(each) for size in range(4) for each in itertools.product((1, 2), repeat=size)]
    for one, other in itertools.product(every, every):
        assert common(one, other) == len(os.path.commonprefix([one, other]))


def test_agreement_is_what_an_independent_count_finds() -> None:
    chance = random.Random(0)
    wanted = {prompt: [chance.randrange(1, 3) for _ in range(LIMIT)] for prompt in range(5)}
    answers = [
        Answer(prompt, number, [chance.randrange(1, 3) for _ in range(chance.randrange(1, LIMIT + 1))], 1, 2, 1, False)
        for prompt in wanted
        for number in (1, 2)
    ]
    answers += [Answer(0, 3, list(wanted[0]), 1, 2, 1, False)]
    equal = same = total = 0
    for answer in answers:
        still = True
        for place in range(LIMIT):
            given = answer.tokens[place] if place < len(answer.tokens) else None
            still = still and given == wanted[answer.prompt][place]
            equal += still
            total += 1
        same += still and len(answer.tokens) == LIMIT
    share, identical = agreement(answers, wanted)
    assert share == pytest.approx(equal / total)
    assert identical == same >= 1


@pytest.mark.slow
def test_rows_compare_with_the_reference() -> None:
    right = {1: [[5], [6], [0]], 2: [[7], [8], [9]]}
    half = {1: [[5], [4], [4]], 2: [[7], [8], [9]]}
    made = {Scripted("base", right): False, Scripted("other", half): False}
    found = Runner(made, [[1], [2]], rounds=2, sizes=None).run()
    base, other = rows(found, "base")
    assert (base.equal_share, base.identical, base.answers, base.tokens, base.ended) == (1.0, 4, 4, 12, 2)
    assert (other.equal_share, other.identical, other.ended) == (pytest.approx(4 / 6), 2, 0)
    assert rows(found, "nobody")[0].equal_share is None


@pytest.mark.slow
def test_contenders_take_turns_and_the_first_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "_loading", lambda *_: "together")
    log: list[str] = []
    script = {1: [[5]], 2: [[5]]}
    made = {Scripted(name, script, log): False for name in "abc"}
    Runner(made, [[1], [2]], rounds=2, sizes=None).run()
    assert log[:6] == ["load a", "a1", "load b", "b1", "load c", "c1"]
    assert log[6:18] == ["a1", "b1", "c1", "b2", "c2", "a2", "c1", "a1", "b1", "a2", "b2", "c2"]


@pytest.mark.slow
def test_where_memory_is_short_each_is_loaded_alone() -> None:
    log: list[str] = []
    made = {Scripted(name, {1: [[5]]}, log): False for name in "ab"}
    found = Runner(made, [[1]], rounds=2, sizes=None).run()
    assert found.loading == "in turn"
    assert log == ["load a", "a1", "a1", "a1", "unload a", "load b", "b1", "b1", "b1", "unload b"]


@pytest.mark.slow
def test_what_fails_is_absent_with_the_reason_or_an_error_if_it_was_named() -> None:
    fine, broken = Scripted("fine", {1: [[5]]}), Broken("broken", {})
    found = Runner({fine: False, broken: False}, [[1]], rounds=1, sizes=None).run()
    assert [each.contender for each in found.records] == [fine]
    assert found.absent == {"broken": "it failed with KeyError: 'no such layer'"}
    with pytest.raises(UserError, match="broken was asked for and cannot run: it failed with KeyError"):
        Runner({broken: True}, [[1]], rounds=1, sizes=None).run()
    with pytest.raises(UserError, match="None of the contenders can run"):
        Runner({broken: False}, [[1]], rounds=1, sizes=None).run()


@pytest.mark.slow
def test_a_bug_of_our_own_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        Runner({Scripted("ours", {}): False}, [[1]], rounds=1, sizes=None).run()


@pytest.mark.slow
def test_a_contender_that_says_nothing_is_absent() -> None:
    fine, silent = Scripted("fine", {1: [[5]]}), Scripted("silent", {1: []})
    found = Runner({fine: False, silent: False}, [[1]], rounds=1, sizes=None).run()
    assert "gave no token" in found.absent["silent"]


def test_a_clock_that_was_told_nothing_twice() -> None:
    clock = Clock()
    clock.told([3])
    clock.told([])
    assert clock.answer(0, 1, (0,), LIMIT).tokens == [3]
