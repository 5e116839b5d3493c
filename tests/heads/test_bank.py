"""The bank: what it refuses to build, and how its gates read while positions leave early."""

import random
from functools import partial

import pytest
import torch

from dynamax.backbones.cache import Cache
from dynamax.heads import AttentionGate, Exit, ExitBank, LinearGate, LogitLens, MambaGate, TunedLens
from dynamax.heads.base import ExitHead, Gate
from dynamax.testing import stir, toy_evidence, toy_site
from dynamax.types import Memory, Span

WIDTH = 64
SMALL = partial(MambaGate, width=16, d_state=4, headdim=8)
ATTENTION = partial(AttentionGate, width=16, heads=2)


def site(depth):
    return toy_site(depth=depth)


def stirred(exits):
    bank = ExitBank(exits, site).double()
    for seed, module in enumerate(bank.modules()):
        if isinstance(module, ExitHead):
            stir(module, seed)
    return bank


# -- what is built ------------------------------------------------------------------------------


def test_exits_stand_in_order_of_depth_with_their_heads():
    bank = ExitBank({3: Exit(gates=[SMALL, LinearGate]), 1: Exit(TunedLens)}, site)
    assert bank.depths == (1, 3)
    assert bank.recurrent_depths == (3,)
    assert isinstance(bank.lens(1), TunedLens)
    assert isinstance(bank.lens(3), LogitLens)
    assert list(bank.gates(3)) == ["MambaGate", "LinearGate"]
    assert bank.gates(1) == {}
    assert not ExitBank({1: Exit()}, site).recurrent_depths


def test_heads_are_parameters_of_the_bank_and_depths_are_in_their_names():
    bank = ExitBank({1: Exit(TunedLens), 3: Exit(gates=[LinearGate])}, site)
    assert set(bank.state_dict()) == {
        "exits.1.lens.shift.weight",
        "exits.1.lens.shift.bias",
        "exits.3.gates.LinearGate.out.weight",
        "exits.3.gates.LinearGate.out.bias",
    }


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ({}, "No exits were given"),
        ({0: Exit()}, "depth 0, but the backbone has 4 blocks: exits stand at 1 to 4"),
        ({5: Exit()}, "depth 5, but the backbone has 4 blocks: exits stand at 1 to 4"),
        ({-1: Exit()}, "depth -1"),
        ({"2": Exit()}, "depth '2'; a depth is a whole number"),
        ({2: Exit(), "2": Exit()}, "depth '2', beside 2; .* each has one exit"),
        ({2.0: Exit()}, "depth 2.0"),
        ({True: Exit()}, "depth True"),
        ({2: Exit(gates=[LinearGate, LinearGate])}, "depth 2 was given two gates of class LinearGate"),
        ({2: Exit(LinearGate)}, "given LinearGate where a lens is wanted"),
        ({2: Exit(gates=[LogitLens])}, "given LogitLens where a gate is wanted"),
    ],
)
def test_impossible_exits_are_refused(exits, message):
    with pytest.raises(ValueError, match=message):
        ExitBank(exits, site)


def test_asking_for_an_exit_that_is_not_there_names_those_that_are():
    bank = ExitBank({1: Exit(), 3: Exit()}, site)
    with pytest.raises(ValueError, match="no exit at depth 2; there are exits at 1, 3"):
        bank.lens(2)


def test_a_gate_that_no_exit_has_is_refused_with_those_there_are():
    bank = ExitBank({1: Exit(gates=[SMALL]), 3: Exit(gates=[LinearGate])}, site)
    assert list(bank.select_gates(["MambaGate"]).gates(1)) == ["MambaGate"]
    few = bank.select_gates(None, depths=[3, 7])
    assert (few.depths, list(few.gates(3)), few.lens(3) is bank.lens(3)) == ((3,), ["LinearGate"], True)
    assert bank.select_gates(None, depths=[1, 3]) is bank
    with pytest.raises(ValueError, match="MambaGate, which no exit has; gates of the exits: LinearGate"):
        bank.select_gates(["MambaGate"], depths=[3])
    with pytest.raises(ValueError, match="AttentionGate, which no exit has; gates of the exits: LinearGate, MambaGate"):
        bank.select_gates(["AttentionGate"])
    with pytest.raises(ValueError, match="gates of the exits: none"):
        ExitBank({1: Exit()}, site).select_gates(["LinearGate"])


# -- evidence -----------------------------------------------------------------------------------


class Counted(Gate):
    """A gate that counts its calls."""

    def __init__(self, site):
        super().__init__()
        self.calls = 0

    def score(self, evidence, memory=None):
        self.calls += 1
        return evidence.hidden[..., 0]

    def flops(self):
        return 1


def cache_at(depth, passed, pad_B=None):
    cache = Cache(Span(0, 4), pad_B=pad_B)
    cache.group.filled = [passed if block < depth else 0 for block in range(4)]
    return cache


def read(bank, depth, h_BTD, cache):
    scores, _ = bank.catch_up(site(depth), h_BTD, [cache])
    return bank.evidence(site(depth), h_BTD, pick=lambda x_BT: x_BT[:, -1], recurrent=scores)


def sequence(h_BTD):
    return toy_evidence(h_BTD, recurrent=True)


def test_evidence_is_of_the_newest_position_and_lazy():
    bank = stirred({2: Exit(TunedLens, [Counted, SMALL])})
    h_BTD = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    evidence = read(bank, 2, h_BTD, cache_at(2, 5))
    assert bank.gates(2)["Counted"].calls == 0
    assert not evidence.logits_read
    assert torch.equal(evidence.hidden, h_BTD[:, -1])
    logits_BTV = site(2).project(bank.lens(2).translate(h_BTD, site(2)))
    torch.testing.assert_close(evidence.logits, logits_BTV[:, -1])
    torch.testing.assert_close(evidence.confidence("Counted"), h_BTD[:, -1, 0].sigmoid())
    torch.testing.assert_close(
        evidence.confidence("MambaGate"), bank.gates(2)["MambaGate"].score(sequence(h_BTD))[:, -1].sigmoid()
    )
    assert bank.gates(2)["Counted"].calls == 1
    assert evidence.gates_read == ("Counted", "MambaGate")


def test_reading_the_same_rows_twice_is_a_broken_law():
    bank, cache, h_BTD = stirred({2: Exit(gates=[SMALL])}), cache_at(2, 1), torch.randn(1, 1, WIDTH).double()
    bank.catch_up(site(2), h_BTD, [cache])
    with pytest.raises(AssertionError, match="has read 1 of 1"):
        bank.catch_up(site(2), h_BTD, [cache])


# -- reading while positions leave early --------------------------------------------------------


class Run:
    """Decoding without a model: the state of every position at every depth is drawn beforehand."""

    def __init__(self, bank, length, *, rows=2, pad_B=None):
        self.bank = bank
        self.h = torch.randn(4, rows, length, WIDTH, dtype=torch.float64)  # [depth, B, T, D]
        self.cache = Cache(Span(0, 4), pad_B=pad_B)
        self.at = 0
        self.seen = {(depth, name): {} for depth in bank.depths for name in bank.gates(depth)}

    def span(self, start, stop):
        """What a backbone's ``run`` does to debts and fill levels; gates none of which is read here."""
        owed = 0
        for block in range(start, stop):
            debt = self.cache.group.due(block)
            owed += 0 if debt is None else debt.shape[1]
            self.cache.filled[block] += owed + self.rows
        if owed and stop < 4:
            self.cache.group.owe(stop, self.h[stop, :, self.at - owed : self.at])

    def go(self, rows, leave):
        """Take the next positions up, read every exit on the way, leave at ``leave`` (4: at the top)."""
        self.rows, depth = rows, 0
        for stop in [d for d in self.bank.depths if d <= leave] + [leave] * (leave not in self.bank.depths):
            self.span(depth, stop)
            depth = stop
            if depth in self.bank.depths:
                self.note(depth, self.bank.catch_up(site(depth), self.newest(depth), [self.cache])[0])
        if leave < 4:
            self.cache.group.owe(leave, self.newest(leave))
        self.at += rows
        self.cache.group.balance()

    def newest(self, depth):
        return self.h[depth, :, self.at : self.at + self.rows]

    def note(self, depth, confidences):
        for name, p_BT in confidences.items():
            for i in range(self.rows):
                self.seen[depth, name][self.at + i] = p_BT[:, i]

    def check(self):
        for (depth, name), seen in self.seen.items():
            memory = Memory(self.cache.pad_B)
            whole_BT = self.bank.gates(depth)[name].score(sequence(self.h[depth]), memory)
            for position, p_B in seen.items():
                live_B = torch.ones_like(p_B, dtype=torch.bool)
                if self.cache.pad_B is not None:
                    live_B = position >= self.cache.pad_B
                torch.testing.assert_close(p_B[live_B], whole_BT[live_B, position], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("pad_B", [None, torch.tensor([3, 0])], ids=["whole", "padded"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_leaves_early_gates_read_every_position_in_order(seed, pad_B):
    bank = stirred({1: Exit(gates=[SMALL]), 2: Exit(gates=[ATTENTION, SMALL]), 3: Exit(gates=[SMALL])})
    run, choice = Run(bank, 40, pad_B=pad_B), random.Random(seed)
    run.go(5, 4)  # the prompt, at full depth
    while run.at < 40:
        run.go(min(choice.choice([1, 1, 1, 3]), 40 - run.at), choice.choice([1, 1, 2, 3, 4]))
    run.check()
    assert len(run.seen[1, "MambaGate"]) == 40
    assert 5 < len(run.seen[3, "MambaGate"]) < 40


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_rollback_forgets_and_kept_positions_are_read_again(keep):
    bank = stirred({2: Exit(gates=[SMALL, ATTENTION])})
    run = Run(bank, 12)
    run.go(4, 4)
    before = run.cache.snapshot()
    for _ in range(3):
        run.go(1, 4)
    run.cache.rollback(before, keep=keep)
    run.at = 4 + keep
    bank.advance(site(2), run.h[2, :, 4 : run.at], run.cache)
    run.h[:, :, run.at :] = torch.randn_like(run.h[:, :, run.at :])
    run.seen = {key: {t: p_B for t, p_B in seen.items() if t < run.at} for key, seen in run.seen.items()}
    run.go(2, 2)
    run.go(1, 4)
    run.check()


@torch.no_grad()
def test_filled_positions_are_read_as_what_they_came_in_as():
    bank = stirred({1: Exit(), 3: Exit(gates=[SMALL, ATTENTION])})
    h_BTD, cache = torch.randn(1, 6, WIDTH).double(), Cache(Span(0, 4))
    for position in range(6):
        row_B1D = h_BTD[:, position : position + 1]
        cache.group.filled = [position + 1] * 4
        if position % 2:
            bank.advance(site(3), row_B1D, cache)
        else:
            last, _ = bank.catch_up(site(3), row_B1D, [cache])
    for name, gate in bank.gates(3).items():
        torch.testing.assert_close(last[name][:, 0], gate.score(sequence(h_BTD[:, :5]))[:, -1], rtol=1e-12, atol=1e-12)
        assert cache.memories[3, name].read == 6


@torch.no_grad()
def test_positions_that_left_nothing_behind_are_passed_over():
    bank = stirred({3: Exit(gates=[SMALL, ATTENTION])})
    h_BTD, cache = torch.randn(1, 6, WIDTH).double(), Cache(Span(0, 4))
    for position in (0, 1, 4, 5):  # 2 and 3 were skipped without a trace
        cache.group.filled = [position + 1] * 4
        last, _ = bank.catch_up(site(3), h_BTD[:, position : position + 1], [cache])
    wanted = bank.gates(3)["MambaGate"].score(sequence(h_BTD[:, [0, 1, 4, 5]]))[:, -1:]
    torch.testing.assert_close(last["MambaGate"], wanted, rtol=1e-12, atol=1e-12)
    assert cache.memories[3, "MambaGate"].read == 6
