"""Lenses that remember the positions before: read off a known text, decoded, in batches, rolled back, and charged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynamax.decoding.cost import CostModel
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.errors import UserError
from dynamax.heads import AttentionLens, Exit, ExitBank, Gate, Lens, LinearGate, MambaLens
from dynamax.policies import AtDepth, GateConfidence, MaxProb, TerminationPolicy
from dynamax.types import Evidence, Memory, Site
from tests.float64 import upcast64
from tests.laws.house import loud, pair, prompt
from tests.laws.test_laws_batching import check_same

LENSES = [AttentionLens, MambaLens]


class Wandering(TerminationPolicy):
    """Leaves by a hash of the exit's logits: any error in the lens' memory changes where."""

    gates = ()

    def __call__(self, evidence: Evidence) -> Tensor:
        return (evidence.logits.sum(-1) * 100).sin() > 0.2


class Noting(Wandering):
    """Notes the text that was read, the depth, and the exit's logits."""

    def __init__(self) -> None:
        self.noted: list[tuple[list[int], int, Tensor]] = []

    def __call__(self, evidence: Evidence) -> Tensor:
        assert evidence.past is not None
        self.noted.append((list(evidence.past.texts[0]), evidence.depth, evidence.logits[0].clone()))
        return super().__call__(evidence)


def bank_of(backbone: object, lens: type[Lens], *gates: type[Gate]) -> ExitBank:
    exits = dict.fromkeys((2, 3, 5), Exit(lens, list(gates)))
    torch.manual_seed(1)  # of the heads' weights
    return loud(ExitBank(exits, backbone.site).double().requires_grad_(False))  # type: ignore[attr-defined]


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("family", ["llama", "mamba2"])
@pytest.mark.parametrize(
    "policy", [MaxProb(0.1), AtDepth(3), GateConfidence(0.5), Wandering()], ids=lambda each: each.label
)
def test_decoding_reads_what_one_pass_reads(family: str, lens: type[Lens], policy: TerminationPolicy) -> None:
    with upcast64():
        _, backbone = pair(family)
        bank = bank_of(backbone, lens, LinearGate)
        start_BT, target_BT = prompt(7), prompt(20, seed=4)
        text = TeacherForcedPass(backbone, bank, torch.cat([start_BT, target_BT[:, :-1]], 1), start=6)
        played = text.apply_policy(policy)
        steps = list(EarlyExit(backbone, bank, policy).decode(start_BT, max_new_tokens=20, forced_BT=target_BT))
        assert played.depth_T.tolist() == [step.depth for step in steps]
        assert len(set(played.depth_T.tolist())) > 1, "the case never leaves"
        wanted = torch.cat([step.logits_BV for step in steps])
        torch.testing.assert_close(played.logits_TV, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("policy", [Wandering(), GateConfidence(0.5)], ids=lambda each: each.label)
def test_rows_of_a_batch_say_what_they_say_alone(lens: type[Lens], policy: TerminationPolicy) -> None:
    with upcast64():
        _, backbone = pair("llama")
        bank = bank_of(backbone, lens, LinearGate)
        assert len(check_same(EarlyExit(backbone, bank, policy))) > 2


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_drafts_that_are_taken_back_leave_no_trace(family: str, lens: type[Lens]) -> None:
    """After a rollback an exit says what it says in one pass over the text that was kept."""
    with upcast64():
        _, backbone = pair(family)
        bank, policy, start_BT = bank_of(backbone, lens), Noting(), prompt(7)
        for depth in bank.depths:  # close to the logit lens, or no draft would ever be kept
            bank.lens(depth).leave.weight.mul_(0.1)
            bank.lens(depth).leave.bias.zero_()
        steps = list(SelfSpeculative(backbone, bank, policy).decode(start_BT, max_new_tokens=24))
        plain = list(Full(backbone).decode(start_BT, max_new_tokens=24))
        said = [int(step.token_B) for step in steps]
        assert said == [int(step.token_B) for step in plain]
        whole = [*start_BT[0].tolist(), *said]
        read = TeacherForcedPass(backbone, bank, torch.tensor([whole]))
        kept = [(text, depth, logits_V) for text, depth, logits_V in policy.noted if text == whole[: len(text)]]
        assert len(kept) < len(policy.noted), "no draft is taken back"
        assert any(step.accepted for step in steps), "no draft is kept"
        for text, depth, logits_V in kept:
            (evidence,) = [each for each in read.exits if each.depth == depth]
            torch.testing.assert_close(logits_V, evidence.logits[len(text) - 1], rtol=0, atol=1e-9)


def test_a_lens_that_remembers_is_charged_whether_or_not_it_is_asked() -> None:
    with upcast64():
        _, backbone = pair("llama")
        bank, costs = bank_of(backbone, AttentionLens, LinearGate), CostModel(backbone)
        charged = CostModel(backbone, bank)
        steps = list(EarlyExit(backbone, bank, GateConfidence(1.0)).decode(prompt(7), max_new_tokens=2))
        assert steps[1].depth == 6
        heads = [bank.lens(depth) for depth in bank.depths]
        gates = sum(bank.gates(depth)["LinearGate"].flops() for depth in bank.depths)
        keys = sum(2 * lens.keys * 7 for lens in heads)
        spent = charged.step(steps[1], 7).flops - costs.full(7).flops
        assert spent == sum(lens.flops() for lens in heads) + keys + gates


def test_a_lens_that_remembers_needs_its_method_and_serves_no_recurrent_gate() -> None:
    class Forgetful(Lens):
        recurrent = True

        def __init__(self, site: Site) -> None:
            super().__init__()

        def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
            return site.normalize(h_BTD)

    class Asks(Gate):
        recurrent = True

        def __init__(self, site: Site) -> None:
            super().__init__()

        def score(self, evidence: Evidence, memory: Memory | None = None) -> Tensor:
            return evidence.logits.amax(-1)

        def flops(self) -> int:
            return 1

    with upcast64():
        _, backbone = pair("llama")
        decoder = EarlyExit(backbone, ExitBank({2: Exit(Forgetful)}, backbone.site), MaxProb(0.5))
        with pytest.raises(
            NotImplementedError, match="Forgetful says recurrent = True, so it needs a method continued"
        ):
            list(decoder.decode(prompt(4), max_new_tokens=2))
        bank = ExitBank({2: Exit(AttentionLens, [Asks])}, backbone.site)
        with pytest.raises(UserError, match="asked for the logits of AttentionLens, which depend on earlier positions"):
            list(EarlyExit(backbone, bank, GateConfidence(0.5)).decode(prompt(4), max_new_tokens=2))
