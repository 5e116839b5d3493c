from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from dynamax.heads import Exit, ExitBank, LinearGate, LogitLens, TunedLens
from dynamax.objectives import LensDistillation
from dynamax.objectives.base import counted
from dynamax.objectives.lens import choose
from tests.objectives.batches import made, stir, toy_bank, toy_sites


@pytest.mark.parametrize("hard", ["full-model", "text"])
@pytest.mark.parametrize("soft", [0.0, 0.3, 1.0])
def test_over_the_whole_vocabulary_it_is_the_cross_entropy(hard, soft):
    sites = toy_sites([4, 8], vocab=23)
    bank, batch = toy_bank(sites), made(sites)
    stir(bank)
    loss, seen = LensDistillation(hard=hard, soft=soft, top=3, candidates=None).loss(bank, batch, sites)
    rows, places = counted(batch).nonzero(as_tuple=True)
    target_N = batch.top_tokens_BTK[rows, places, 0] if hard == "full-model" else batch.tokens_BT[rows, places + 1]
    teacher_NV = torch.zeros(len(rows), 23)
    probs_NT = batch.top_probs_BTK[rows, places, :3]
    teacher_NV.scatter_(1, batch.top_tokens_BTK[rows, places, :3], probs_NT / probs_NT.sum(-1, keepdim=True))
    expected = 0.0
    for depth, site in sites.items():
        logits_NV = site.project(bank.lens(depth).translate(batch.hidden[depth], site))[rows, places]
        each = (1 - soft) * F.cross_entropy(logits_NV, target_N) + soft * F.cross_entropy(logits_NV, teacher_NV)
        torch.testing.assert_close(seen[f"cross_entropy/{depth}"], each.detach())
        expected += each
    torch.testing.assert_close(loss, expected)


def test_few_candidates_estimate_the_whole_softmax():
    sites = toy_sites([4], vocab=997)
    bank, batch = toy_bank(sites), made(sites, lengths=(20, 20))
    whole, _ = LensDistillation(candidates=None).loss(bank, batch, sites)
    drawn, _ = LensDistillation(candidates=600).loss(bank, batch, sites)
    assert drawn.item() == pytest.approx(whole.item(), rel=0.1)


def test_the_choice_holds_the_targets_once_and_weighs_the_drawn():
    target_NT = torch.tensor([[3, 7], [7, 90], [3, 5]])
    choice = choose(target_NT, 100, 24)
    assert torch.equal(choice.tokens_C[choice.place_NT], target_NT)
    assert len(choice.tokens_C.unique()) == len(choice.tokens_C) == 4 + 24
    assert choice.raise_C[:4].tolist() == [0.0] * 4
    assert choice.raise_C[4:].tolist() == pytest.approx([math.log(96 / 24)] * 24)
    assert torch.equal(choose(target_NT, 100, 24).tokens_C, choice.tokens_C)
    assert not torch.equal(choose(target_NT + 1, 100, 24).tokens_C, choice.tokens_C)


@pytest.mark.parametrize("count", [None, 96, 500])
def test_no_draw_where_all_can_be_had(count):
    choice = choose(torch.tensor([[3, 7], [7, 90], [3, 5]]), 100, count)
    assert choice.tokens_C is None
    assert choice.raise_C.item() == 0.0


@pytest.mark.parametrize(
    "options", [{"soft": -0.1}, {"soft": 1.5}, {"soft": float("nan")}, {"top": 0}, {"candidates": 0}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"soft must lie in \[0, 1\], top and candidates must be at least 1"):
        LensDistillation(**options)


def test_a_store_with_too_few_tokens_is_named():
    sites = toy_sites([4], vocab=23)
    with pytest.raises(ValueError, match="top 5, but the store keeps 4 tokens"):
        LensDistillation(soft=0.5, top=5).loss(toy_bank(sites), made(sites), sites)


def test_lenses_with_nothing_to_learn_cost_nothing():
    sites = toy_sites([4, 8], vocab=23)
    exits = {4: Exit(lens=LogitLens, gates=[LinearGate]), 8: Exit(lens=TunedLens)}
    bank = ExitBank(exits, lambda depth: sites.get(depth, sites[4]))
    loss, seen = LensDistillation().loss(bank, made(sites), sites)
    loss.backward()
    assert set(seen) == {"cross_entropy/8"}
    assert all(parameter.grad is None for parameter in bank.gates(4)["LinearGate"].parameters())


def test_padding_does_not_matter():
    sites = toy_sites([4], vocab=23)
    bank, batch = toy_bank(sites), made(sites)
    junk = {4: batch.hidden[4].masked_fill(~batch.live_BT[..., None], 1e3)}
    other = dataclasses.replace(batch, hidden=junk, tokens_BT=batch.tokens_BT.masked_fill(~batch.live_BT, 5))
    for objective in (LensDistillation(), LensDistillation(hard="text", soft=0.5)):
        torch.testing.assert_close(objective.loss(bank, batch, sites)[0], objective.loss(bank, other, sites)[0])


def test_a_batch_without_counted_positions_has_a_loss_of_zero():
    sites = toy_sites([4], vocab=23)
    loss, _ = LensDistillation(soft=0.5).loss(toy_bank(sites), made(sites, lengths=(1, 1), prompt=5), sites)
    loss.backward()
    assert loss.item() == 0.0


def test_the_lens_learns_what_the_full_model_says():
    sites = toy_sites([4, 8], vocab=61)
    bank, batch = toy_bank(sites), made(sites, lengths=(200, 200), prompt=0)
    optimizer = torch.optim.AdamW([p for d in bank.depths for p in bank.lens(d).parameters()], lr=0.05)
    objective = LensDistillation(candidates=16)

    def agreement(depth: int) -> float:
        logits_BTV = sites[depth].project(bank.lens(depth).translate(batch.hidden[depth], sites[depth]))
        return (logits_BTV.argmax(-1) == batch.top_tokens_BTK[..., 0]).float().mean().item()

    before = agreement(8)
    for _ in range(60):
        loss, _ = objective.loss(bank, batch, sites)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.2
    assert agreement(8) > 0.7
    assert agreement(8) > agreement(4)
