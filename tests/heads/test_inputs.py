"""What gates may read: each input by hand, the contract with each, what is kept on disk, what is refused."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from dynamax.errors import UserError
from dynamax.heads import (
    CandidateStatistics,
    Exit,
    ExitBank,
    FFNGate,
    GateInput,
    GateScore,
    HiddenState,
    LensStatistics,
    LinearGate,
    MambaGate,
    MLPGate,
    NgramAgreement,
    PastExits,
    Position,
    TrailStatistics,
    UncertaintyGate,
    saved,
)
from dynamax.testing import check_head, stir, toy_evidence, toy_site
from dynamax.types import Evidence, Past

SITE = toy_site()
ALL = [
    HiddenState(),
    LensStatistics(),
    CandidateStatistics(limit=4),
    TrailStatistics(),
    PastExits(tokens=2),
    NgramAgreement(orders=2),
    Position(),
]


def site(depth):
    return toy_site(depth=depth)


def evidence(logits_BV, *, trail=(), texts=None, step=3, exits=None, gates=None, hidden=None, asked=None):
    logits_BV = torch.tensor(logits_BV, dtype=torch.float64)

    def candidates(tokens_C):
        if asked is not None:
            asked.append(tokens_C.tolist())
        return logits_BV[:, tokens_C]

    past = None if texts is None else Past(lambda: texts, lambda steps, count: [[] for _ in texts], exits=exits)
    hidden = torch.zeros(len(logits_BV), 64) if hidden is None else hidden
    given = {"logits": lambda: logits_BV, "gates": gates, "trail": trail, "past": past}
    return Evidence(4, 12, step, hidden, candidates=candidates, vocab=logits_BV.shape[1], **given)


def read(part, seen):
    numbers = part.read(seen, torch.float64)
    assert numbers.shape == (*seen.hidden.shape[:-1], part.width(SITE))
    assert not numbers.requires_grad
    return numbers


@pytest.mark.parametrize("part", ALL, ids=lambda part: type(part).__name__)
def test_a_gate_with_each_input_keeps_the_contract(part):
    check_head(LinearGate, inputs=[part])


def test_inputs_side_by_side_are_alike_in_size():
    seen = toy_evidence(torch.randn(2, 64, dtype=torch.float64))
    gate = LinearGate(SITE, inputs=[HiddenState(), NgramAgreement(orders=2)]).double()
    stir(gate)
    parts = [HiddenState().read(seen, torch.float64) / 8, NgramAgreement(orders=2).read(seen, torch.float64) / 2**0.5]
    torch.testing.assert_close(gate.score(seen), torch.cat(parts, -1) @ gate.out.weight[0] + gate.out.bias)
    alone = LinearGate(SITE, inputs=[HiddenState()]).double()
    assert torch.equal(alone.inputs.read(seen, torch.float64), HiddenState().read(seen, torch.float64))


@pytest.mark.parametrize(("gate", "options"), [(LinearGate, {}), (MLPGate, {"hidden": 5}), (FFNGate, {"hidden": 6})])
def test_gates_over_all_inputs_keep_the_contract(gate, options):
    check_head(gate, inputs=ALL, **options)


def test_lens_statistics_are_those_of_the_uncertainty_gate():
    gate, linear = UncertaintyGate(SITE).double(), LinearGate(SITE, inputs=[LensStatistics()]).double()
    stir(gate)
    linear.load_state_dict(gate.state_dict())
    seen = toy_evidence(torch.randn(2, 3, 64, dtype=torch.float64))
    assert torch.equal(gate.score(seen), linear.score(seen))
    assert gate.flops() == linear.flops() == 18 * SITE.spec.vocab + 12


def test_candidate_statistics_are_those_of_each_rows_own_candidates():
    logits_BV = [[3.0, 1.0, 0.0, 2.0, -1.0, 9.0], [0.0, 4.0, 1.0, 5.0, 2.0, -3.0]]
    asked = []
    seen = evidence(logits_BV, texts=[[1, 2, 3, 1], [0, 4, 4]], asked=asked)
    found = read(CandidateStatistics(limit=8), seen)
    assert asked == [[2, 1, 3, 4, 0]]
    for numbers, tokens, logits in zip(found, ([2, 1, 3], [4, 0]), logits_BV, strict=True):
        p = torch.tensor([logits[token] for token in tokens], dtype=torch.float64).softmax(0)
        q = p**2 / (p**2).sum()
        first, second = p.sort(descending=True).values[:2]
        entropies = [float(-(x * x.log()).sum()) / math.log(8) for x in (p, q)]
        wanted = torch.tensor([first, entropies[0], first - second, entropies[1]], dtype=torch.float64)
        torch.testing.assert_close(numbers, wanted)
    assert (seen.rows_read, seen.logits_read, seen.answers_from_few) == (5, False, False)
    assert seen.answer.argmax(-1).tolist() == [5, 3]  # the lens's own tokens: a gate changes none
    assert read(CandidateStatistics(), evidence(logits_BV[:1], texts=[[3]])).tolist() == [[1, 0, 1, 0]]


def test_trail_statistics_by_hand():
    def exit_(token, prob, trail):
        rest = (1 - prob) / 3
        return evidence([[math.log(prob if v == token else rest) for v in range(4)]], trail=trail)

    trail = []
    for token, prob in ((2, 0.4), (1, 0.5), (2, 0.7)):
        trail.append(exit_(token, prob, trail))
    seen = exit_(2, 0.9, trail)
    assert read(TrailStatistics(), trail[0]).tolist() == [[0, 0, 0, 0]]
    wanted = torch.tensor([[2 / 3, 1 / 3, 0.9 - 0.7, 0.9 - 0.4]], dtype=torch.float64)
    torch.testing.assert_close(read(TrailStatistics(), seen), wanted)
    wanted = torch.tensor([[0, 0, 0.5 - 0.2, 0.5 - 0.2]], dtype=torch.float64)
    torch.testing.assert_close(read(TrailStatistics(), trail[1]), wanted)
    assert all(earlier.logits_read for earlier in trail)


def test_ngram_agreement_by_hand():
    texts = [[1, 2, 3, 0, 2, 2, 1, 2], [0, 1, 2]]
    seen = evidence([[0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 5.0]], texts=texts)
    # behind 2 came 1, behind 1 2 came 3, behind 2 1 2 nothing
    assert read(NgramAgreement(), seen).tolist() == [[-1, 1, 0], [0, 0, 0]]


def test_position_by_hand():
    seen = evidence([[0.0, 1.0]] * 2, texts=[[1] * 7, [1] * 20], step=torch.tensor([0, 5]))
    wanted = torch.tensor([[math.log(8), 0], [math.log(21), math.log(6)]], dtype=torch.float64) / 8
    torch.testing.assert_close(read(Position(), seen), wanted)


def test_past_exits_by_hand():
    seen = evidence([[0.0, 1.0]] * 2, texts=[[1], [1]], exits=lambda count: [[3, 6, 9][:count], [6]])
    assert read(PastExits(tokens=2), seen).tolist() == [[3 / 12, 6 / 12], [6 / 12, 1]]


def test_a_score_of_another_gate_has_no_gradient():
    given = torch.randn(2, requires_grad=True)
    seen = evidence([[0.0, 1.0]] * 2, gates={"MambaGate": lambda _: given})
    assert torch.equal(read(GateScore("MambaGate"), seen), given.detach()[:, None])
    assert seen.gates_read == ("MambaGate",)


@pytest.mark.parametrize("part", [CandidateStatistics(), NgramAgreement(), Position(), PastExits()])
def test_where_nobody_knows_the_text_inputs_refuse(part):
    with pytest.raises(UserError, match=f"{type(part).__name__} reads the text so far, and nobody knows it here"):
        part.read(evidence([[0.0, 1.0]]), torch.float64)


def test_exits_that_nobody_knows_are_refused():
    with pytest.raises(UserError, match="PastExits reads the exits of earlier tokens"):
        PastExits().read(evidence([[0.0, 1.0]], texts=[[1]]), torch.float64)


# -- in a bank --------------------------------------------------------------------------------------------


def stacked(*more):
    gates = [MambaGate, partial(LinearGate, inputs=[GateScore("MambaGate"), LensStatistics()]), *more]
    return Exit(gates=gates)


def test_inputs_are_saved_and_loaded(tmp_path):
    bank = ExitBank({1: stacked(partial(MLPGate, hidden=3, inputs=ALL)), 2: Exit(gates=[LinearGate])}, site)
    stir(bank)
    bank.save(tmp_path, SITE.spec)
    record = json.loads((tmp_path / "heads.json").read_text())
    gates = {gate["class"]: gate["options"] for gate in record["exits"]["1"]["gates"]}
    assert gates["LinearGate"]["inputs"][0] == {"class": "GateScore", "options": {"gate": "MambaGate"}}
    assert gates["MLPGate"]["inputs"][2] == {"class": "CandidateStatistics", "options": {"limit": 4}}
    assert record["exits"]["2"]["gates"] == [{"class": "LinearGate", "options": {"inputs": None}}]
    loaded = ExitBank.load(tmp_path, site)
    h_BD = torch.randn(3, 64)
    for depth in (1, 2):
        for name, gate in bank.gates(depth).items():
            assert loaded.gates(depth)[name].recipe == gate.recipe
    before, after = (each.gates(1)["MLPGate"].score(toy_evidence(h_BD)) for each in (bank, loaded))
    assert torch.equal(before, after)


def test_heads_that_were_saved_without_inputs_are_loaded(tmp_path):
    exit_ = Exit(gates=[LinearGate, partial(MLPGate, hidden=3), partial(FFNGate, hidden=6)])
    bank = ExitBank({2: exit_}, site)
    stir(bank)
    record = bank.record(SITE.spec)
    for gate in record["exits"]["2"]["gates"]:
        del gate["options"]["inputs"]  # as an earlier version wrote it
    saved.write(tmp_path, record, bank.state_dict())
    loaded, seen = ExitBank.load(tmp_path, site), toy_evidence(torch.randn(3, 64))
    assert list(loaded.state_dict()) == list(bank.state_dict())
    for name, gate in bank.gates(2).items():
        assert torch.equal(loaded.gates(2)[name].score(seen), gate.score(seen))


class Length(GateInput):
    """Stands for a plug-in's input."""

    def width(self, site):
        return 1

    def read(self, evidence, dtype):
        return evidence.hidden.norm(dim=-1, keepdim=True).detach() / 64


def test_an_input_of_ones_own_is_saved_by_its_path(tmp_path):
    check_head(LinearGate, inputs=[Length()])
    bank = ExitBank({2: Exit(gates=[partial(LinearGate, inputs=[Length()])])}, site)
    [gate] = bank.record(SITE.spec)["exits"]["2"]["gates"]
    assert gate["options"]["inputs"][0]["class"].endswith("test_inputs.Length")


def test_a_record_whose_input_has_changed_is_refused(tmp_path):
    bank = ExitBank({2: Exit(gates=[partial(LinearGate, inputs=[PastExits(tokens=2)])])}, site)
    for part, message in (
        ({"class": "PastExits", "options": {"words": 2}}, "A saved PastExits at depth 2 cannot be built"),
        ({"class": "PastExists", "options": {}}, "no gate input named 'PastExists'. Did you mean PastExits"),
        ({"class": "json.JSONDecoder", "options": {}}, "which is no gate input. Wanted: a subclass of GateInput"),
    ):
        record = bank.record(SITE.spec)
        record["exits"]["2"]["gates"][0]["options"]["inputs"] = [part]
        saved.write(tmp_path, record, bank.state_dict())
        with pytest.raises(UserError, match=message):
            ExitBank.load(tmp_path, site)


def test_a_gate_that_another_reads_is_kept_and_not_offered():
    bank = ExitBank({1: stacked(), 2: stacked()}, site)
    few = bank.select_gates(["LinearGate"])
    assert list(few.gates(1)) == ["MambaGate", "LinearGate"]
    assert few.recurrent_depths == (1, 2)
    seen = few.evidence(site(1), torch.randn(2, 3, 64), pick=lambda x_BT: x_BT[:, -1])
    assert torch.equal(seen.score(), seen.score("LinearGate"))  # the one that a policy can mean
    assert set(seen.gates_read) == {"LinearGate", "MambaGate"}
    whole = bank.evidence(site(1), torch.randn(2, 3, 64), pick=lambda x_BT: x_BT[:, -1])
    with pytest.raises(UserError, match="Name one of them"):
        whole.score()
    assert list(bank.select_gates(["MambaGate"]).gates(1)) == ["MambaGate"]
    assert few.select_gates(None, depths=[1]).evidence(site(1), torch.randn(2, 3, 64), pick=lambda x: x[:, -1]).inner


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ([partial(LinearGate, inputs=[GateScore("MambaGate")])], "reads the score of MambaGate, but the gates there"),
        ([partial(LinearGate, inputs=[GateScore("LinearGate")])], "LinearGate reads its own score"),
        (
            [partial(LinearGate, inputs=[GateScore("MLPGate")]), partial(MLPGate, inputs=[GateScore("LinearGate")])],
            "LinearGate reads its own score, by the inputs GateScore of LinearGate and of MLPGate",
        ),
        ([partial(LinearGate, inputs=[])], r"given the inputs \(none\)"),
        ([partial(LinearGate, inputs=[Position(), Position()])], "given the inputs Position, Position"),
    ],
)
def test_gates_that_cannot_read_are_refused(gates, message):
    with pytest.raises(UserError, match=message):
        ExitBank({1: Exit(gates=gates)}, site)


@pytest.mark.parametrize(
    ("part", "option"), [(NgramAgreement, "orders"), (PastExits, "tokens"), (CandidateStatistics, "limit")]
)
def test_options_out_of_range_are_refused(part, option):
    with pytest.raises(UserError, match=f"{option} was given as 0"):
        part(**{option: 0})
