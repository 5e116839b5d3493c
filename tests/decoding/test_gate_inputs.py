"""Gates that read more than the hidden state: decoding, one pass over the text, and training see the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from dynamax.backbones.hf import HFBackbone
from dynamax.data.batch import HiddenBatch
from dynamax.decoding.batching import Scheduler
from dynamax.decoding.cost import CostModel
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.heads import (
    CandidateStatistics,
    Exit,
    ExitBank,
    GateInput,
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
from dynamax.policies import GateConfidence
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Evidence
from tests.float64 import upcast64
from tests.laws.house import fresh_pair as pair
from tests.laws.house import loud

DEPTHS = (2, 3, 5)
INPUTS: list[GateInput] = [
    HiddenState(),
    LensStatistics(),
    CandidateStatistics(limit=12),
    TrailStatistics(),
    NgramAgreement(),
    Position(),
    GateScore("MambaGate"),
]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


class Watch(TerminationPolicy):
    """Leaves by a rule of step and depth; keeps what a gate scores, by the exit and the text so far."""

    gates = ("LinearGate",)

    def __init__(self) -> None:
        self.seen: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def __call__(self, evidence: Evidence) -> Tensor:
        assert evidence.past is not None
        for text, score in zip(evidence.past.texts, evidence.score("LinearGate"), strict=True):
            self.seen[evidence.depth, tuple(text)] = score
        leave = (torch.as_tensor(evidence.step) * 7 + evidence.depth) % 3 == 0
        return leave.expand(evidence.hidden.shape[:1])


@pytest.fixture(params=["llama", "mamba2"])
def backbone(request: pytest.FixtureRequest) -> Iterator[HFBackbone]:
    with upcast64():
        yield pair(request.param)[1]


def bank_of(backbone: HFBackbone, part: GateInput) -> ExitBank:
    exit_ = Exit(TunedLens, [partial(LinearGate, inputs=[part]), partial(MambaGate, width=16, d_state=4)])
    return loud(ExitBank(dict.fromkeys(DEPTHS, exit_), backbone.site).double().requires_grad_(False))


def prompts(lengths: tuple[int, ...]) -> list[Tensor]:
    """Of four different tokens, so that they repeat themselves."""
    dice = torch.Generator().manual_seed(1)
    return [torch.randint(0, 4, (length,), generator=dice) for length in lengths]


def compared(
    backbone: HFBackbone, bank: ExitBank, texts: list[list[int]], lengths: tuple[int, ...], watch: Watch
) -> int:
    """How many scores of decoding were compared with those of one pass over each text."""
    count = 0
    for text, start in zip(texts, lengths, strict=True):
        read = TeacherForcedPass(backbone, bank, torch.tensor([text]), start=start - 1)
        for evidence in read.exits:
            for place, score in enumerate(evidence.score("LinearGate")):
                known = watch.seen.get((evidence.depth, tuple(text[: start + place])))
                if known is not None:
                    torch.testing.assert_close(known, score, **CLOSE)
                    count += 1
    return count


@pytest.mark.parametrize("part", INPUTS, ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("lengths", [(9,), (9, 6, 4)], ids=["alone", "three-rows"])
def test_decoding_scores_what_one_pass_scores(backbone: HFBackbone, part: GateInput, lengths: tuple[int, ...]) -> None:
    bank, rows = bank_of(backbone, part), prompts(lengths)
    longest = max(lengths)
    pad_B = torch.tensor([longest - length for length in lengths])
    prompt_BT = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    watch = Watch()
    given = {"max_new_tokens": 10, "pad_B": None if len(rows) == 1 else pad_B}
    steps = list(EarlyExit(backbone, bank, watch).decode(prompt_BT, **given))
    assert len({step.depth for step in steps}) > 2
    said_BT = torch.stack([step.token_B for step in steps], 1)
    texts = [row.tolist() + said.tolist() for row, said in zip(rows, said_BT, strict=True)]
    assert compared(backbone, bank, texts, lengths, watch) >= 15 * len(rows)


@pytest.mark.parametrize("part", INPUTS, ids=lambda part: type(part).__name__)
def test_rows_of_their_own_score_what_one_pass_scores(backbone: HFBackbone, part: GateInput) -> None:
    bank, lengths, watch = bank_of(backbone, part), (9, 6, 4), Watch()
    rows = prompts(lengths)
    scheduler = Scheduler(EarlyExit(backbone, bank, watch), 3)
    tickets = [scheduler.submit(row[None], max_new_tokens=8 + place) for place, row in enumerate(rows)]
    said: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    while scheduler.busy:
        for told in scheduler.step():
            said[told.ticket].append(int(told.step.token_B))
    texts = [row.tolist() + said[ticket] for row, ticket in zip(rows, tickets, strict=True)]
    assert compared(backbone, bank, texts, lengths, watch) >= 36


@pytest.mark.parametrize("part", INPUTS, ids=lambda part: type(part).__name__)
def test_drafts_are_scored_as_one_pass_scores(backbone: HFBackbone, part: GateInput) -> None:
    bank, [prompt_T], watch = bank_of(backbone, part), prompts((9,)), Watch()
    steps = list(SelfSpeculative(backbone, bank, watch).decode(prompt_T[None], max_new_tokens=12))
    text = prompt_T.tolist() + [int(step.token_B) for step in steps]
    assert compared(backbone, bank, [text], (9,), watch) >= 12


def stored(backbone: HFBackbone, texts: list[Tensor], prompt: int) -> HiddenBatch:
    """Texts as a store would give them, padded at the right."""
    longest = max(map(len, texts))
    live_BT = torch.arange(longest) < torch.tensor([[len(text)] for text in texts])
    tokens_BT = torch.stack([torch.nn.functional.pad(text, (0, longest - len(text))) for text in texts])
    hidden = dict(backbone.walk(backbone.embed(tokens_BT), [*DEPTHS, backbone.spec.depth]))
    top = backbone.unembed(hidden.pop(backbone.spec.depth)).topk(2, -1)
    places_T, ends_B1 = torch.arange(longest), torch.tensor([[len(text)] for text in texts])
    answer_BT = (places_T >= prompt - 1) & (places_T < ends_B1 - 1)
    numbers_B = torch.arange(len(texts))
    return HiddenBatch(tokens_BT, hidden, top.indices, top.values, live_BT, answer_BT, numbers_B, numbers_B)


@torch.inference_mode()
@pytest.mark.parametrize("part", [*INPUTS, PastExits(tokens=3)], ids=lambda part: type(part).__name__)
def test_training_reads_what_one_pass_reads(backbone: HFBackbone, part: GateInput) -> None:
    bank, texts = bank_of(backbone, part), prompts((14, 9))
    batch = stored(backbone, texts, prompt=4)
    counted_BT = batch.live_BT & batch.answer_BT
    found = bank.known_texts(batch.hidden, {depth: backbone.site(depth) for depth in DEPTHS}, counted_BT, batch.text)
    wanted: dict[int, list[Tensor]] = {depth: [] for depth in DEPTHS}
    for text in texts:
        for evidence in TeacherForcedPass(backbone, bank, text[None, :-1], start=3).exits:
            wanted[evidence.depth].append(part.read(evidence, torch.float64))
    for depth in DEPTHS:
        torch.testing.assert_close(part.read(found[depth], torch.float64), torch.cat(wanted[depth]), **CLOSE)


# -- exits of earlier tokens --------------------------------------------------------------------------------


class Remembers(Watch):
    """Keeps the depths that the input shows instead of a score."""

    gates = ()

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, list[float]]] = []

    def __call__(self, evidence: Evidence) -> Tensor:
        [shares] = PastExits(tokens=3).read(evidence, torch.float64)
        self.shown.append((int(evidence.step), (shares * evidence.total).tolist()))
        return (torch.as_tensor(evidence.step * 7 + evidence.depth) % 3 == 0).expand(1)


@pytest.mark.parametrize("scheduled", [False, True])
def test_past_exits_are_those_of_the_steps_before(backbone: HFBackbone, scheduled: bool) -> None:
    bank, [prompt_T], watch = bank_of(backbone, Position()), prompts((9,)), Remembers()
    decoder = EarlyExit(backbone, bank, watch)
    if scheduled:
        scheduler, steps = Scheduler(decoder, 1), []
        scheduler.submit(prompt_T[None], max_new_tokens=9)
        while scheduler.busy:
            steps += [told.step for told in scheduler.step()]
    else:
        steps = list(decoder.decode(prompt_T[None], max_new_tokens=9))
    depths = [backbone.spec.depth] * 3 + [step.depth for step in steps[1:]]  # the prompt goes to the top
    assert len(set(depths)) > 2
    assert {step for step, _ in watch.shown} == set(range(1, 9))
    for step, shown in watch.shown:
        assert shown == pytest.approx(depths[step + 1 : step - 2 if step > 2 else None : -1][:3])


@torch.inference_mode()
def test_past_exits_of_a_known_text_are_the_first_right_ones(backbone: HFBackbone) -> None:
    bank = bank_of(backbone, Position())
    read = TeacherForcedPass(backbone, bank, prompts((30,))[0][None], start=4)
    right = [[int(token) for token in evidence.token] for evidence in read.exits]
    top = read.top_T.tolist()
    depths = []
    for place in range(1, len(top)):
        agreeing = [depth for depth, said in zip(DEPTHS, right, strict=True) if said[place] == top[place]]
        depths.append(agreeing[0] if agreeing else backbone.spec.depth)
    assert len(set(depths)) > 1
    shares = PastExits(tokens=2).read(read.exits[0], torch.float64) * backbone.spec.depth
    padded = [backbone.spec.depth] * 3 + depths  # what the first position says is decided at the top
    assert shares[:, 0].tolist() == pytest.approx(padded[1 : 1 + len(top)])
    assert shares[:, 1].tolist() == pytest.approx(padded[: len(top)])


def test_a_gate_that_reads_past_exits_is_decoded_and_not_promised(backbone: HFBackbone) -> None:
    bank = bank_of(backbone, PastExits())
    assert not EarlyExit(backbone, bank, GateConfidence(0.5, gate="LinearGate")).teacher_forced
    assert EarlyExit(backbone, bank, GateConfidence(0.5, gate="MambaGate")).teacher_forced


def test_what_inputs_read_is_charged(backbone: HFBackbone) -> None:
    """A gate over candidates reads their rows; when it lets a token leave, all of the matrix says which."""
    bank, [prompt_T] = bank_of(backbone, CandidateStatistics(limit=5)), prompts((9,))
    steps = list(EarlyExit(backbone, bank, Watch()).decode(prompt_T[None], max_new_tokens=8))[1:]
    for step in steps:
        passed = [depth for depth in DEPTHS if depth <= step.depth]
        assert [depth for depth, _ in step.rows_read] == passed
        assert all(1 <= rows <= 5 for _, rows in step.rows_read)
        assert step.logits_read == ((step.depth, 1),)
        assert step.gates_read == tuple((depth, "LinearGate") for depth in passed)
    stacked = bank_of(backbone, GateScore("MambaGate"))
    step = list(EarlyExit(backbone, stacked, Watch()).decode(prompt_T[None], max_new_tokens=3))[-1]
    assert {name for _, name in step.gates_read} == {"LinearGate", "MambaGate"}
    kept, none = stacked.select_gates(["LinearGate"]), stacked.select_gates(())
    spent = CostModel(backbone, kept).step(step, 9).flops
    free = CostModel(backbone, none).step(replace(step, gates_read=()), 9).flops
    rows = step.work.rows
    gates = sum(stacked.gates(depth)["MambaGate"].flops() * rows[depth - 1] for depth in DEPTHS)
    assert spent - free == gates + sum(stacked.gates(depth)["LinearGate"].flops() for depth, _ in step.gates_read[::2])
