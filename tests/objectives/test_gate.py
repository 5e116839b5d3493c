from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from dynamax.data.batch import HiddenBatch
from dynamax.heads import (
    CandidateStatistics,
    Exit,
    ExitBank,
    GateScore,
    HiddenState,
    LensStatistics,
    LinearGate,
    MambaGate,
    NgramAgreement,
    PastExits,
    Position,
    TrailStatistics,
    TunedLens,
)
from dynamax.objectives import GateObjective
from dynamax.objectives.base import among, best_token, counted, in_top_k
from dynamax.objectives.gate import depth_weights
from dynamax.testing import toy_evidence
from tests.objectives.batches import made, stir, toy_bank, toy_sites

# Exit's logits by position (the output matrix is the identity), and the full model's three most likely tokens.
EXIT_TV = [[9.0, 5.0, 1.0, 0.0], [1.0, 9.0, 5.0, 0.0], [0.0, 1.0, 5.0, 9.0], [9.0, 0.0, 0.0, 0.0]]
FULL_TK = [[0, 1, 2], [2, 3, 0], [0, 3, 1], [0, 1, 2]]


def by_hand() -> tuple[ExitBank, HiddenBatch, dict]:
    sites = toy_sites([4], vocab=4, identity=True)
    tokens_BT = torch.zeros(1, 4, dtype=torch.long)
    batch = HiddenBatch(
        tokens_BT,
        {4: torch.tensor([EXIT_TV])},
        torch.tensor([FULL_TK]),
        torch.full((1, 4, 3), 0.3),
        torch.ones(1, 4, dtype=torch.bool),
        torch.tensor([[True, True, True, False]]),
        torch.tensor([0]),
        torch.tensor([0]),
    )
    return toy_bank(sites), batch, sites


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True, False, False]),
        ({"labels": "oracle-in-exit", "k": 1}, [True, False, False]),
        ({"labels": "oracle-in-exit", "k": 2}, [True, True, False]),
        ({"labels": "oracle-in-exit", "k": 3}, [True, True, False]),
        ({"labels": "oracle-in-exit", "k": 9}, [True, True, True]),
        ({"labels": "exit-in-oracle", "k": 1}, [True, False, False]),
        ({"labels": "exit-in-oracle", "k": 2}, [True, False, True]),
        ({"labels": "exit-in-oracle", "k": 3}, [True, False, True]),
    ],
)
def test_labels_by_hand(options, expected):
    bank, batch, sites = by_hand()
    assert GateObjective(**options).labels(bank, batch, sites)[4].tolist() == expected


def test_labels_are_read_through_the_lens_or_without_it():
    bank, batch, sites = by_hand()
    with torch.no_grad():
        bank.lens(4).shift.bias[2] = 100.0  # the lens says token 2 everywhere
    assert GateObjective().labels(bank, batch, sites)[4].tolist() == [False, True, False]
    assert GateObjective(readout="logit-lens").labels(bank, batch, sites)[4].tolist() == [True, False, False]


@pytest.mark.parametrize("k", [1, 4, 31, 40])
def test_within_counts_ranks(k):
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(50, 31, generator=generator, dtype=torch.float64)
    oracle_N = torch.randint(31, (50,), generator=generator)
    rank_N = (logits_NV > logits_NV.gather(1, oracle_N[:, None])).sum(-1)

    site = toy_sites([4], vocab=31, identity=True)[4]
    assert torch.equal(among(logits_NV, oracle_N, k), rank_N < k)
    assert torch.equal(in_top_k(k)(site, logits_NV, oracle_N), rank_N < k)
    assert torch.equal(best_token(site, logits_NV, oracle_N), logits_NV.argmax(-1))


def test_the_whole_vocabulary_is_asked_only_where_the_rivals_leave_it_open():
    asked = []
    site = toy_sites([4], vocab=3, identity=True)[4]

    def project(u_ND, tokens_C=None):
        asked.append((len(u_ND), tokens_C is None))
        return site.project(u_ND, tokens_C)

    logits_NV = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [1.0, 2.0, 9.0]])
    watched = dataclasses.replace(site, project=project)
    assert in_top_k(1)(watched, logits_NV, torch.tensor([0, 1, 1])).tolist() == [True, False, False]
    assert asked == [(3, False), (2, True)]


def test_a_store_with_too_few_tokens_is_named():
    bank, batch, sites = by_hand()
    with pytest.raises(ValueError, match="k 4, but the store keeps 3 tokens"):
        GateObjective(labels="exit-in-oracle", k=4).labels(bank, batch, sites)


@pytest.mark.parametrize("options", [{"k": 0, "labels": "oracle-in-exit"}, {"k": 5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="k must be at least 1, and agreement is about one token"):
        GateObjective(**options)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("uniform", [0.25] * 4), ("increasing", [0.1, 0.2, 0.3, 0.4]), ("decreasing", [0.4, 0.3, 0.2, 0.1])],
)
def test_depth_weights(weights, expected):
    assert depth_weights(4, weights) == pytest.approx(expected)
    assert depth_weights(1, weights) == [1.0]


def test_the_loss_is_the_weighted_cross_entropy():
    sites = toy_sites([4, 8], vocab=23)
    bank, batch = toy_bank(sites), made(sites)
    stir(bank)
    loss, seen = GateObjective(weights="increasing").loss(bank, batch, sites)
    expected = 0.0
    for depth, share in ((4, 1 / 3), (8, 2 / 3)):
        site, live_BT = sites[depth], counted(batch)
        logits_BTV = site.project(bank.lens(depth).translate(batch.hidden[depth], site))
        label_N = (logits_BTV.argmax(-1) == batch.top_tokens_BTK[..., 0])[live_BT].float()
        p_N = bank.gates(depth)["LinearGate"].score(toy_evidence(batch.hidden[depth])).sigmoid()[live_BT]
        expected += share * F.binary_cross_entropy(p_N, label_N)
        assert seen[f"positive/{depth}"] == pytest.approx(label_N.mean().item())
    torch.testing.assert_close(loss, expected)
    assert set(seen) == {"positive/4", "positive/8", "bce/4/LinearGate", "bce/8/LinearGate"}


def test_balance_makes_both_classes_count_alike():
    bank, batch, sites = by_hand()  # one positive, two negatives; the gate starts at p = 0.5
    gate = bank.gates(4)["LinearGate"]
    plain, _ = GateObjective().loss(bank, batch, sites)
    balanced, _ = GateObjective(balance=True).loss(bank, batch, sites)
    assert plain.item() == pytest.approx(0.693147, abs=1e-5)
    assert balanced.item() == pytest.approx((2 + 1 + 1) / 3 * 0.693147, abs=1e-5)
    balanced.backward()
    assert gate.out.bias.grad.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("token", [0, 3])
def test_balance_with_one_class_alone(token):
    bank, batch, sites = by_hand()
    batch = dataclasses.replace(batch, hidden={4: torch.nn.functional.one_hot(torch.tensor([[token] * 4]), 4).float()})
    batch = dataclasses.replace(batch, top_tokens_BTK=torch.zeros(1, 4, 3, dtype=torch.long))
    loss, _ = GateObjective(balance=True).loss(bank, batch, sites)
    assert loss.item() == pytest.approx(0.0 if token == 0 else 0.693147, abs=1e-5)


def frozen(bank: ExitBank) -> ExitBank:
    for depth in bank.depths:
        bank.lens(depth).requires_grad_(False)
    return bank


@pytest.mark.parametrize("labels", ["agreement", "oracle-in-exit", "exit-in-oracle"])
def test_remembered_labels_equal_fresh_ones(labels):
    sites = toy_sites([4, 8], vocab=23)
    bank = frozen(toy_bank(sites))
    stir(bank)
    options = {"labels": labels, "k": 1 if labels == "agreement" else 3}
    remembering = GateObjective(**options)
    for seed in (0, 1):
        remembering.labels(bank, made(sites, seed=seed, first=3 * seed, lengths=(7, 7, 6)), sites)
    zero, one = (made(sites, seed=seed, first=3 * seed, lengths=(7, 7, 6)) for seed in (0, 1))
    mixed = HiddenBatch(  # two known documents of different batches
        *(torch.stack([getattr(zero, name)[2], getattr(one, name)[0]]) for name in ("tokens_BT",)),
        {depth: torch.stack([zero.hidden[depth][2], one.hidden[depth][0]]) for depth in sites},
        *(
            torch.stack([getattr(zero, name)[2], getattr(one, name)[0]])
            for name in ("top_tokens_BTK", "top_probs_BTK", "live_BT", "answer_BT", "documents_B", "origins_B")
        ),
    )
    fresh = GateObjective(**options).labels(bank, mixed, sites)
    known = remembering.labels(bank, dataclasses.replace(mixed, hidden={}), sites)  # states are not needed any more
    for depth in sites:
        assert torch.equal(known[depth], fresh[depth])


def test_nothing_is_remembered_while_the_lens_trains():
    bank, batch, sites = by_hand()
    objective = GateObjective()
    objective.labels(bank, batch, sites)
    with torch.no_grad():
        bank.lens(4).shift.bias[2] = 100.0
    assert objective.labels(bank, batch, sites)[4].tolist() == [False, True, False]


def test_labels_of_a_lens_that_changed_are_forgotten():
    bank, batch, sites = by_hand()
    frozen(bank)
    objective = GateObjective()
    objective.labels(bank, batch, sites)
    with torch.no_grad():
        bank.lens(4).shift.bias[2] = 100.0
    assert objective.labels(bank, batch, sites)[4].tolist() == [True, False, False]
    objective.forget({"gates"})
    assert objective.labels(bank, batch, sites)[4].tolist() == [True, False, False]
    objective.forget({"lenses"})
    assert objective.labels(bank, batch, sites)[4].tolist() == [False, True, False]


def test_labels_are_made_in_float32_under_autocast():
    sites = toy_sites([4], vocab=301)
    bank, batch = toy_bank(sites), made(sites, lengths=(40, 40))
    exact = GateObjective().labels(bank, batch, sites)[4]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(GateObjective().labels(bank, batch, sites)[4], exact)


def test_exits_without_gates_are_passed_over_and_several_gates_add_up():
    sites = toy_sites([4, 8], vocab=23)
    exits = {4: Exit(lens=TunedLens), 8: Exit(lens=TunedLens, gates=[LinearGate, lambda s: MambaGate(s, width=16)])}
    bank, batch = ExitBank(exits, lambda depth: sites.get(depth, sites[4])), made(sites)
    loss, seen = GateObjective().loss(bank, batch, sites)
    assert set(seen) == {"positive/8", "bce/8/LinearGate", "bce/8/MambaGate"}
    torch.testing.assert_close(loss, (seen["bce/8/LinearGate"] + seen["bce/8/MambaGate"]) / 2)


def test_a_batch_without_counted_positions_has_a_loss_of_zero():
    sites = toy_sites([4], vocab=23)
    bank, batch = toy_bank(sites), made(sites, lengths=(1, 1), prompt=5)
    loss, _ = GateObjective(balance=True).loss(bank, batch, sites)
    loss.backward()
    assert loss.item() == 0.0


def test_the_loss_falls():
    sites = toy_sites([4, 8], vocab=23)
    bank, batch = frozen(toy_bank(sites)), made(sites, lengths=(30, 30, 30))
    stir(bank)
    objective = GateObjective(balance=True)
    optimizer = torch.optim.AdamW([p for p in bank.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss, _ = objective.loss(bank, batch, sites)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "part",
    [
        HiddenState(),
        LensStatistics(),
        CandidateStatistics(limit=6),
        TrailStatistics(),
        NgramAgreement(orders=2),
        Position(),
        PastExits(tokens=2),
        GateScore("MambaGate"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_gate_learns_a_rule_that_its_input_shows(part, monkeypatch):
    """At the second exit, whether one number of the input is greater than its mean; at the first always no."""
    sites = toy_sites([4, 8], vocab=9)
    more = [partial(MambaGate, width=None, headdim=4)] if part.asks else []
    given = Exit(TunedLens, [*more, partial(LinearGate, inputs=[part])])
    bank = ExitBank(dict.fromkeys(sites, given), lambda depth: sites.get(depth, sites[4]))
    stir(bank)
    batch = made(sites, lengths=(18, 15))
    with torch.no_grad():
        numbers_NF = part.read(bank.known_texts(batch.hidden, sites, counted(batch), batch.text)[8], torch.float32)
    column_N = numbers_NF[:, numbers_NF.std(0).argmax()]
    label_N = column_N > column_N.mean()
    assert label_N.any()
    assert not label_N.all()
    labels = {4: torch.zeros_like(label_N), 8: label_N}
    objective = GateObjective()
    monkeypatch.setattr(objective, "labels", lambda *given: labels)
    gates = [bank.gates(depth)["LinearGate"] for depth in (4, 8)]
    optimizer = torch.optim.Adam([parameter for gate in gates for parameter in gate.parameters()], lr=0.5)
    for _ in range(80):
        loss, seen = objective.loss(bank, batch, sites)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen["bce/4/LinearGate"] < 0.05
    assert seen["bce/8/LinearGate"] < 0.3


def test_a_stacked_gate_changes_nothing_for_the_gate_it_reads():
    sites = toy_sites([4], vocab=9)
    batch, gradients = made(sites), []
    for inputs in (None, [GateScore("MambaGate")]):
        torch.manual_seed(0)
        gates = [partial(MambaGate, width=None, headdim=4), partial(LinearGate, inputs=inputs)]
        bank = ExitBank({4: Exit(TunedLens, gates)}, lambda depth: sites.get(depth, sites[4]))
        stir(bank)
        GateObjective().loss(bank, batch, sites)[0].backward()
        gradients.append([parameter.grad for parameter in bank.gates(4)["MambaGate"].parameters()])
    for plain, stacked in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, stacked)
