"""Recorded gates give, bit for bit, the scores of the gates they repeat, and never those of other weights."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from dynamax.heads import (
    AttentionGate,
    CandidateStatistics,
    FFNGate,
    Gate,
    HiddenState,
    LensStatistics,
    LinearGate,
    MambaGate,
    MLPGate,
    NgramAgreement,
    PastExits,
    Position,
    TrailStatistics,
)
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.recorded import GateRecordings
from dynamax.recording import MOST_POSITIONS
from dynamax.testing import stir, toy_evidence, toy_site
from dynamax.types import Memory

GATES = [LinearGate, MLPGate, FFNGate, MambaGate]
PART = (2, "gate")


def made(gate_class, dtype=torch.float32):
    gate = gate_class(toy_site()).to(dtype)
    stir(gate)
    recordings = GateRecordings()
    recordings.begin({PART: gate})
    return gate, recordings


@torch.inference_mode()
def scores(gate, chunks, recordings=None, memory=None):
    memory = Memory() if memory is None and gate.recurrent else memory
    out = []
    for h_BTD in chunks:
        evidence = toy_evidence(h_BTD if gate.recurrent else h_BTD[:, 0], recurrent=gate.recurrent)
        out.append(
            gate.score(evidence, memory) if recordings is None else recordings.score(PART, gate, evidence, memory)
        )
        if memory is not None:
            memory.read += h_BTD.shape[1]
    return out


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gate_class", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_recorded_gate_is_bit_for_bit_the_gate(gate_class, dtype, rows):
    gate, recordings = made(gate_class, dtype)
    chunks = [torch.randn(rows, 5, 64), *torch.randn(7, rows, 1, 64)] if gate.recurrent else torch.randn(7, rows, 1, 64)
    assert equal(scores(gate, chunks, recordings), scores(gate, chunks))
    assert [kind[0] for kind in recordings.ready] == [PART]
    assert not recordings.given_up


def test_debts_and_padding_have_programs_of_their_own():
    gate, recordings = made(MambaGate, torch.float64)
    chunks = [torch.randn(2, length, 64) for length in (6, 1, 1, 3, 1, 3, 1, 3, 2, 1, MOST_POSITIONS + 1, 1)]
    for pad_B in (None, torch.tensor([4, 0])):
        given = scores(gate, chunks, recordings, Memory(pad_B))
        assert equal(given, scores(gate, chunks, memory=Memory(pad_B)))
    assert {kind[1][1] for kind in recordings.ready} == {1, 3}
    assert len(recordings.ready) == 4


def test_a_program_calls_no_module_and_keeps_old_memories():
    gate, recordings = made(MambaGate)
    calls = []
    gate.enter.register_forward_hook(lambda *_: calls.append(1))
    memory = Memory()
    scores(gate, torch.randn(4, 1, 1, 64), recordings, memory)
    assert len(calls) == 1 + 2  # the first has no memory yet
    chunk, snapshot = torch.randn(3, 1, 1, 64), memory.copy()
    first = scores(gate, chunk, recordings, memory)
    assert equal(first, scores(gate, chunk, recordings, snapshot))
    assert len(calls) == 1 + 2


@pytest.mark.parametrize("gate_class", [LinearGate, MambaGate])
@pytest.mark.parametrize("change", ["in place", "other tensor", "dtype", "inference"])
def test_other_weights_are_seen_when_a_run_begins(gate_class, change):
    gate, recordings = made(gate_class)
    chunks = torch.randn(6, 1, 1, 64)
    scores(gate, chunks, recordings)
    if change == "in place":
        stir(gate, seed=5)
    elif change == "other tensor":
        gate.load_state_dict({name: value + 0.1 for name, value in gate.state_dict().items()}, assign=True)
    elif change == "dtype":
        gate.double()
    else:
        with torch.inference_mode():
            gate.load_state_dict({name: value + 0.1 for name, value in gate.state_dict().items()}, assign=True)
            recordings.begin({PART: gate})
            scores(gate, chunks, recordings)
            stir(gate, seed=5)
    recordings.begin({PART: gate})
    assert equal(scores(gate, chunks, recordings), scores(gate, chunks))


def test_a_run_that_begins_with_the_same_weights_keeps_the_programs():
    gate, recordings = made(MambaGate)
    scores(gate, torch.randn(4, 1, 1, 64), recordings)
    ready = dict(recordings.ready)
    recordings.begin({PART: gate})
    assert recordings.ready == ready
    assert ready


class Trusting(Gate):
    """Reads more than the hidden state."""

    def __init__(self, site):
        super().__init__()
        self.out = nn.Linear(1, 1)

    def score(self, evidence, memory=None):
        return self.out(evidence.probs.amax(-1, keepdim=True).to(self.out.weight.dtype))[..., 0]


class Timed(Trusting):
    """Depends on the step."""

    def score(self, evidence, memory=None):
        return evidence.hidden[..., 0] * evidence.step + self.out.bias


class Looking(Trusting):
    """Asks a tensor for a value."""

    def score(self, evidence, memory=None):
        return (
            evidence.hidden[..., 0] if evidence.hidden.sum() > 0 else self.out.bias.expand(evidence.hidden.shape[:-1])
        )


class Counting(Trusting):
    """Depends on where it stands."""

    recurrent = True

    def score(self, evidence, memory=None):
        return evidence.hidden[..., 0] * (0 if memory is None else memory.read)


@pytest.mark.parametrize(
    ("gate_class", "reason"),
    [
        (Trusting, "it reads logits"),
        (Timed, "it reads step"),
        (Looking, "looks at the values"),
        (Counting, "differs from step to step"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(gate_class, reason):
    gate, recordings = made(gate_class)
    chunks = torch.randn(5, 2, 1, 64)
    assert equal(scores(gate, chunks, recordings), scores(gate, chunks))
    assert reason in recordings.given_up[PART]
    assert not recordings.ready


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (LensStatistics(), "it reads logits"),
        (CandidateStatistics(), "it reads past"),
        (TrailStatistics(), "it reads trail"),
        (NgramAgreement(), "it reads past"),
        (Position(), "it reads past"),
        (PastExits(), "it reads past"),
    ],
)
def test_gates_that_read_more_than_the_hidden_state_run_as_they_are(part, reason):
    gate, recordings = made(partial(LinearGate, inputs=[HiddenState(), part]))
    chunks = torch.randn(5, 2, 1, 64)
    assert equal(scores(gate, chunks, recordings), scores(gate, chunks))
    assert reason in recordings.given_up[PART]
    assert not recordings.ready


def test_a_gate_that_names_the_hidden_state_is_recorded():
    gate, recordings = made(partial(LinearGate, inputs=[HiddenState()]))
    chunks = torch.randn(5, 2, 1, 64)
    assert equal(scores(gate, chunks, recordings), scores(gate, chunks))
    assert recordings.ready


def test_a_memory_that_grows_is_not_recorded():
    gate, recordings = made(AttentionGate)
    chunks = torch.randn(6, 1, 1, 64)
    assert equal(scores(gate, chunks, recordings), scores(gate, chunks))
    assert not recordings.ready


def test_gradients_are_not_recorded():
    gate, recordings = made(LinearGate)
    for _ in range(4):
        recordings.score(PART, gate, toy_evidence(torch.randn(2, 64)), None).sum().backward()
    assert gate.out.weight.grad is not None
    assert not recordings.ready


def test_gates_of_one_exit_share_the_normed_state(monkeypatch):
    calls = []
    normalize = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *a, **k: calls.append(1) or normalize(*a, **k))
    bank = ExitBank({2: Exit(gates=[LinearGate, MLPGate])}, lambda _: toy_site())
    for recordings in (None, bank.recordings()):
        for _ in range(4):
            calls.clear()
            h_BTD = torch.randn(1, 1, 64)
            with torch.inference_mode():
                evidence = bank.evidence(toy_site(), h_BTD, pick=lambda x_BT: x_BT[:, -1], recordings=recordings)
                evidence.score("LinearGate")
                evidence.score("MLPGate")
            assert len(calls) == 1
    assert len(bank.recordings().ready) == 2


def test_copies_record_anew():
    bank = ExitBank({2: Exit(gates=[LinearGate])}, lambda _: toy_site())
    gate, recordings = bank.gates(2)["LinearGate"], bank.recordings()
    for _ in range(3):
        with torch.inference_mode():
            recordings.score((2, "LinearGate"), gate, toy_evidence(torch.randn(1, 64)), None)
    assert recordings.ready
    assert not copy.deepcopy(bank).recordings().ready
    assert not pickle.loads(pickle.dumps(recordings)).ready
    assert bank.select_gates(["LinearGate"]).recordings() is recordings
