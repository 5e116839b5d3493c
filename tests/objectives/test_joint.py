"""JEI-DNN's losses against sums by hand, and what its sheet of formulas promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from dynamax.heads import Exit, ExitBank, LinearGate, LogitLens, TunedLens, UncertaintyGate
from dynamax.objectives import JointGates, JointLenses, LensDistillation
from dynamax.objectives.base import counted
from dynamax.objectives.joint import best_places, exit_costs, rescaled
from dynamax.policies.joint import exit_distribution
from tests.objectives.batches import made, stir, toy_sites

DEPTHS = [3, 6, 9]
WHOLE = LensDistillation(soft=0.0, candidates=None)


def case(lens=TunedLens, gates=(UncertaintyGate,), vocab=11):
    sites = toy_sites(DEPTHS, vocab=vocab)
    bank = ExitBank(dict.fromkeys(DEPTHS, Exit(lens, list(gates))), lambda depth: sites.get(depth, sites[3]))
    stir(bank)
    return bank, made(sites), sites


def logits(bank, batch, sites, depth):
    """Of an exit's lens at the counted positions, by its formula."""
    h_ND = batch.hidden[depth][counted(batch)]
    shift = bank.lens(depth).shift
    return sites[depth].project(h_ND + h_ND @ shift.weight.T + shift.bias)


@pytest.mark.parametrize("targets", ["subsequent", "best"])
@pytest.mark.parametrize("criterion", ["cross-entropy", "error", "probability"])
def test_gates_learn_the_best_place_by_hand(criterion, targets):
    bank, batch, sites = case(gates=(UncertaintyGate, LinearGate))
    objective = JointGates(tradeoff=0.4, criterion=criterion, targets=targets, limit=2.5, readout=0.5)
    live_BT = counted(batch)
    token_N, top_N = batch.top_tokens_BTK[live_BT][:, 0], batch.top_probs_BTK[live_BT][:, 0]
    losses = []
    for depth in DEPTHS:
        out_NV = logits(bank, batch, sites, depth).detach()
        losses.append(
            {
                "cross-entropy": F.cross_entropy(out_NV, token_N, reduction="none"),
                "error": (out_NV.argmax(-1) != token_N).float(),
                "probability": -out_NV.softmax(-1)[range(len(token_N)), token_N],
            }[criterion]
        )
    losses.append({"cross-entropy": -top_N.log(), "error": 0 * top_N, "probability": -top_N}[criterion])
    costs = [3.5 / 12.5, 7 / 12.5, 10.5 / 12.5, 14 / 12.5]  # blocks, and half a block for each reading
    place_N = [min(range(4), key=lambda e, n=n: float(losses[e][n]) + 0.4 * costs[e]) for n in range(len(token_N))]
    assert len(set(place_N)) > 1, "the case decides nothing"

    wanted = 0.0
    evidence = bank.known_texts(batch.hidden, sites, live_BT)
    for index, depth in enumerate(DEPTHS):
        target_N = torch.tensor([float(p <= index if targets == "subsequent" else p == index) for p in place_N])
        ones = float(target_N.sum())
        weight_N = torch.where(target_N > 0, min(2.5, max(1.0, (len(target_N) - ones) / max(1.0, ones))), 1.0)
        for name in ("UncertaintyGate", "LinearGate"):
            prob_N = evidence[depth].score(name).sigmoid()
            wanted = wanted - (weight_N * (target_N * prob_N.log() + (1 - target_N) * (1 - prob_N).log())).mean()
    loss, seen = objective.loss(bank, batch, sites)
    torch.testing.assert_close(loss, wanted)
    assert sum(float(seen[f"best/{depth}"]) for depth in (*DEPTHS, 12)) == pytest.approx(1.0)


def test_no_gradient_of_the_gates_reaches_a_lens():
    bank, batch, sites = case()
    JointGates().loss(bank, batch, sites)[0].backward()
    for depth in DEPTHS:
        assert all(p.grad is None for p in bank.lens(depth).parameters())
        assert bank.gates(depth)["UncertaintyGate"].out.weight.grad.abs().sum() > 0


def test_a_tradeoff_without_end_leaves_first_and_none_takes_the_least_loss():
    losses = [torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.7]), torch.tensor([1.5, 0.1])]
    costs = [0.3, 0.6, 1.0]
    assert best_places(losses, costs, 1e9).tolist() == [0, 0]
    assert best_places(losses, costs, 0.0).tolist() == [1, 2]


def test_every_exit_that_is_passed_is_paid():
    spec = toy_sites([3], vocab=48)[3].spec  # 12 blocks of width 8: the output matrix is half a block
    assert exit_costs([3, 6], spec, None) == pytest.approx([3.5 / 12.5, 7 / 12.5, 13.5 / 12.5])
    assert exit_costs([3, 6], spec, 0.0) == pytest.approx([0.25, 0.5, 1.0])


def test_lenses_are_weighed_by_the_exit_distribution():
    bank, batch, sites = case()
    token_N = batch.top_tokens_BTK[counted(batch)][:, 0]
    evidence = bank.known_texts(batch.hidden, sites, counted(batch))
    gates_EN = torch.stack([evidence[depth].confidence() for depth in DEPTHS]).detach()
    leave_EN = torch.zeros_like(gates_EN)
    for n in range(gates_EN.shape[1]):  # the paper's equation, a position at a time
        left = 1.0
        for e in range(3):
            leave_EN[e, n] = max(0.0, min(float(gates_EN[e, n]), left))
            left -= float(gates_EN[e, n])
    losses_EN = torch.stack([F.cross_entropy(logits(bank, batch, sites, d), token_N, reduction="none") for d in DEPTHS])
    rho_N = losses_EN.sum(0) / (leave_EN * losses_EN).sum(0)
    wanted = (leave_EN * rho_N.detach() * losses_EN).sum() / len(token_N)

    loss, seen = JointLenses(lenses=WHOLE).loss(bank, batch, sites)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(seen["leave/6"], leave_EN[1].mean())
    mine = torch.autograd.grad(loss, [bank.lens(d).shift.weight for d in DEPTHS])
    hand = torch.autograd.grad(wanted, [bank.lens(d).shift.weight for d in DEPTHS])
    torch.testing.assert_close(mine, hand)
    assert all(p.grad is None for depth in DEPTHS for p in bank.gates(depth)["UncertaintyGate"].parameters())


def test_the_gates_turn_the_lenses_gradient_though_not_its_size():
    """With gradients through rho the exit distribution would have no effect at all."""
    bank, batch, sites = case()
    weights = [bank.lens(depth).shift.weight for depth in DEPTHS]
    plain = torch.autograd.grad(WHOLE.loss(bank, batch, sites)[0], weights)
    loss = JointLenses(lenses=WHOLE).loss(bank, batch, sites)[0]
    torch.testing.assert_close(loss, WHOLE.loss(bank, batch, sites)[0])  # rho keeps the sum
    joint = torch.autograd.grad(loss, weights)
    assert not any(torch.allclose(a, b, rtol=0.05) for a, b in zip(joint, plain, strict=True))
    with torch.no_grad():
        for depth in DEPTHS[1:]:
            bank.gates(depth)["UncertaintyGate"].out.bias.fill_(-30.0)
    first, *others = torch.autograd.grad(JointLenses(lenses=WHOLE).loss(bank, batch, sites)[0], weights)
    assert first.abs().sum() > 0.1
    assert all(other.abs().max() < 1e-6 for other in others), "exits that nothing leaves at learn nothing"


def test_positions_that_leave_nowhere_teach_nothing():
    weights = rescaled(torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 2.0], [0.0, 0.0]]))


def test_the_distribution_is_one_and_its_conditionals_rebuild_it():
    gates_EN = torch.rand(5, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square()
    leave_EN, chance_EN = exit_distribution(gates_EN)
    assert (leave_EN >= 0).all()
    assert (leave_EN.sum(0) <= 1 + 1e-12).all()
    assert ((chance_EN >= 0) & (chance_EN <= 1)).all()
    before_EN = torch.cat([torch.ones(1, 400, dtype=torch.float64), (1 - chance_EN).cumprod(0)[:-1]])
    torch.testing.assert_close(chance_EN * before_EN, leave_EN)
    assert ((gates_EN.cumsum(0) > 1).any(0)).float().mean() > 0.3, "the case never runs out of probability"


def test_a_lens_without_weights_has_nothing_to_learn_but_counts_as_an_exit():
    bank, batch, sites = case(lens=LogitLens)
    loss, seen = JointGates().loss(bank, batch, sites)
    assert loss > 0
    assert JointLenses().loss(bank, batch, sites)[0] == 0.0


def test_a_batch_without_positions_teaches_nothing():
    bank, batch, sites = case()
    empty = dataclasses.replace(batch, answer_BT=torch.zeros_like(batch.answer_BT))
    for objective in (JointGates(), JointLenses(lenses=WHOLE)):
        loss, _ = objective.loss(bank, empty, sites)
        assert float(loss.detach()) == 0.0
        loss.backward()


@pytest.mark.parametrize("options", [{"tradeoff": -1.0}, {"tradeoff": float("nan")}, {"limit": 0.5}, {"readout": -1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="JointGates was given"):
        JointGates(**options)
