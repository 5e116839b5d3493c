"""An exit at the top: no block is skipped there, but the output matrix may be."""

from __future__ import annotations

import pytest
import torch

from dynamax.backbones.hf import HFBackbone
from dynamax.decoding.batching import Scheduler
from dynamax.decoding.cost import CostModel
from dynamax.decoding.drafting import Speculative
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.errors import UserError
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.gates import LinearGate
from dynamax.heads.lenses import TunedLens
from dynamax.policies import AnyOf, CandidateProb, GateConfidence, MaxProb, Never, OnlyAt, TerminationPolicy
from dynamax.testing import stir
from tests.tiny import tiny

PROMPT_1T = torch.tensor([[5, 9, 5, 2, 40, 9]])
TOKENS = 12


def model(family: str = "llama") -> tuple[HFBackbone, ExitBank]:
    backbone = HFBackbone(tiny(family, dtype=torch.float64))
    bank = ExitBank({2: Exit(TunedLens), backbone.spec.depth: Exit()}, backbone.site).double()
    stir(bank)
    return backbone, bank


def some(threshold: float, backbone: HFBackbone) -> TerminationPolicy:
    return OnlyAt(CandidateProb(threshold, frequent=20), [backbone.spec.depth])


@pytest.mark.parametrize("policy", [Never(), MaxProb(1.0), MaxProb(0.0), CandidateProb(1.0, frequent=5)])
def test_leaving_there_with_all_logits_or_never_is_full_decoding(policy: TerminationPolicy) -> None:
    backbone, bank = model()
    policy = OnlyAt(policy, [backbone.spec.depth])
    full = list(Full(backbone).decode(PROMPT_1T, max_new_tokens=TOKENS))
    steps = list(EarlyExit(backbone, bank, policy).decode(PROMPT_1T, max_new_tokens=TOKENS))
    for step, wanted in zip(steps, full, strict=True):
        torch.testing.assert_close(step.logits_BV, wanted.logits_BV, rtol=1e-12, atol=1e-12)
        assert step.work == wanted.work
        assert step.logits_read == wanted.logits_read == ((backbone.spec.depth, 1),)


@pytest.mark.parametrize("family", ["llama", "mamba2", "granitemoehybrid"])
def test_the_best_candidate_is_said_and_the_matrix_is_not_read(family: str) -> None:
    backbone, bank = model(family)
    total, costs = backbone.spec.depth, CostModel(backbone, bank)
    steps = list(EarlyExit(backbone, bank, some(0.0, backbone)).decode(PROMPT_1T, max_new_tokens=TOKENS))
    text_1T = torch.cat([PROMPT_1T, torch.stack([step.token_B for step in steps], 1)], 1)
    logits_TV = backbone.reference(text_1T)[0, PROMPT_1T.shape[1] - 1 : -1].double()
    full = list(Full(backbone).decode(PROMPT_1T, max_new_tokens=2))[1]
    for step, logits_V in zip(steps[1:], logits_TV[1:], strict=True):
        known_C = step.logits_BV[0].isfinite().nonzero()[:, 0]
        assert set(range(20)) <= set(known_C.tolist())
        torch.testing.assert_close(step.logits_BV[0, known_C], logits_V[known_C], rtol=1e-4, atol=1e-5)
        assert int(step.token_B) == int(known_C[logits_V[known_C].argmax()])
        assert step.logits_read == ()
        assert step.rows_read == ((total, len(known_C)),)
        assert step.work.calls == (1,) * total
    saved = costs.step(full, 9).flops - costs.step(steps[1], 9).flops
    assert saved == 2 * backbone.spec.width * (backbone.spec.vocab - steps[1].rows_read[0][1])


def test_one_pass_over_a_text_reads_the_top_as_an_exit() -> None:
    backbone, bank = model()
    text_1T = torch.randint(3, 60, (1, 18), generator=torch.Generator().manual_seed(2))
    known, total = TeacherForcedPass(backbone, bank, text_1T, start=5), backbone.spec.depth
    top_TV = backbone.reference(text_1T)[0, 5:]
    torch.testing.assert_close(known.logits_TV, top_TV, rtol=1e-9, atol=1e-9)
    assert [evidence.depth for evidence in known.exits] == [2, total]
    path = known.apply_policy(some(0.0, backbone))
    assert path.depth_T.tolist() == [total] * len(top_TV)
    few_TV = path.logits_TV[1:].isfinite()
    assert few_TV[:, :20].all()
    assert not few_TV.all(-1).any()
    torch.testing.assert_close(path.logits_TV[1:][few_TV], top_TV[1:][few_TV], rtol=1e-9, atol=1e-9)
    assert torch.equal(known.apply_policy(some(1.0, backbone)).logits_TV, known.logits_TV)


@pytest.mark.parametrize("threshold", [0.0, 0.08, 0.12])
@pytest.mark.parametrize("second", [MaxProb(1.0), MaxProb(0.05)])
def test_rows_of_their_own_say_what_they_say_alone(threshold: float, second: TerminationPolicy) -> None:
    backbone, bank = model()
    policy = AnyOf([CandidateProb(threshold, frequent=20), second])
    prompts = torch.randint(3, 60, (5, 7), generator=torch.Generator().manual_seed(1))
    decoder = EarlyExit(backbone, bank, policy)
    alone = [list(decoder.decode(prompt_1T, max_new_tokens=TOKENS)) for prompt_1T in prompts.split(1)]
    scheduler = Scheduler(decoder, rows=3)
    tickets = [scheduler.submit(prompt_1T, max_new_tokens=TOKENS) for prompt_1T in prompts.split(1)]
    told: dict[int, list] = {ticket: [] for ticket in tickets}
    while scheduler.busy:
        for each in scheduler.step():
            told[each.ticket].append(each.step)
    for ticket, steps in zip(tickets, alone, strict=True):
        for step, wanted in zip(told[ticket], steps, strict=True):
            torch.testing.assert_close(step.logits_BV, wanted.logits_BV, rtol=1e-9, atol=1e-9)
            assert int(step.depth_B) == int(wanted.depth_B)


@pytest.mark.parametrize("decoder", [SelfSpeculative, Speculative])
def test_a_draft_from_the_top_is_refused(decoder: type) -> None:
    backbone, bank = model()
    with pytest.raises(UserError, match="depth 6, the top. A draft from there"):
        decoder(backbone, bank, CandidateProb(0.5))
    decoder(backbone, bank, OnlyAt(CandidateProb(0.5), [2]))


@pytest.mark.parametrize("gate", [None, "LinearGate"])
def test_a_gate_is_asked_below_the_top_alone(gate: str | None) -> None:
    backbone = HFBackbone(tiny("llama", dtype=torch.float64))
    bank = ExitBank({2: Exit(gates=[LinearGate]), backbone.spec.depth: Exit()}, backbone.site).double()
    policy = GateConfidence(1.0, gate=gate)
    with pytest.raises(UserError, match="depth 6, the top, which takes no gates"):
        list(EarlyExit(backbone, bank, policy).decode(PROMPT_1T, max_new_tokens=3))
    asked = AnyOf([OnlyAt(policy, [2]), some(0.0, backbone)])
    assert len(list(EarlyExit(backbone, bank, asked).decode(PROMPT_1T, max_new_tokens=3))) == 3


@pytest.mark.parametrize("given", [Exit(TunedLens), Exit(gates=[LinearGate])])
def test_the_top_takes_the_model_s_own_output_alone(given: Exit) -> None:
    backbone = HFBackbone(tiny("llama"))
    with pytest.raises(UserError, match="wanted: LogitLens and no gates"):
        ExitBank({backbone.spec.depth: given}, backbone.site)
