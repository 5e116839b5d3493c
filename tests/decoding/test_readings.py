"""What policies read and spend while decoding, counted where the output matrix is multiplied and blocks are called."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dynamax.backbones.hf import HFBackbone
from dynamax.decoding.batching import Scheduler
from dynamax.decoding.early_exit import EarlyExit
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.gates import LinearGate
from dynamax.policies import (
    AllOf,
    AtDepth,
    BetaMixture,
    BetaPair,
    Budget,
    Decaying,
    Entropy,
    GateConfidence,
    JEIGate,
    LatencyBudget,
    MaxProb,
    Never,
    OnlyAt,
    PositionSchedule,
    Random,
    Saturation,
    ScorePolicy,
    TerminationPolicy,
    Voting,
)
from tests.float64 import upcast64
from tests.laws.house import DEPTH, loud, prompt
from tests.laws.house import fresh_pair as pair

GATE = GateConfidence(0.5)
MIXTURES = dict.fromkeys((2, 3, 5), BetaPair((3.0, 2.0), (2.0, 3.0), 0.5))
BLIND: list[TerminationPolicy] = [
    Never(),
    AtDepth(3),
    PositionSchedule(2, deepest=DEPTH, horizon=8),
    Saturation(0.8),
    Random(0.6),
    GATE,
    JEIGate(0.5),
    BetaMixture(0.5, policy=GATE, mixtures=MIXTURES),
    Decaying(Saturation(0.8), temperature=1.0, horizon=8),
    Budget(GATE, 4.0),
    AllOf([GATE, Random(0.3)]),
    OnlyAt(GATE, [3]),
]
"""Policies that need no logits."""


@pytest.fixture
def house() -> Iterator[tuple[HFBackbone, ExitBank]]:
    with upcast64():
        _, backbone = pair("llama")
        bank = ExitBank(dict.fromkeys((2, 3, 5), Exit(gates=[LinearGate])), backbone.site).double()
        yield backbone, loud(bank.requires_grad_(False))


def readings(policy: TerminationPolicy, house: tuple, monkeypatch: pytest.MonkeyPatch) -> tuple[list, int]:
    """The steps behind the prompt's own, and how often the output matrix was multiplied, for the prompt too."""
    counted, project = [], HFBackbone.project
    monkeypatch.setattr(HFBackbone, "project", lambda *given: counted.append(1) or project(*given))
    return list(EarlyExit(*house, policy).decode(prompt(6), max_new_tokens=20))[1:], len(counted)


@pytest.mark.parametrize("policy", BLIND, ids=lambda policy: policy.label)
def test_no_logits_are_read_but_those_of_the_token(policy, house, monkeypatch) -> None:  # noqa: ANN001
    steps, multiplied = readings(policy, house, monkeypatch)
    assert all(step.logits_read == ((step.depth, 1),) for step in steps)
    assert multiplied == 1 + len(steps)
    assert sum(step.depth < DEPTH for step in steps) > 2 or isinstance(policy, Never)


@pytest.mark.parametrize(
    "policy", [MaxProb(1.0), Entropy(1.0, temperature=2.0), Voting(4)], ids=lambda each: each.label
)
def test_the_count_sees_what_other_policies_read(policy, house, monkeypatch) -> None:  # noqa: ANN001
    steps, multiplied = readings(policy, house, monkeypatch)
    read = [(2, 1), (3, 1), (5, 1), (DEPTH, 1)] if isinstance(policy, ScorePolicy) else [(DEPTH, 1)]
    assert all(step.logits_read == tuple(read) for step in steps)
    assert multiplied == 1 + len(steps) * len(read)


@pytest.mark.parametrize("inner", [MaxProb(0.99), MaxProb(0.0), GateConfidence({2: 0.9, 3: 0.1, 5: 0.6}), Random(0.5)])
@pytest.mark.parametrize("blocks", [2.5, 4.0, 5.5])
def test_a_budget_is_met(inner, blocks, house) -> None:  # noqa: ANN001
    """By the bound that its docstring names, counted by the blocks; from thresholds far from what it needs."""
    rate, steps = 0.5, 80
    decoded = list(EarlyExit(*house, Budget(inner, blocks, rate=rate)).decode(prompt(6), max_new_tokens=steps + 1))[1:]
    spent = [sum(step.work.calls) for step in decoded]
    for t in range(1, steps + 1):
        assert abs(sum(spent[:t]) / t - blocks) <= DEPTH * (1 + rate) / (rate * t) + 1e-9
    assert abs(sum(spent) / steps - blocks) < 0.3


def test_rows_of_their_own_have_budgets_of_their_own(house) -> None:  # noqa: ANN001
    policy = Budget(GATE, 4.0, rate=0.5)
    decoder = EarlyExit(*house, policy)
    prompts = [prompt(length, seed=length) for length in (5, 9, 7)]
    alone = [[(int(s.token_B), s.depth) for s in decoder.decode(each, max_new_tokens=12)] for each in prompts]
    scheduler = Scheduler(decoder, rows=2)
    tickets = [scheduler.submit(each, max_new_tokens=12) for each in prompts]
    told: dict[int, list] = {ticket: [] for ticket in tickets}
    while scheduler.busy:
        for each in scheduler.step():
            told[each.ticket].append((int(each.step.token_B), each.step.depth))
    assert [told[ticket] for ticket in tickets] == alone
    assert len({depth for _, depth in alone[0]}) > 1
    assert torch.tensor([[depth for _, depth in row] for row in alone]).unique(dim=0).shape[0] == 3


@pytest.mark.parametrize("target", [2.5, 4.0, 5.5])
def test_a_latency_budget_is_a_budget_of_time(target, house, monkeypatch) -> None:  # noqa: ANN001
    """On a clock that only blocks move, a millisecond a call, it decides as a budget of as many blocks."""
    clock = [0.0]
    block = HFBackbone.block

    def timed(self, *given):  # noqa: ANN001, ANN202
        clock[0] += 0.001
        return block(self, *given)

    monkeypatch.setattr(HFBackbone, "block", timed)
    monkeypatch.setattr("dynamax.decoding.history.perf_counter", lambda: clock[0])
    inner, options = MaxProb(0.7), {"max_new_tokens": 60}
    timely = LatencyBudget(inner, target, rate=0.5 * target / DEPTH)
    found = [step.depth for step in EarlyExit(*house, timely).decode(prompt(6), **options)]
    assert found == [
        step.depth for step in EarlyExit(*house, Budget(inner, target, rate=0.5)).decode(prompt(6), **options)
    ]
    assert len(set(found)) > 2
