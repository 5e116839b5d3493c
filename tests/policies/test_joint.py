from __future__ import annotations

import pytest
import torch

from dynamax.policies import GateConfidence, JEIGate, OnlyAt
from tests.policies.evidence import evidence


def exits(*confidences, gate="UncertaintyGate"):
    """Evidence of exits whose gates have these confidences, a list a row."""
    seen = []
    for index, p_B in enumerate(confidences):
        gates = {gate: torch.tensor(p_B, dtype=torch.float64)}
        seen.append(evidence(torch.zeros(len(p_B), 4), depth=2 * index + 2, gates=gates, trail=list(seen)))
    return seen


def test_the_chance_to_leave_by_hand():
    # 0.3 leave at the first; of the 0.7 that come to the second 0.4 leave; the third gets what remains of 1
    seen = exits([0.3, 0.0], [0.4, 0.5], [0.9, 0.5])
    scores = torch.stack([JEIGate().score(each) for each in seen])
    torch.testing.assert_close(scores, torch.tensor([[0.3, 0.0], [4 / 7, 0.5], [1.0, 1.0]], dtype=torch.float64))


def test_it_leaves_where_the_exits_before_were_nearly_sure():
    first, second = exits([0.45], [0.4])
    assert JEIGate()(first).tolist() == [False]
    assert JEIGate()(second).tolist() == [True]  # 0.4 of 0.55
    assert GateConfidence(0.5)(second).tolist() == [False]


def test_no_logits_are_read_but_the_gates_own():
    first, second = exits([0.2], [0.4])
    JEIGate()(second)
    assert not first.logits_read
    assert not second.logits_read
    assert first.gates_read == second.gates_read == ("UncertaintyGate",)


def test_it_asks_the_gate_that_it_names():
    (only,) = exits([0.7], gate="LinearGate")
    assert JEIGate(gate="LinearGate")(only).tolist() == [True]
    with pytest.raises(ValueError, match="its gates that the policy may ask are: LinearGate"):
        JEIGate(gate="UncertaintyGate")(only)


def test_it_goes_by_the_gates_that_were_asked():
    policy = OnlyAt(JEIGate(), [4])
    (alone,) = exits([0.4])
    alone.depth = 4
    assert policy(alone).tolist() == [False]
