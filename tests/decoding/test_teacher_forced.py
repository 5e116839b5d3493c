"""A text plays a policy along a text; decoding step by step along the same text is the reference."""

from __future__ import annotations

import pytest
import torch

from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.errors import UserError
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.gates import AttentionGate, LinearGate, MambaGate, UncertaintyGate
from dynamax.heads.lenses import TunedLens
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.bounds import Oracle, Random
from dynamax.policies.budget import Budget
from dynamax.policies.combine import AnyOf, OnlyAt
from dynamax.policies.confidence import Entropy, GateConfidence, Margin, MaxProb, Patience, Saturation, Voting
from dynamax.policies.joint import JEIGate
from dynamax.policies.mixture import BetaMixture, BetaPair
from dynamax.policies.schedule import AtDepth, Decaying, Never, PositionSchedule
from tests.float64 import upcast64
from tests.laws.house import fresh_pair as pair
from tests.laws.house import loud, prompt

POLICIES: list[TerminationPolicy] = [
    Never(),
    AtDepth(3),
    MaxProb(0.2),
    Margin(0.05),
    Entropy(0.3, temperature=0.5),
    Patience(2),
    Voting(2),
    Random(0.6),
    PositionSchedule(2, deepest=6, horizon=15),
    BetaMixture(0.5, policy=MaxProb(1.0), mixtures=dict.fromkeys((2, 3, 5), BetaPair((3.0, 2.0), (2.0, 6.0), 0.5))),
    Saturation(0.8),
    GateConfidence(0.5, gate="MambaGate"),
    GateConfidence(0.5, gate="AttentionGate"),
    GateConfidence(0.5, gate="LinearGate"),
    GateConfidence(0.5, gate="UncertaintyGate"),
    JEIGate(0.5, gate="LinearGate"),
    JEIGate(0.5, gate="UncertaintyGate"),
    Decaying(MaxProb(0.2), temperature=4.0, horizon=20),
    AnyOf([MaxProb(0.3), GateConfidence(0.6, gate="LinearGate")]),
    OnlyAt(Patience(2), [2, 3]),
    OnlyAt(Saturation(0.8), [3, 5]),
    OnlyAt(GateConfidence(0.5, gate="MambaGate"), [3]),
    OnlyAt(JEIGate(0.5, gate="MambaGate"), [2, 5]),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.label)
def test_a_policy_along_a_text_is_decoding_along_it(policy: TerminationPolicy) -> None:
    with upcast64():
        _, backbone = pair("llama")
        exit_ = Exit(lens=TunedLens, gates=[LinearGate, MambaGate, AttentionGate, UncertaintyGate])
        bank = loud(ExitBank({2: exit_, 3: exit_, 5: exit_}, backbone.site).double().requires_grad_(False))
        start_BT, target_BT = prompt(7), prompt(20, seed=4)
        text = TeacherForcedPass(backbone, bank, torch.cat([start_BT, target_BT[:, :-1]], 1), start=6)
        played = text.apply_policy(policy)
        steps = list(EarlyExit(backbone, bank, policy).decode(start_BT, max_new_tokens=20, forced_BT=target_BT))
        assert played.depth_T.tolist() == [step.depth for step in steps]
        wanted = torch.cat([step.logits_BV for step in steps])
        torch.testing.assert_close(played.logits_TV, wanted, rtol=0, atol=1e-10)


def test_the_oracle_leaves_at_the_first_exit_that_is_right() -> None:
    with upcast64():
        model, backbone = pair("llama")
        bank = loud(ExitBank(dict.fromkeys((2, 3, 5), Exit()), backbone.site).double())
        tokens_1T = prompt(60)
        text = TeacherForcedPass(backbone, bank, tokens_1T)
        top_T = model(tokens_1T).logits[0].argmax(-1)
        right_ET = torch.stack([evidence.logits.argmax(-1) == top_T for evidence in text.exits])
        wanted = [next((d for d, right in zip((2, 3, 5), at, strict=True) if right), 6) for at in right_ET.T]
        played = text.apply_policy(Oracle())
        assert played.depth_T.tolist() == [6, *wanted[1:]]
        assert played.logits_TV.argmax(-1).equal(top_T)
        assert {2, 6} < set(wanted)
        path = text.apply_policy(OnlyAt(Oracle(), [3]))
        assert path.depth_T[1:].tolist() == [3 if right else 6 for right in right_ET[1, 1:]]


@pytest.mark.parametrize("policy", [Oracle(), AnyOf([AtDepth(3), OnlyAt(Oracle(), [3])])], ids=lambda each: each.label)
def test_no_decoder_takes_an_oracle(policy: TerminationPolicy) -> None:
    _, backbone = pair("llama")
    bank = ExitBank({3: Exit()}, backbone.site).double()
    for kind in (EarlyExit, SelfSpeculative):
        with pytest.raises(UserError, match="needs the full model's tokens, which nobody knows while decoding"):
            next(kind(backbone, bank, policy).decode(prompt(6), max_new_tokens=3))


def test_a_budget_is_refused_along_a_text() -> None:
    _, backbone = pair("llama")
    bank = ExitBank({3: Exit()}, backbone.site).double()
    policy = Budget(MaxProb(0.5), 4)
    assert not EarlyExit(backbone, bank, policy).teacher_forced
    with pytest.raises(UserError, match="known only while decoding"):
        TeacherForcedPass(backbone, bank, prompt(6)).apply_policy(policy)


def test_a_text_longer_than_the_context_is_refused() -> None:
    _, backbone = pair("llama")
    length = backbone.spec.context + 1
    with pytest.raises(ValueError, match=f"{length} tokens .* holds {length - 1}. Lower the task's window"):
        TeacherForcedPass(backbone, ExitBank({2: Exit()}, backbone.site).double(), prompt(length), start=6)


def test_nothing_texted_is_nothing_played() -> None:
    _, backbone = pair("llama")
    text = TeacherForcedPass(backbone, ExitBank({2: Exit()}, backbone.site).double(), prompt(6), start=6)
    assert len(text.apply_policy(MaxProb(0.2)).depth_T) == 0


def test_the_policies_above_do_leave() -> None:
    with upcast64():
        _, backbone = pair("llama")
        exit_ = Exit(lens=TunedLens, gates=[LinearGate, MambaGate, AttentionGate, UncertaintyGate])
        bank = loud(ExitBank({2: exit_, 3: exit_, 5: exit_}, backbone.site).double().requires_grad_(False))
        text = TeacherForcedPass(backbone, bank, prompt(40), start=6)
        for policy in POLICIES[1:]:
            depths = set(text.apply_policy(policy).depth_T[1:].tolist())
            assert depths != {6}, policy.label


@pytest.mark.parametrize(
    ("tokens", "start", "told"),
    [
        (torch.ones(2, 5, dtype=torch.long), 0, "one row"),
        (torch.ones(1, 5, dtype=torch.long), 6, "read from position 6"),
        (torch.ones(1, 5, dtype=torch.long), -1, "read from position -1"),
        (torch.ones(5, dtype=torch.long), 0, "token ids, int64"),
        (torch.ones(1, 5), 0, "token ids, int64"),
        (torch.full((1, 5), 10_000), 0, "vocabulary is 0 to"),
        (torch.ones(1, 5, dtype=torch.long) * -1, 0, "has the token -1"),
        (torch.ones(1, 0, dtype=torch.long), 0, "at least one token"),
    ],
)
def test_what_is_no_text_is_refused(tokens: torch.Tensor, start: int, told: str) -> None:
    _, backbone = pair("llama")
    with pytest.raises(UserError, match=told):
        TeacherForcedPass(backbone, None, tokens, start=start)
