"""Candidates while decoding: what is read, what it costs, what is said, alone and in a batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dynamax.backbones.hf import HFBackbone
from dynamax.decoding.cost import CostModel
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.history import History, best_of_groups
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.gates import LinearGate
from dynamax.heads.lenses import BridgeLens, TunedLens
from dynamax.policies import AtDepth, CandidateProb, Cascade, GateConfidence, MaxProb, TerminationPolicy
from dynamax.testing import stir
from dynamax.types import Step
from tests.tiny import tiny

PROMPT_1T = torch.tensor([[5, 9, 5, 2, 40, 9]])


def model(gates: list | None = None) -> tuple[HFBackbone, ExitBank]:
    backbone = HFBackbone(tiny("llama", dtype=torch.float64))
    bank = ExitBank({2: Exit(TunedLens, gates or []), 4: Exit(TunedLens, gates or [])}, backbone.site).double()
    stir(bank)
    return backbone, bank


def steps_of(policy: TerminationPolicy, prompt_BT: torch.Tensor = PROMPT_1T, **options: object) -> list[Step]:
    decoder = EarlyExit(*model([LinearGate]), policy)
    return list(decoder.decode(prompt_BT, max_new_tokens=8, **options))  # type: ignore[arg-type]


def test_each_step_says_a_token_that_was_read_or_said_before() -> None:
    first, *steps = steps_of(CandidateProb(0.0, recent=1, likely=1, frequent=0))
    known = {*PROMPT_1T[0].tolist(), int(first.token_B)}
    for step in steps:
        assert step.logits_read == ()
        assert step.depth == 2
        assert set(step.logits_BV.isfinite()[0].nonzero()[:, 0].tolist()) == known
        assert int(step.token_B) in known


def test_rows_are_counted_and_charged() -> None:
    backbone, bank = model()
    step = list(EarlyExit(backbone, bank, CandidateProb(0.0, limit=5, frequent=0)).decode(PROMPT_1T, max_new_tokens=3))[
        1
    ]
    costs, block = CostModel(backbone, bank), CostModel(backbone, bank).blocks[0]
    assert step.rows_read == ((2, 5),)
    width = backbone.spec.width
    assert costs.step(step, 9).flops == 2 * (
        2 * (block.active + block.scores * 10) + 5 * width + bank.lens(2).flops() / 2
    )


def test_no_logits_are_read_where_the_cheap_gate_says_no() -> None:
    for step in steps_of(
        Cascade([GateConfidence(1.0, gate="LinearGate"), CandidateProb(0.0, frequent=0), MaxProb(0.0)])
    )[1:]:
        assert step.gates_read == ((2, "LinearGate"), (4, "LinearGate"))
        assert step.logits_read == ((6, 1),)
        assert step.rows_read == ()
    for step in steps_of(
        Cascade([GateConfidence(0.0, gate="LinearGate"), CandidateProb(1.0, frequent=0), MaxProb(0.0)])
    )[1:]:
        assert [depth for depth, _ in step.rows_read] == [2, 4]
        assert step.logits_read == ((6, 1),)
    for step in steps_of(
        Cascade([GateConfidence(0.0, gate="LinearGate"), CandidateProb(0.0, frequent=0), MaxProb(0.0)])
    )[1:]:
        assert step.logits_read == ((2, 1),)


@pytest.mark.parametrize("frequent", [0, 7])
def test_rows_of_a_batch_are_the_rows_alone(frequent: int) -> None:
    rows = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    pad_B = torch.tensor([0, 2, 4])
    policy = CandidateProb(0.0, limit=9, frequent=frequent)
    whole = torch.stack([step.token_B for step in steps_of(policy, rows, pad_B=pad_B)], 1)
    for row, pad in enumerate(pad_B.tolist()):
        alone = torch.stack([step.token_B for step in steps_of(policy, rows[row : row + 1, pad:])], 1)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("frequent", [0, 7])
def test_lossless_decoding_stays_lossless(frequent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every row that was read is in the steps, those of rejected drafts too."""
    counted, project = [], HFBackbone.project

    def counting(self, u_BTD, tokens_C=None):
        counted.append(0 if tokens_C is None else tokens_C.stop if isinstance(tokens_C, slice) else len(tokens_C))
        return project(self, u_BTD, tokens_C)

    monkeypatch.setattr(HFBackbone, "project", counting)
    backbone, bank = model()
    full = [int(step.token_B) for step in Full(backbone).decode(PROMPT_1T, max_new_tokens=16)]
    drafted = list(
        SelfSpeculative(backbone, bank, CandidateProb(0.2, frequent=frequent)).decode(PROMPT_1T, max_new_tokens=16)
    )
    assert [int(step.token_B) for step in drafted] == full
    assert any(step.work.calls and sum(step.work.calls) > backbone.spec.depth for step in drafted)
    assert sum(rows for step in drafted for _, rows in step.rows_read) == sum(counted) > 0


@pytest.mark.parametrize(("recent", "frequent"), [(1, 0), (4, 0), (4, 7)])
def test_a_known_text_is_read_as_decoding_along_it_reads(recent: int, frequent: int) -> None:
    """Never leaving: then every step before has said what the top says."""
    backbone, bank = model()
    policy = CandidateProb(1.0, recent=recent, limit=20, frequent=frequent)
    seen: list[torch.Tensor] = []

    class Watched(CandidateProb):
        def score(self, evidence):
            seen.append(super().score(evidence))
            return seen[-1]

    decoder = EarlyExit(backbone, bank, Watched(1.0, recent=recent, limit=20, frequent=frequent))
    tokens = [step.token_B for step in decoder.decode(PROMPT_1T, max_new_tokens=7)]
    text_1T = torch.cat([PROMPT_1T, torch.stack(tokens, 1)[:, :-1]], 1)
    known = TeacherForcedPass(backbone, bank, text_1T, start=PROMPT_1T.shape[1] - 1)
    scores_ET = torch.stack([policy.score(evidence) for evidence in known.exits])
    torch.testing.assert_close(torch.cat(seen).view(-1, 2).T, scores_ET[:, 1:], rtol=1e-9, atol=1e-9)
    assert not decoder.teacher_forced
    assert EarlyExit(backbone, bank, AtDepth(2)).teacher_forced


def test_history() -> None:
    history = History(torch.tensor([[0, 7, 8], [4, 5, 6]]), torch.tensor([1, 0]))
    history.keep = 2
    for token in (1, 2, 3):
        history.read(torch.tensor([token, token]))
        history.say(torch.eye(9)[[token, token + 1]], blocks=token, depth=2 * token)
    assert history.past().texts == [[7, 8, 1, 2, 3], [4, 5, 6, 1, 2, 3]]
    assert history.past().likely(5, 1) == [[3, 2], [4, 3]]
    assert history.past().blocks() == [[2, 3], [2, 3]], "the first is the prompt's"
    assert history.past().exits(2) == [[6, 4], [6, 4]], "newest first"
    history.crop(4)
    assert history.past().texts == [[7, 8, 1], [4, 5, 6, 1]]


def test_what_was_read_is_known_after_a_crop_and_on() -> None:
    """Asked for between reads and crops, in every order, it is what was never asked for in between."""
    asked, plain = (History(torch.tensor([[7, 8]]), None) for _ in range(2))
    for history in (asked, plain):
        for token in range(4):
            history.read(torch.tensor([token]))
            if history is asked:
                assert history.past().texts == [[7, 8, *range(token + 1)]]
        history.crop(3)
        history.read(torch.tensor([9]))
        assert history.past().texts == [[7, 8, 0, 9]]


@pytest.mark.parametrize("vocab", [1, 63, 64, 60 * 64, 60 * 64 + 1])
@pytest.mark.parametrize("count", [1, 16])
def test_the_best_of_groups_are_the_best(vocab: int, count: int) -> None:
    count = min(count, vocab)
    logits_BV = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab))
    logits_BV[1, : vocab // 2 + 1] += 9  # many of the best are neighbours
    logits_BV[2, vocab // 3 :] = -torch.inf
    values, places = best_of_groups(logits_BV, count)
    assert values.equal(logits_BV.topk(count, -1).values)
    assert logits_BV.gather(1, places).equal(values)
    assert all(len(set(row)) == count for row in places.tolist())


@pytest.mark.parametrize(
    "policy", [CandidateProb(0.0, frequent=7), Cascade([CandidateProb(0.0, frequent=7), MaxProb(0.0)])]
)
def test_a_lens_runs_once_whatever_is_read(policy: TerminationPolicy) -> None:
    """A lens that runs blocks of the backbone would run them again; the cost is that of one run."""
    backbone = HFBackbone(tiny("llama", dtype=torch.float64))
    bank = ExitBank({2: Exit(partial(BridgeLens, blocks=2))}, backbone.site).double()
    step = list(EarlyExit(backbone, bank, policy).decode(PROMPT_1T, max_new_tokens=3))[1]
    assert step.work.calls == (1, 1, 0, 0, 1, 1)
    read = sum(rows for _, rows in step.rows_read) + backbone.spec.vocab * len(step.logits_read)
    costs, block = CostModel(backbone, bank), CostModel(backbone, bank).blocks[0]
    assert costs.step(step, 9).flops == pytest.approx(
        2 * (4 * (block.active + block.scores * 10) + read * backbone.spec.width + bank.lens(2).flops() / 2)
    )


def test_without_likely_tokens_one_pass_over_a_text_tells_what_decoding_does() -> None:
    backbone, bank = model()
    policy = CandidateProb(0.2, recent=0, frequent=7)
    decoder = EarlyExit(backbone, bank, policy)
    assert decoder.teacher_forced
    steps = list(decoder.decode(PROMPT_1T, max_new_tokens=12))
    text_1T = torch.cat([PROMPT_1T, torch.stack([step.token_B for step in steps], 1)], 1)[:, :-1]
    path = TeacherForcedPass(backbone, bank, text_1T, start=PROMPT_1T.shape[1] - 1).apply_policy(policy)
    assert path.depth_T.tolist() == [int(step.depth_B) for step in steps]
    assert len(set(path.depth_T.tolist())) > 1
    torch.testing.assert_close(path.logits_TV, torch.cat([step.logits_BV for step in steps]), rtol=1e-9, atol=1e-9)
