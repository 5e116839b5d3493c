from __future__ import annotations

import pytest
import torch

from dynamax.policies import AllOf, AnyOf, AtDepth, Cascade, Decaying, GateConfidence, MaxProb, Never, OnlyAt, Patience
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


def test_only_at_its_depths_is_a_policy_asked():
    policy = OnlyAt(MaxProb(0.8), [4])
    here, elsewhere = evidence(LOGITS_BV, depth=4), evidence(LOGITS_BV, depth=6)
    assert policy(here).tolist() == [False, True, True]
    assert policy(elsewhere).tolist() == [False, False, False]
    assert (here.logits_read, elsewhere.logits_read) == (True, False)
    assert policy.at(0.5)(evidence(LOGITS_BV, depth=4)).tolist() == [True, True, True]
    assert policy.at(0.5).depths == (4,)
    assert policy.label == "OnlyAt(MaxProb, 4)"


def test_policies_of_policies_ask_where_one_of_them_does():
    first, second = OnlyAt(MaxProb(0.8), [4]), OnlyAt(GateConfidence(0.5), [8, 2, 8])
    assert AnyOf([first, second]).depths == {2, 4, 8}
    assert AnyOf([first, MaxProb(0.5)]).depths is None
    assert OnlyAt(Cascade([first, second]), [4]).depths == (4,)
    assert Decaying(MaxProb(0.5), temperature=1.0, horizon=4).depths is None


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (OnlyAt(MaxProb(0.5), [4, 5]), r"depths \[4, 5\], but the exits are at \[2, 4\]"),
        (OnlyAt(MaxProb({2: 0.5, 4: 0.5}), [4]), r"for the depths \[2, 4\], but the exits are at \[4\]"),
        (OnlyAt(AtDepth(2), [4]), "AtDepth was given depth 2"),
    ],
)
def test_depths_that_do_not_fit_are_refused(policy, message):
    OnlyAt(MaxProb({4: 0.5}), [4]).validate([2, 4])
    with pytest.raises(ValueError, match=message):
        policy.validate([2, 4])


def test_no_depths_are_refused():
    with pytest.raises(ValueError, match="was given no depths"):
        OnlyAt(MaxProb(0.5), [])
