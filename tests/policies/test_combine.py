from __future__ import annotations

import pytest
import torch

from dynamax.policies import AllOf, AnyOf, AtDepth, Cascade, GateConfidence, MaxProb, Never, Patience
from tests.policies.evidence import evidence

LOGITS_BV = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.9, 0.1]]).log()
GATES = {"LinearGate": torch.tensor([0.9, 0.9, 0.1])}


def test_any_and_all_by_row():
    policies = [GateConfidence(0.5), MaxProb(0.8)]
    assert AnyOf(policies)(evidence(LOGITS_BV, gates=GATES)).tolist() == [True, True, True]
    assert AllOf(policies)(evidence(LOGITS_BV, gates=GATES)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("policy", "reads"),
    [
        (AnyOf([GateConfidence(0.1), MaxProb(0.8)]), False),
        (AnyOf([GateConfidence(0.5), MaxProb(0.8)]), True),
        (AllOf([GateConfidence(0.95), MaxProb(0.8)]), False),
        (AllOf([GateConfidence(0.5), MaxProb(0.8)]), True),
    ],
)
def test_the_dear_one_is_asked_only_while_rows_are_open(policy, reads):
    seen = evidence(LOGITS_BV, gates=GATES)
    policy(seen)
    assert seen.logits_read is reads


def test_a_sweep_turns_one_of_them():
    policy = AnyOf([AtDepth(8), MaxProb(0.8)], swept=1)
    assert policy.threshold == 0.8
    swept = policy.at(0.5)
    assert swept(evidence(LOGITS_BV)).tolist() == [True, True, True]
    assert policy(evidence(LOGITS_BV)).tolist() == [False, True, True]
    assert AnyOf([AtDepth(8), MaxProb(0.8)]).at(4)(evidence(LOGITS_BV)).tolist() == [True, True, True]
    with pytest.raises(ValueError, match="Never has no threshold"):
        AllOf([Never(), MaxProb(0.5)]).at(0.5)


def test_nested_policies_are_validated():
    policy = AllOf([Patience(2), AnyOf([AtDepth(5), MaxProb(0.5)])])
    policy.validate([3, 5])
    with pytest.raises(ValueError, match="AtDepth was given depth 5"):
        policy.validate([3, 6])


@pytest.mark.parametrize(("policies", "swept"), [([], 0), ([Never()], 1), ([Never()], -1)])
def test_an_empty_list_or_a_wrong_position_is_refused(policies, swept):
    with pytest.raises(ValueError, match="at least one policy"):
        AnyOf(policies, swept=swept)


def test_a_cascade_asks_in_turn_and_sweeps_the_last():
    policy = Cascade([GateConfidence(0.5), MaxProb(0.8)])
    assert policy(evidence(LOGITS_BV, gates=GATES)).tolist() == [False, True, False]
    assert policy.at(0.5)(evidence(LOGITS_BV, gates=GATES)).tolist() == [True, True, False]
    seen = evidence(LOGITS_BV, gates=GATES)
    Cascade([GateConfidence(0.95), Never(), MaxProb(0.0)])(seen)
    assert not seen.logits_read
    with pytest.raises(ValueError, match="at least two"):
        Cascade([MaxProb(0.5)])
