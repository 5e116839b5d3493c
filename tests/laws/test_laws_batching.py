"""Requests side by side: each gets the steps it would get alone, whenever it joins and wherever others leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.packed import pack
from dynamax.backbones.skipped_state import CopyToken, Exact, Propagate, Skip, SkippedState
from dynamax.decoding import batching
from dynamax.decoding.base import Decoder
from dynamax.decoding.batching import Scheduler
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.sampling import Greedy, Sampled, Sampler
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.errors import UserError
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.gates import AttentionGate, LinearGate, MambaGate
from dynamax.heads.lenses import LogitLens
from dynamax.kernels.products import Rows
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.candidates import CandidateMargin, CandidateProb
from dynamax.policies.combine import AnyOf
from dynamax.policies.confidence import MaxProb, Patience, Saturation
from dynamax.policies.schedule import AtDepth
from dynamax.types import Evidence, Step
from tests.float64 import upcast64
from tests.laws.house import fresh_pair, generate, loud, pair, prompt
from tests.tiny import DISTINCT, FAMILIES

LENGTHS = (9, 4, 1, 5, 12)
END = (3,)


class Scattered(TerminationPolicy):
    """Leaves by a hash of the hidden state and of what recurrent gates say: any error in either changes where."""

    gates = ("MambaGate", "AttentionGate", "LinearGate")

    def __call__(self, evidence: Evidence) -> Tensor:
        hash_B = (evidence.hidden.sum(-1) * 1000).sin()
        return hash_B + evidence.confidence("MambaGate") + 0.5 * evidence.confidence("AttentionGate") > 0.7


def bank_of(backbone: HFBackbone, *gates: type) -> ExitBank:
    exit_ = Exit(lens=LogitLens, gates=list(gates))
    return loud(ExitBank(dict.fromkeys((2, 3, 5), exit_), backbone.site).double().requires_grad_(False))


def limit(place: int) -> int:
    return 4 + 2 * place


def alone(decoder: Decoder, place: int) -> list[Step]:
    decoder.sampler.restart(place)
    prompt_1T = prompt(LENGTHS[place], seed=place)
    return list(decoder.decode(prompt_1T, max_new_tokens=limit(place), eos_token_id=END))


def together(decoder: Decoder, rows: int, samplers: list[Sampler] | None = None) -> list[list[Step]]:
    scheduler = Scheduler(decoder, rows)
    found: dict[int, list[Step]] = {}
    for place, length in enumerate(LENGTHS):
        sampler = None if samplers is None else samplers[place]
        ticket = scheduler.submit(
            prompt(length, seed=place), max_new_tokens=limit(place), eos_token_id=END, sampler=sampler
        )
        found[ticket] = []
    while scheduler.busy:
        told = scheduler.step()
        assert len(told) <= 2 * rows
        for each in told:
            found[each.ticket].append(each.step)
            last = len(found[each.ticket]) == limit(each.ticket - 1) or int(each.step.token_B) in END
            assert each.ended == last
    return list(found.values())


def check_same(decoder: Decoder, rows: int = 3, *, tolerance: float = 1e-9) -> set[int]:
    """Every step of every request against those that it has alone; the depths where rows left."""
    depths = set()
    for place, steps in enumerate(together(decoder, rows)):
        wanted = alone(decoder, place)
        assert [int(step.token_B) for step in steps] == [int(step.token_B) for step in wanted]
        for mine, other in zip(steps, wanted, strict=True):
            assert mine.depth == other.depth
            assert mine.work == other.work
            assert mine.logits_read == other.logits_read
            assert mine.gates_read == other.gates_read
            torch.testing.assert_close(mine.logits_BV, other.logits_BV, rtol=tolerance, atol=tolerance)
        depths |= {step.depth for step in steps}
    return depths


@pytest.mark.parametrize("family", FAMILIES)
def test_full_depth_is_generate(family: str) -> None:
    with upcast64():
        model, backbone = pair(family)
        for place, steps in enumerate(together(Full(backbone), 3)):
            wanted = generate(model, prompt(LENGTHS[place], seed=place), limit(place))[0].tolist()
            said = [int(step.token_B) for step in steps]
            assert said == wanted[: len(said)]
            assert len(said) == limit(place) or said[-1] in END


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "family"),
    [
        *((Exact, family) for family in DISTINCT),
        *((Propagate, family) for family in ("llama", "gpt2", "gemma3_text", "mamba2", "falcon_h1", "lfm2")),
    ],
)
def test_rows_that_leave_alone_say_what_they_say_alone(family: str, rule: type[SkippedState]) -> None:
    with upcast64():
        backbone = pair(family)[1]
        decoder = EarlyExit(
            backbone, bank_of(backbone, LinearGate, MambaGate, AttentionGate), Scattered(), skipped_state=rule()
        )
        depths = check_same(decoder)
        assert len(depths) > 2, "rows left at several depths"


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gpt2", "mixtral", "mamba", "mamba2", "jamba", "nemotron_h", "falcon_h1", "lfm2"]
)
def test_recorded_steps(family: str) -> None:
    with upcast64():
        backbone = fresh_pair(family)[1]
        pack(backbone, Rows)
        decoder = EarlyExit(backbone, bank_of(backbone, LinearGate, MambaGate, AttentionGate), Scattered())
        for rows in (1, 4):
            check_same(decoder, rows)


@pytest.mark.parametrize(
    "policy",
    [
        Patience(2),
        Saturation(0.95),
        CandidateProb(0.2, frequent=0),
        CandidateProb(0.2, frequent=9),
        AtDepth(3),
        AnyOf([CandidateProb(0.3, frequent=5), MaxProb(0.06)]),
        AnyOf([CandidateProb(0.3, frequent=5), CandidateMargin(0.1, frequent=0), MaxProb(0.06)]),
    ],
    ids=lambda policy: policy.label,
)
def test_policies_that_look_at_earlier_exits_and_steps(policy: TerminationPolicy) -> None:
    with upcast64():
        backbone = pair("llama")[1]
        decoder = EarlyExit(backbone, bank_of(backbone), policy)
        for place, steps in enumerate(together(decoder, 3)):
            wanted = alone(decoder, place)
            assert [int(step.token_B) for step in steps] == [int(step.token_B) for step in wanted]
            assert [step.depth for step in steps] == [step.depth for step in wanted]


def test_each_request_draws_from_its_own_sampler() -> None:
    with upcast64():
        backbone = pair("llama")[1]
        samplers: list[Sampler] = [Sampled(1.5, seed=place) for place in range(len(LENGTHS))]
        samplers[2] = Greedy()
        found = together(Full(backbone), 3, samplers)
        for place, steps in enumerate(found):
            again = Sampled(1.5, seed=place) if place != 2 else Greedy()
            prompt_1T = prompt(LENGTHS[place], seed=place)
            wanted = Full(backbone, sampler=again).decode(prompt_1T, max_new_tokens=limit(place), eos_token_id=END)
            assert [int(step.token_B) for step in steps] == [int(step.token_B) for step in wanted]


def test_a_cancelled_request_changes_nothing_for_the_others() -> None:
    with upcast64():
        backbone = pair("mamba2")[1]
        decoder = Full(backbone)
        scheduler = Scheduler(decoder, 2)
        tickets = [scheduler.submit(prompt(n, seed=place), max_new_tokens=8) for place, n in enumerate(LENGTHS[:4])]
        found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
        scheduler.cancel(tickets[2])  # still waiting
        for turn in range(30):
            if turn == 3:
                scheduler.cancel(tickets[0])  # running
            for each in scheduler.step():
                found[each.ticket].append(int(each.step.token_B))
        scheduler.cancel(99)
        assert not scheduler.busy
        assert scheduler.step() == []
        assert found[tickets[2]] == []
        assert len(found[tickets[0]]) == 3
        for place in (1, 3):
            wanted = decoder.decode(prompt(LENGTHS[place], seed=place), max_new_tokens=8)
            assert found[tickets[place]] == [int(step.token_B) for step in wanted]


def test_blocks_run_for_the_rows_that_want_them_alone() -> None:
    """Two rows leave at 2, one goes to the top: four blocks above see one row."""
    with upcast64():
        model, backbone = fresh_pair("llama")
        decoder = EarlyExit(backbone, bank_of(backbone), FirstRowStays())
        scheduler = Scheduler(decoder, 3)
        for place in range(3):
            scheduler.submit(prompt(5, seed=place), max_new_tokens=3)
        scheduler.step()  # the prompts
        seen: list[tuple[int, int]] = []
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda _, args, index=index: seen.append((index, len(args[0]))))
        scheduler.step()
        assert seen == [(0, 3), (1, 3), (2, 1), (3, 1), (4, 1), (5, 1)]


def test_prompts_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 20 positions at most; one chunk a step where rows are running, which wait for it."""
    monkeypatch.setattr(batching, "PROMPT_POSITIONS", 20)
    with upcast64():
        model, backbone = fresh_pair("llama")
        seen: list[tuple[int, ...]] = []
        model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
        scheduler = Scheduler(Full(backbone), 16)
        for length in (9, 4, 1, 5, 12):
            scheduler.submit(prompt(length), max_new_tokens=20)
        assert len(scheduler.step()) == 5
        assert seen == [(2, 9), (2, 5), (1, 12)]
        for length in (25, 3, 4):
            scheduler.submit(prompt(length), max_new_tokens=20)
        assert [len(scheduler.step()) for _ in range(3)] == [5 + 1, 6 + 2, 8]
        assert seen[3:] == [(5, 1), (1, 25), (6, 1), (2, 4), (8, 1)]


def test_where_more_wait_than_rows_are_free_some_join_together() -> None:
    with upcast64():
        scheduler = Scheduler(Full(pair("llama")[1]), 16)
        tickets = [scheduler.submit(prompt(3), max_new_tokens=20) for _ in range(18)]
        assert len(scheduler.step()) == 16
        scheduler.cancel(tickets[0])
        assert len(scheduler.step()) == 15, "an eighth of the rows is two"
        scheduler.cancel(tickets[3])
        assert len(scheduler.step()) == 14 + 2
        scheduler.cancel(tickets[4])
        last = scheduler.submit(prompt(3), max_new_tokens=20)
        assert last in [each.ticket for each in scheduler.step()], "no other waits for it to be read with"


@pytest.mark.parametrize("family", ["llama", "mamba2", "zamba2", "gpt2"])
def test_states_that_are_kept_are_those_of_one_pass(family: str) -> None:
    """Of prompt and answer, the last token included; rows that ended by an end token and by their limit."""
    with upcast64():
        backbone = pair(family)[1]
        scheduler = Scheduler(Full(backbone), 3, keep=(2, 6))
        asked = [prompt(n, seed=place) for place, n in enumerate(LENGTHS)]
        end = int(list(Full(backbone).decode(asked[0], max_new_tokens=3))[-1].token_B)  # ends the first at its third
        tickets = [scheduler.submit(each, max_new_tokens=5, eos_token_id=(end,)) for each in asked]
        said: dict[int, list[int]] = {ticket: [] for ticket in tickets}
        states = {}
        while scheduler.busy:
            for told in scheduler.step():
                said[told.ticket].append(int(told.step.token_B))
                assert bool(told.states) == told.ended
                if told.ended:
                    states[told.ticket] = told.states
        assert {len(each) for each in said.values()} > {5}
        for prompt_1T, ticket in zip(asked, tickets, strict=True):
            whole_1T = torch.cat([prompt_1T, torch.tensor([said[ticket]])], 1)
            for depth, h_1TD in backbone.walk(backbone.embed(whole_1T), [2, 6]):
                torch.testing.assert_close(states[ticket][depth], h_1TD, rtol=1e-9, atol=1e-9)


class FirstRowStays(TerminationPolicy):
    """The first row of a batch goes on, the others leave."""

    def __call__(self, evidence: Evidence) -> Tensor:
        return torch.arange(len(evidence.hidden)) > 0


def test_what_cannot_be_done_is_refused() -> None:
    with upcast64():
        backbone = pair("llama")[1]
        bank = bank_of(backbone)
        for decoder in (
            SelfSpeculative(backbone, bank, AtDepth(2)),
            EarlyExit(backbone, bank, AtDepth(2), skipped_state=Skip()),
            EarlyExit(backbone, bank, AtDepth(2), skipped_state=CopyToken()),
        ):
            with pytest.raises(UserError, match="in step"):
                Scheduler(decoder)
        with pytest.raises(UserError, match="rows is 0"):
            Scheduler(Full(backbone), 0)
        with pytest.raises(UserError, match="no states to keep"):
            Scheduler(EarlyExit(backbone, bank, AtDepth(2)), keep=(2,))
        scheduler = Scheduler(Full(backbone))
        with pytest.raises(UserError, match="one prompt"):
            scheduler.submit(prompt(4, batch=2), max_new_tokens=3)
        with pytest.raises(UserError, match="context"):
            scheduler.submit(prompt(4), max_new_tokens=backbone.spec.context)
        with pytest.raises(UserError, match="vocabulary"):
            scheduler.submit(prompt(4) + 1000, max_new_tokens=3)
        assert not scheduler.busy, "nothing that was refused waits"
