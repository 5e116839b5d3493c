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
    CandidateMargin,
    CandidateProb,
    Cascade,
    Decaying,
    Entropy,
    GateConfidence,
    JEIGate,
    Margin,
    MaxProb,
    Never,
    OnlyAt,
    Patience,
    Saturation,
    ScorePolicy,
    TerminationPolicy,
)
from dynamax.testing import check_policy

COUNTS = (1, 2, 3, 4, 5, 6)
POLICIES = [
    (Never(), ()),
    (AtDepth(4), COUNTS),
    (MaxProb(0.6), None),
    (MaxProb({2: 0.9, 4: 0.6, 6: 0.4}), None),
    (Margin(0.4), None),
    (Entropy(0.4), None),
    (GateConfidence(0.6), None),
    (GateConfidence(0.6, gate="LinearGate"), None),
    (JEIGate(), None),
    (JEIGate({2: 0.9, 4: 0.6, 6: 0.4}, gate="LinearGate"), None),
    (Patience(2), COUNTS),
    (Saturation(0.7), None),
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
    ours = {c for _, c in inspect.getmembers(dynamax.policies, inspect.isclass) if not inspect.isabstract(c)}
    assert ours == {type(policy) for policy, _ in POLICIES}


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
