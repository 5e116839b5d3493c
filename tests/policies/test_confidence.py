from __future__ import annotations

import math

import pytest
import torch

from dynamax.policies import Entropy, GateConfidence, Margin, MaxProb
from tests.policies.evidence import evidence

PROBS_BV = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (MaxProb(0.5), [0.7, 0.25, 1.0]),
        (Margin(0.5), [0.5, 0.0, 1.0]),
        (Entropy(0.5), [1 + (0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(4), 0.0, 1.0]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_scores_by_hand(policy, expected):
    score_B = policy.score(evidence(PROBS_BV.log()))
    torch.testing.assert_close(score_B, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_leaves_at_the_threshold_itself():
    even = evidence(torch.zeros(1, 4))
    assert MaxProb(0.25)(even).tolist() == [True]
    assert MaxProb(math.nextafter(0.25, 1))(even).tolist() == [True]  # rounded to float32, it is 0.25
    assert MaxProb(0.2500001)(even).tolist() == [False]


def test_threshold_by_depth():
    policy = MaxProb({4: 0.9, 8: 0.5})
    logits_BV = PROBS_BV[:1].log()
    assert policy(evidence(logits_BV, depth=4)).tolist() == [False]
    assert policy(evidence(logits_BV, depth=8)).tolist() == [True]
    assert policy.at(0.1)(evidence(logits_BV, depth=4)).tolist() == [True]
    policy.validate([4, 8])
    with pytest.raises(ValueError, match=r"depths \[4, 8\], but the exits are at \[4, 8, 10\]"):
        policy.validate([4, 8, 10])
    with pytest.raises(ValueError, match="Give each exit one threshold"):
        policy(evidence(logits_BV, depth=10))


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), {4: 0.5, 8: 2.0}])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        MaxProb(threshold)


def test_at_leaves_the_original_alone():
    policy = MaxProb(0.3)
    assert policy.at(0.8).threshold == 0.8
    assert policy.threshold == 0.3
    with pytest.raises(ValueError, match=r"MaxProb was given threshold 3"):
        policy.at(3)


def test_a_gate_is_read_without_the_logits():
    gates = {"LinearGate": torch.tensor([0.2, 0.8, 0.5])}
    seen = evidence(PROBS_BV.log(), gates=gates)
    assert GateConfidence(0.5)(seen).tolist() == [False, True, True]
    assert not seen.logits_read
    assert seen.gates_read == ("LinearGate",)


def test_a_gate_is_named_where_there_are_several():
    gates = {"LinearGate": torch.tensor([0.2]), "MambaGate": torch.tensor([0.8])}
    seen = evidence(PROBS_BV[:1].log(), gates=gates)
    assert GateConfidence(0.5, gate="MambaGate")(seen).tolist() == [True]
    with pytest.raises(ValueError, match="LinearGate, MambaGate"):
        GateConfidence(0.5)(seen)
    with pytest.raises(ValueError, match="FFNGate"):
        GateConfidence(0.5, gate="FFNGate")(seen)


@pytest.mark.parametrize(("temperature", "power"), [(0.5, 2.0), (2.0, 0.5)])
def test_a_temperature_is_a_power_of_the_probabilities(temperature, power):
    p_BV = PROBS_BV**power / (PROBS_BV**power).sum(-1, keepdim=True)
    best_B2 = p_BV.topk(2).values
    expected = {
        MaxProb: best_B2[:, 0],
        Margin: best_B2[:, 0] - best_B2[:, 1],
        Entropy: 1 - torch.distributions.Categorical(p_BV).entropy() / math.log(4),
    }
    for kind, wanted_B in expected.items():
        policy = kind(0.5, temperature=temperature)
        torch.testing.assert_close(policy.score(evidence(PROBS_BV.log())), wanted_B, atol=1e-5, rtol=1e-5)
        assert policy.at(0.7).label == f"{kind.__name__}(temperature {temperature:g})", "figures can be told apart"
        assert kind(0.5).label == kind.__name__
    with pytest.raises(ValueError, match="must be greater than 0"):
        Entropy(0.5, temperature=0.0)
