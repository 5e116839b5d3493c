"""The contract of exit heads: ours keep it, and it finds what breaks it."""

import pytest
import torch
from torch import nn

from dynamax.errors import UserError
from dynamax.heads import (
    AttentionGate,
    AttentionLens,
    BridgeLens,
    FFNGate,
    Gate,
    LastBlockLens,
    Lens,
    LinearGate,
    LogitLens,
    LowRankLens,
    MambaGate,
    MambaLens,
    MLPGate,
    MLPLens,
    TunedLens,
    UncertaintyGate,
    UntiedLens,
)
from dynamax.heads.base import ExitHead
from dynamax.testing import check_head, check_policy, check_source, toy_evidence


@pytest.mark.parametrize(
    ("head_class", "options"),
    [
        (LogitLens, {}),
        (TunedLens, {}),
        (LowRankLens, {"rank": 4}),
        (MLPLens, {"hidden": 8}),
        (BridgeLens, {"blocks": 2}),
        (AttentionLens, {"width": 16}),
        (AttentionLens, {"width": None, "heads": 2}),
        (MambaLens, {"width": 32, "d_state": 8, "headdim": 16}),
        (MambaLens, {"width": None, "d_conv": 2}),
        (LastBlockLens, {}),
        (UntiedLens, {"eps": 1e-5}),
        (LinearGate, {}),
        (MLPGate, {"hidden": 8}),
        (FFNGate, {}),
        (FFNGate, {"hidden": 8}),
        (MambaGate, {}),
        (MambaGate, {"width": None, "d_conv": 2, "d_state": 16, "expand": 1}),
        (UncertaintyGate, {}),
        (AttentionGate, {}),
        (AttentionGate, {"width": None, "heads": 2}),
    ],
    ids=str,
)
def test_our_heads_keep_the_contract(head_class, options):
    check_head(head_class, **options)


class Faulty(Gate):
    """A gate that is right; each fault below breaks one method of a copy."""

    def __init__(self, site):
        Gate.__init__(self)  # no super(): the constructor is lent to classes that are not below this one
        self.out = nn.Linear(site.spec.width, 1)

    def score(self, evidence, memory=None):
        h_BTD = evidence.hidden
        return self.out(h_BTD.float() if self.out.weight.dtype == torch.float32 else h_BTD)[..., 0]

    def flops(self):
        return 2


def right(self, evidence, memory=None):
    return Faulty.score(self, evidence, memory)


def at(h_BTD):
    """Evidence of other states than those that were given."""
    return toy_evidence(h_BTD, recurrent=True)


def backwards(self, evidence, memory=None):
    return right(self, evidence).flip(1).cumsum(1).flip(1)


def past(self, evidence, memory=None):
    return right(self, evidence).cumsum(1)


def rows(self, evidence, memory=None):
    return right(self, evidence) - right(self, evidence).mean(0)


def overwrite(self, evidence, memory=None):
    return right(self, at(evidence.hidden.mul_(2)))


def narrow(self, evidence, memory=None):
    return right(self, evidence).to(evidence.hidden.dtype)


def wide(self, evidence, memory=None):
    return right(self, evidence)[..., None]


def endless(self, evidence, memory=None):
    return right(self, evidence) / 0


def detached(self, evidence, memory=None):
    return right(self, at(evidence.hidden.detach())).detach() + 0 * self.out.weight.sum()


def unmasked(self, evidence, memory=None):
    s_BT = right(self, evidence).cumsum(1)
    if memory is not None:
        s_BT = s_BT + memory.values.get("sum", 0)
        memory.values = {"sum": s_BT[:, -1:]}
    return s_BT


def remembering(self, evidence, memory=None):
    return right(self, evidence) if memory is None else unmasked(self, evidence, memory)


def untold(self, evidence, memory=None):
    return unmasked(self, evidence, memory)


def in_place(self, evidence, memory=None):
    s_BT = right(self, evidence).cumsum(1)
    if memory is not None:
        held = memory.values.setdefault("sum", torch.zeros_like(s_BT[:, :1]))
        s_BT = s_BT + held
        held.copy_(s_BT[:, -1:])
    return s_BT


def hidden_state(self, evidence, memory=None):
    return right(self, evidence) + self.offset


@pytest.mark.parametrize(
    ("score", "recurrent", "message"),
    [
        (backwards, False, "must be causal"),
        (past, False, "says recurrent = False, .* depends on earlier ones; set recurrent = True"),
        (unmasked, False, "says recurrent = False, .* depends on earlier ones; set recurrent = True"),
        (remembering, False, r"chunks of \(9,\); set recurrent = True"),
        (past, True, "carry over everything it needs in memory.values"),
        (rows, False, "rows must not mix"),
        (overwrite, False, "wrote into its input"),
        (narrow, False, "wanted .*float32"),
        (wide, False, "wanted"),
        (endless, False, "not finite"),
        (detached, False, "no gradient"),
        (unmasked, True, r"mask by memory.live\(T\)"),
        (in_place, True, "replace them"),
        (untold, True, "keeps 1 values after 3 positions, but states 0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_found_and_named(score, recurrent, message):
    check_head(Faulty)
    broken = type("Broken", (Gate,), {"__init__": Faulty.__init__, "flops": Faulty.flops, "score": score})
    broken.recurrent = recurrent
    broken.state = 1 if score is unmasked else 0
    with pytest.raises(ValueError, match=f"Broken .*{message}"):
        check_head(broken)


@pytest.mark.parametrize("flops", [0, -1, 2.0, True])
def test_flops_are_a_positive_whole_number(flops):
    members = {"__init__": Faulty.__init__, "flops": lambda self: flops, "score": Faulty.score}
    with pytest.raises(ValueError, match="not a whole number from 1 on"):
        check_head(type("Costless", (Gate,), members))


def test_state_outside_the_parameters_is_lost_and_found_out():
    def start(self, site):
        Faulty.__init__(self, site)
        self.offset = torch.rand(())

    members = {"__init__": start, "flops": Faulty.flops, "score": hidden_state}
    with pytest.raises(ValueError, match="saved and loaded; keep its state in parameters or buffers"):
        check_head(type("Forgetful", (Gate,), members))


def test_a_lens_of_the_wrong_size_is_found():
    members = {"__init__": lambda self, site: Lens.__init__(self), "flops": lambda self: 0}
    members["translate"] = lambda self, h_BTD, site: site.normalize(h_BTD)[..., :3]
    with pytest.raises(ValueError, match="wanted"):
        check_head(type("Short", (Lens,), members))


@pytest.mark.parametrize("given", [type("Stray", (ExitHead,), {}), "LinearGate", LinearGate, 3], ids=str)
@pytest.mark.parametrize("check", [check_head, check_policy, check_source])
def test_what_a_check_is_not_for_is_refused(check, given):
    if (check, given) != (check_head, LinearGate):
        with pytest.raises(UserError, match=rf"{check.__name__} was given .*; wanted: "):
            check(given)


class Trusting(Gate):
    """Sure where the lens is, and where it says what the exit before said: reads logits and the trail."""

    def __init__(self, site):
        super().__init__()
        self.out = nn.Linear(2, 1)

    def score(self, evidence, memory=None):
        most = evidence.probs.amax(-1)
        same = (evidence.token == evidence.trail[-1].token).to(most.dtype) if evidence.trail else torch.zeros_like(most)
        return self.out(torch.stack([most, same], -1).to(self.out.weight.dtype))[..., 0]

    def flops(self):
        return 4


def test_a_gate_may_read_the_lens_and_the_trail():
    check_head(Trusting)
