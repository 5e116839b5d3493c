from __future__ import annotations

import math

import pytest
import torch

from dynamax.policies import AtDepth, Budget, Decaying, LatencyBudget, MaxProb, Never, PositionSchedule
from dynamax.types import Past
from tests.policies.evidence import evidence

LOGITS_BV = torch.tensor([[0.6, 0.4], [0.9, 0.1]]).log()


def test_never():
    seen = evidence(LOGITS_BV)
    assert Never()(seen).tolist() == [False, False]
    assert not seen.logits_read
    with pytest.raises(ValueError, match="has no threshold"):
        Never().at(0.5)


@pytest.mark.parametrize(("depth", "leaves"), [(3, False), (4, True), (5, True)])
def test_at_depth_leaves_from_its_depth_on(depth, leaves):
    seen = evidence(LOGITS_BV, depth=depth)
    assert AtDepth(4)(seen).tolist() == [leaves, leaves]
    assert AtDepth(9).at(4)(seen).tolist() == [leaves, leaves]
    assert not seen.logits_read


def test_at_depth_names_the_exits_it_could_have():
    AtDepth(4).validate([2, 4])
    with pytest.raises(ValueError, match=r"given depth 5, but the exits are at \[2, 4\]"):
        AtDepth(5).validate([2, 4])
    with pytest.raises(ValueError, match="whole number"):
        AtDepth(0)


@pytest.mark.parametrize("step", [0, 3, 10, 40])
def test_decaying_follows_the_formula(step):
    policy = Decaying(MaxProb(0.7), temperature=4.0, horizon=10)
    level = min(1.0, 0.9 * 0.7 + 0.1 * math.exp(-4.0 * step / 10))
    probs_BV = torch.tensor([[level - 1e-3, 1 - level + 1e-3], [level + 1e-3, 1 - level - 1e-3]])
    assert policy(evidence(probs_BV.log(), step=step)).tolist() == [False, True]


def test_decaying_takes_one_step_a_row():
    policy = Decaying(MaxProb(0.7), temperature=4.0, horizon=10)
    seen = evidence(torch.tensor([[0.66, 0.34], [0.66, 0.34]]).log(), step=torch.tensor([0, 40]))
    assert policy(seen).tolist() == [False, True]


def test_decaying_is_swept_through_its_policy():
    policy = Decaying(MaxProb({4: 0.2, 8: 0.9}), temperature=1.0, horizon=5)
    assert policy(evidence(LOGITS_BV, depth=4)).tolist() == [True, True]
    assert policy(evidence(LOGITS_BV, depth=8)).tolist() == [False, False]
    swept = policy.at(0.5)
    assert swept.threshold == 0.5
    assert policy.threshold == {4: 0.2, 8: 0.9}
    assert swept(evidence(LOGITS_BV, depth=8)).tolist() == [True, True]
    with pytest.raises(ValueError, match="exits are at"):
        policy.validate([4])


@pytest.mark.parametrize("options", [{"temperature": -1.0, "horizon": 5}, {"temperature": 1.0, "horizon": 0}])
def test_decaying_refuses_what_would_rise_or_divide_by_zero(options):
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        Decaying(MaxProb(0.5), **options)


def test_the_depth_falls_with_the_position_and_then_stays():
    policy = PositionSchedule(2, deepest=8, horizon=3)  # depths 8, 6, 4, 2, 2
    steps = torch.tensor([0, 1, 2, 3, 9])
    for depth, expected in {2: [0, 0, 0, 1, 1], 4: [0, 0, 1, 1, 1], 7: [0, 1, 1, 1, 1], 8: [1, 1, 1, 1, 1]}.items():
        seen = evidence(torch.zeros(5, 2), depth=depth, step=steps)
        assert policy(seen).int().tolist() == expected
        assert [policy(evidence(LOGITS_BV, depth=depth, step=int(t))).tolist() for t in steps] == [
            [bool(leave)] * 2 for leave in expected
        ]
        assert not seen.logits_read
    assert policy.at(6)(evidence(LOGITS_BV, depth=5, step=9)).tolist() == [False, False]
    assert policy(evidence(LOGITS_BV, depth=5, step=9)).tolist() == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shallowest": 9, "deepest": 8, "horizon": 3}, "the depth must not rise"),
        ({"shallowest": 2, "deepest": 8, "horizon": 0}, "at least 1 token"),
        ({"shallowest": 0, "deepest": 8, "horizon": 3}, "whole number of at least 1"),
    ],
)
def test_a_schedule_that_rises_or_has_no_length_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PositionSchedule(**options)


def test_a_budget_spends_what_was_saved():
    policy = Budget(MaxProb(0.7), 5.0, rate=0.3)
    seen = evidence(LOGITS_BV)
    for blocks, level in (((), 0.7), ((5, 5), 0.7), ((3, 3), 0.7 + 0.3 * 4 / 12), ((9, 9, 3), 0.7 - 0.3 * 6 / 12)):
        for score in (level - 1e-3, level + 1e-3):
            probs_BV = torch.tensor([[score, 1 - score], [score, 1 - score]])
            seen = evidence(probs_BV.log())
            seen.past = Past(list, lambda steps, count: [], blocks=lambda blocks=blocks: [list(blocks), [5]])
            assert policy(seen).tolist() == [score > level, score > 0.7], "each row has its own"
    assert policy.threshold == 5.0
    assert policy.at(6).threshold == 6.0


def test_a_budget_is_for_decoding_alone():
    seen = evidence(LOGITS_BV)
    for seen.past in (None, Past(list, lambda steps, count: [])):
        with pytest.raises(ValueError, match="known only while decoding"):
            Budget(MaxProb(0.7), 5.0)(seen)
    with pytest.raises(ValueError, match="rate 0; it must be greater than 0"):
        Budget(MaxProb(0.7), 5.0, rate=0)
    with pytest.raises(ValueError, match=r"0.5 blocks a token; wanted: at least 1"):
        Budget(MaxProb(0.7), 0.5)


def test_a_latency_budget_spends_what_was_saved():
    policy = LatencyBudget(MaxProb(0.7), 5.0, rate=0.3)
    spent = ((), 0.7), ((0.005, 0.005), 0.7), ((0.003, 0.003), 0.7 + 0.3 * 4 / 5), ((0.009, 0.003), 0.7 - 0.3 * 2 / 5)
    for seconds, level in spent:
        for score in (level - 1e-3, level + 1e-3):
            probs_BV = torch.tensor([[score, 1 - score], [score, 1 - score]])
            seen = evidence(probs_BV.log())
            times = [list(seconds), [0.005]]
            seen.past = Past(list, lambda steps, count: [], blocks=list, seconds=lambda times=times: times)
            assert policy(seen).tolist() == [score > level, score > 0.7], "each row has its own"
    assert policy.at(6).threshold == 6.0
    with pytest.raises(ValueError, match=r"0.0 ms a token; wanted: more than 0"):
        LatencyBudget(MaxProb(0.7), 0.0)
    with pytest.raises(ValueError, match="known only while decoding"):
        policy(evidence(LOGITS_BV))
