from __future__ import annotations

import inspect

import pytest
import torch
from jsonargparse import ArgumentParser

import dynamax.policies
from dynamax.policies import (
    AllOf,
    AnyOf,
    AtDepth,
    BetaMixture,
    BetaPair,
    Budget,
    CandidateMargin,
    CandidateProb,
    Cascade,
    Decaying,
    Entropy,
    GateConfidence,
    JEIGate,
    LatencyBudget,
    Margin,
    MaxProb,
    Never,
    OnlyAt,
    Oracle,
    Patience,
    PositionSchedule,
    Random,
    Saturation,
    ScorePolicy,
    TerminationPolicy,
    Voting,
)
from dynamax.testing import WORLDS, _exits, _world, check_policy

COUNTS = (1, 2, 3, 4, 5, 6)
MIXTURES = {depth: BetaPair((4.0, 2.0), (2.0, 3.0), 0.2 + 0.1 * depth) for depth in (2, 4, 6)}
POLICIES = [
    (Never(), ()),
    (AtDepth(4), COUNTS),
    (MaxProb(0.6), None),
    (MaxProb({2: 0.9, 4: 0.6, 6: 0.4}), None),
    (Margin(0.4), None),
    (Entropy(0.4), None),
    (MaxProb(0.6, temperature=0.5), None),
    (Margin(0.4, temperature=2.0), None),
    (Entropy(0.4, temperature=3.0), None),
    (GateConfidence(0.6), None),
    (GateConfidence(0.6, gate="LinearGate"), None),
    (JEIGate(), None),
    (JEIGate({2: 0.9, 4: 0.6, 6: 0.4}, gate="LinearGate"), None),
    (Patience(2), COUNTS),
    (Voting(2), COUNTS),
    (Saturation(0.7), None),
    (Random(0.5), None),
    (Oracle(), None),
    (PositionSchedule(2, deepest=6, horizon=4), COUNTS),
    (BetaMixture(0.6, policy=MaxProb(0.5), mixtures=MIXTURES), None),
    (BetaMixture(0.6, policy=GateConfidence(0.5), mixtures=MIXTURES), None),
    (Budget(GateConfidence(0.6), 4.0), (1.0, 2.5, 4.0, 5.5, 7.0)),
    (Budget(MaxProb({2: 0.9, 4: 0.6, 6: 0.4}), 4.0, rate=0.5), (1.0, 2.5, 4.0, 5.5, 7.0)),
    (LatencyBudget(GateConfidence(0.6), 4.0), (1.0, 2.5, 4.0, 5.5, 7.0)),
    (AnyOf([GateConfidence(0.9), MaxProb(0.8)]), None),
    (AnyOf([AtDepth(6), MaxProb(0.8)], swept=1), None),
    (AllOf([GateConfidence(0.4), MaxProb(0.5)], swept=1), None),
    (CandidateProb(0.6, likely=4), None),
    (CandidateMargin(0.4, limit=3, recent=1), None),
    (Cascade([GateConfidence(0.4), CandidateProb(0.5), MaxProb(0.4)]), None),
    (Cascade([GateConfidence(0.4), MaxProb(0.5)], swept=0), None),
    (OnlyAt(MaxProb({4: 0.6}), [4]), None),
    (OnlyAt(Patience(2), [2, 6]), COUNTS),
    (Decaying(MaxProb(0.6), temperature=2.0, horizon=8), None),
    (Decaying(Saturation(0.7), temperature=0.0, horizon=1), None),
]


def name(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize(("policy", "thresholds"), POLICIES, ids=name)
def test_contract(policy, thresholds):
    check_policy(policy, **({} if thresholds is None else {"thresholds": thresholds}))


def test_every_policy_is_checked():
    known = [c for _, c in inspect.getmembers(dynamax.policies, inspect.isclass) if not inspect.isabstract(c)]
    assert {c for c in known if issubclass(c, TerminationPolicy)} == {type(policy) for policy, _ in POLICIES}


@pytest.mark.parametrize("policy", [policy for policy, _ in POLICIES if isinstance(policy, ScorePolicy)], ids=name)
def test_each_exit_can_have_a_threshold_of_its_own(policy):
    levels = {2: 0.9, 4: 0.5, 6: 0.2}
    own, left = policy.at(levels), set()
    for seed in range(WORLDS):
        for evidence in _exits(_world(3, seed), (2, 4, 6), "LinearGate"):
            leave_B = own(evidence)
            assert leave_B.equal(policy.score(evidence) >= levels[evidence.depth])
            left |= {(evidence.depth, leave) for leave in leave_B.tolist()}
    assert {True, False} == {leave for _, leave in left}
    own.validate([2, 4, 6])
    with pytest.raises(ValueError, match="the exits are at"):
        own.validate([2, 4])


class Whole(TerminationPolicy):
    def __call__(self, evidence):
        return evidence.confidence().round()


class Forgetful(TerminationPolicy):
    asked = 0

    def __call__(self, evidence):
        self.asked += 1
        return torch.full((len(evidence.hidden),), self.asked % 2 == 0)


class Mixing(TerminationPolicy):
    def __call__(self, evidence):
        return evidence.confidence() >= evidence.confidence().mean()


class Wasteful(ScorePolicy):
    def score(self, evidence):
        return evidence.confidence() + 0 * evidence.probs[:, 0]


class Backwards(ScorePolicy):
    def __call__(self, evidence):
        return self.score(evidence) <= self.threshold

    def score(self, evidence):
        return evidence.confidence()


class Secretive(ScorePolicy):
    gates = ("MambaGate",)

    def score(self, evidence):
        return evidence.confidence("LinearGate")


class Sticky(MaxProb):
    def at(self, threshold):
        self.threshold = threshold
        return self


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Whole(), "wanted one bool a row"),
        (Forgetful(), "keep nothing between calls"),
        (Mixing(), "rows must not mix"),
        (Wasteful(0.5), "do not touch them"),
        (Backwards(0.5), "greater must mean surer"),
        (Secretive(0.5), r"do not name; name them there"),
        (Sticky(0.5), "must return a copy"),
    ],
    ids=name,
)
def test_a_bad_policy_is_told_what_is_wrong(policy, message):
    with pytest.raises(ValueError, match=message):
        check_policy(policy)


@pytest.mark.parametrize(
    ("text", "kind", "threshold"),
    [
        ({"class_path": "Never"}, Never, None),
        ({"class_path": "MaxProb", "init_args": {"threshold": 1}}, MaxProb, 1.0),
        ({"class_path": "MaxProb", "init_args": {"threshold": {"15": 0.9, "19": 0.8}}}, MaxProb, {15: 0.9, 19: 0.8}),
        ({"class_path": "GateConfidence", "init_args": {"threshold": 0.5, "gate": "MambaGate"}}, GateConfidence, 0.5),
        ({"class_path": "CandidateProb", "init_args": {"threshold": 0.5, "limit": 64}}, CandidateProb, 0.5),
        (
            {
                "class_path": "Cascade",
                "init_args": {
                    "policies": [
                        {"class_path": "GateConfidence", "init_args": {"threshold": 0.5, "gate": "LinearGate"}},
                        {"class_path": "CandidateMargin", "init_args": {"threshold": 0.7}},
                    ]
                },
            },
            Cascade,
            0.7,
        ),
        ({"class_path": "Patience", "init_args": {"patience": 3}}, Patience, 3),
        (
            {
                "class_path": "AnyOf",
                "init_args": {
                    "policies": [
                        {"class_path": "AtDepth", "init_args": {"depth": 24}},
                        {
                            "class_path": "Decaying",
                            "init_args": {
                                "policy": {"class_path": "Entropy", "init_args": {"threshold": 0.9}},
                                "temperature": 4,
                                "horizon": 64,
                            },
                        },
                    ],
                    "swept": 1,
                },
            },
            AnyOf,
            0.9,
        ),
    ],
    ids=lambda x: x["class_path"] if isinstance(x, dict) and "class_path" in x else None,
)
def test_policies_are_built_from_configs(text, kind, threshold):
    parser = ArgumentParser()
    parser.add_argument("--policy", type=TerminationPolicy)
    config = parser.parse_object({"policy": text})
    parser.dump(config)
    policy = parser.instantiate(config).policy
    assert type(policy) is kind
    assert policy.threshold == threshold
