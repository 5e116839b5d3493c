"""A policy that asks some exits: the others are not read, by count; what is said is what a bank without them says."""

from __future__ import annotations

import pytest
import torch

from dynamax.backbones.hf import HFBackbone
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.probe import Probe
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.gates import LinearGate, MambaGate
from dynamax.heads.lenses import TunedLens
from dynamax.policies import AnyOf, Cascade, GateConfidence, MaxProb, OnlyAt, Patience, TerminationPolicy
from dynamax.testing import stir
from tests.tiny import tiny

PROMPT_1T = torch.tensor([[5, 9, 5, 2, 40, 9]])


class Stops(Probe):
    """Where the walk stopped."""

    def __init__(self) -> None:
        self.depths: list[int] = []

    def mark(self, depth: int) -> None:
        self.depths.append(depth)


def banks() -> tuple[HFBackbone, ExitBank, ExitBank]:
    """A backbone, a bank of three exits, and one that holds the middle one alone."""
    backbone = HFBackbone(tiny("llama", dtype=torch.float64))
    exit_ = Exit(TunedLens, [LinearGate, MambaGate])
    whole = ExitBank({2: exit_, 3: exit_, 5: exit_}, backbone.site).double()
    stir(whole)
    middle = ExitBank({3: exit_}, backbone.site).double()
    middle.load_state_dict({n: t for n, t in whole.state_dict().items() if n.startswith("exits.3.")})
    return backbone, whole, middle


POLICIES: list[TerminationPolicy] = [
    MaxProb(0.05),
    Patience(1),
    GateConfidence(0.5, gate="LinearGate"),
    GateConfidence(0.5, gate="MambaGate"),
    Cascade([GateConfidence(0.4, gate="LinearGate"), MaxProb(0.05)]),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.label)
@pytest.mark.parametrize("kind", [EarlyExit, SelfSpeculative])
def test_other_exits_are_as_if_they_were_not_there(kind: type, policy: TerminationPolicy) -> None:
    backbone, whole, middle = banks()
    steps = list(kind(backbone, whole, OnlyAt(policy, [3])).decode(PROMPT_1T, max_new_tokens=12))
    wanted = list(kind(backbone, middle, policy).decode(PROMPT_1T, max_new_tokens=12))
    assert steps[0].work == wanted[0].work
    for step, other in zip(steps, wanted, strict=True):
        assert step.logits_BV.equal(other.logits_BV)
        assert (step.depth, step.work, step.logits_read, step.gates_read) == (
            other.depth,
            other.work,
            other.logits_read,
            other.gates_read,
        )


def test_neither_gates_nor_logits_of_other_exits_are_read_and_the_walk_does_not_stop_there() -> None:
    backbone, whole, _ = banks()
    policy = AnyOf([OnlyAt(GateConfidence(1.0, gate="MambaGate"), [5]), OnlyAt(MaxProb(0.9), [3])])
    decoder, stops = EarlyExit(backbone, whole, policy), Stops()
    steps = list(decoder.decode(PROMPT_1T, max_new_tokens=5, probe=stops))[1:]
    assert decoder.exits is not None
    assert decoder.exits.depths == decoder.exits.recurrent_depths == (3, 5)
    assert stops.depths == [3, 5] * 4
    for step in steps:
        assert step.logits_read == ((3, 1), (6, 1))
        assert step.gates_read == ((5, "MambaGate"),)


def test_a_depth_without_an_exit_is_refused() -> None:
    backbone, whole, _ = banks()
    with pytest.raises(ValueError, match=r"depths \[4\], but the exits are at \[2, 3, 5\]"):
        EarlyExit(backbone, whole, OnlyAt(MaxProb(0.5), [4]))
