"""Laws 1, 2, 3 and 5: what decoders say, whatever exits, policies and drafts; and how many blocks they call."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.skipped_state import CopyLayer, CopyToken, Propagate, Skip, SkippedState
from dynamax.decoding.base import Decoder
from dynamax.decoding.drafting import Speculative
from dynamax.decoding.drafts import DraftSource, Suggestion
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.sampling import Greedy, Sampled
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.decoding.verification import verify
from dynamax.policies.schedule import AtDepth, Never
from dynamax.types import Span
from tests.float64 import upcast64
from tests.laws.house import DEPTH, Dice, Listener, exits, fresh_pair, generate, padded, pair, prompt
from tests.tiny import DISTINCT, FAMILIES, RECURRENT

LIMIT = 12
ATTENTION = ("llama", "mistral", "gpt2", "phi3", "gpt_neox")


def tokens(decoder: Decoder, prompt_BT: Tensor, limit: int = LIMIT, pad_B: Tensor | None = None) -> Tensor:
    return torch.stack([step.token_B for step in decoder.decode(prompt_BT, max_new_tokens=limit, pad_B=pad_B)], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_never_leaving_is_generate(family: str) -> None:
    with upcast64():
        model, backbone = pair(family)
        bank = exits(backbone)
        for length in (1, 9):
            wanted = generate(model, prompt(length), LIMIT)
            assert tokens(EarlyExit(backbone, bank, Never()), prompt(length)).equal(wanted)
            assert tokens(Full(backbone), prompt(length)).equal(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_are_generate(family: str) -> None:
    with upcast64():
        model, backbone = pair(family)
        rows, pad_B = padded()
        wanted = generate(model, rows, LIMIT, pad_B)
        assert tokens(EarlyExit(backbone, exits(backbone), Never()), rows, pad_B=pad_B).equal(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_is_generate(family: str) -> None:
    with upcast64():
        model, backbone = pair(family)
        bank, start = exits(backbone), prompt(9)
        for policy, drafts in ((Dice(0.9), 4), (Listener(), 1)):
            decoder = SelfSpeculative(backbone, bank, policy, draft_limit=drafts)
            assert tokens(decoder, start).equal(generate(model, start, LIMIT))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", *RECURRENT])
def test_lossless_padded_rows_are_generate(family: str) -> None:
    with upcast64():
        model, backbone = pair(family)
        rows, pad_B = padded()
        decoder = SelfSpeculative(backbone, exits(backbone), Dice(0.7), draft_limit=3)
        assert tokens(decoder, rows, pad_B=pad_B).equal(generate(model, rows, LIMIT, pad_B))


class Foreknown(DraftSource):
    """Knows how the texts go on, and says something else a third of the time."""

    def __init__(self, texts_BT: Tensor) -> None:
        self.texts, self.dice = texts_BT.tolist(), torch.Generator().manual_seed(5)
        self.length = 0

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        self.starts = [len(prompt) for prompt in prompts]

    def add(self, row: int, text: Sequence[int]) -> None:
        known = self.texts[row][: len(text) - self.starts[row]]
        assert list(text[self.starts[row] :]) == known, "a source is told the text as it is"

    def suggest(self, row: int, text: Sequence[int]) -> Suggestion | None:
        place = len(text) - self.starts[row]
        if place >= len(self.texts[row]):
            return None
        lie = bool(torch.rand((), generator=self.dice) < 0.35)
        return Suggestion((self.texts[row][place] + lie) % 61, 2)


def drafting(backbone: HFBackbone, source: DraftSource, *, with_exits: bool, limit: int = 4) -> Speculative:
    """A decoder that takes every draft on offer, and uses both ways in turn."""
    options = (exits(backbone), Dice(0.7)) if with_exits else (None, None)
    decoder = Speculative(backbone, *options, sources=[source], draft_limit=limit)
    turn = itertools.cycle(["sources", "sources", "exits"])
    decoder.pace.length = len  # type: ignore[method-assign,assignment]
    decoder.pace.way = lambda ways: next(turn)  # type: ignore[method-assign]
    return decoder


@pytest.mark.parametrize("family", DISTINCT)
def test_drafts_of_sources_change_no_token(family: str) -> None:
    with upcast64():
        model, backbone = pair(family)
        for limit, with_exits in ((4, False), (4, True)):
            wanted = generate(model, prompt(9), LIMIT)
            decoder = drafting(backbone, Foreknown(wanted), with_exits=with_exits, limit=limit)
            steps = list(decoder.decode(prompt(9), max_new_tokens=LIMIT))
            assert torch.stack([step.token_B for step in steps], 1).equal(wanted)
            assert any(step.accepted for step in steps)
            passes = sum(step.work.calls[-1] for step in steps)
            assert passes + sum(step.accepted for step in steps) >= LIMIT


@pytest.mark.parametrize("family", ["llama", "gemma3_text", *RECURRENT])
def test_drafts_of_sources_in_a_batch(family: str) -> None:
    """Padded rows, in step."""
    with upcast64():
        model, backbone = pair(family)
        rows, pad_B = padded()
        wanted = generate(model, rows, LIMIT, pad_B)
        decoder = drafting(backbone, Foreknown(wanted), with_exits=True)
        assert tokens(decoder, rows, pad_B=pad_B).equal(wanted)


def test_rows_that_have_ended_hold_no_draft_back() -> None:
    with upcast64():
        model, backbone = pair("llama")
        rows = prompt(6, batch=3)
        wanted = generate(model, rows, LIMIT)
        end = int(wanted[0, 2])
        full = list(Full(backbone).decode(rows, max_new_tokens=LIMIT, eos_token_id=[end]))
        source = Foreknown(wanted)
        source.add = lambda row, text: None  # type: ignore[method-assign]
        steps = list(
            drafting(backbone, source, with_exits=False).decode(rows, max_new_tokens=LIMIT, eos_token_id=[end])
        )
        assert [step.token_B.tolist() for step in steps] == [step.token_B.tolist() for step in full]
        assert any(step.accepted for step in steps[4:])


@pytest.mark.slow
def test_drafts_are_both_kept_and_rejected() -> None:
    """The tests above would prove nothing if every draft were right, or every one wrong."""
    with upcast64():
        _, backbone = pair("llama")
        steps = list(
            SelfSpeculative(backbone, exits(backbone), Dice(0.9), draft_limit=4).decode(prompt(9), max_new_tokens=100)
        )
        kept = sum(step.accepted for step in steps)
        calls = sum(sum(step.work.calls) for step in steps[1:])
        assert kept > 0
        assert calls > (len(steps) - 1 - kept) * DEPTH, "rejected drafts cost calls of their own"


@pytest.mark.slow
def test_verification_draws_from_the_full_model() -> None:
    """Speculative sampling's promise, over 20,000 rounds of one row: drafts from q, tokens from p."""
    rounds = 20_000
    p_V, q_V = torch.tensor([0.5, 0.2, 0.3, 0.0]), torch.tensor([0.1, 0.6, 0.1, 0.2])
    drafts = torch.multinomial(q_V, rounds, replacement=True, generator=torch.Generator().manual_seed(0))
    sampler, ended_B = Sampled(seed=1), torch.zeros(1, dtype=torch.bool)
    counts = torch.zeros(4)
    for draft in drafts:
        kept, token_B = verify(p_V.expand(1, 2, 4), [q_V[None]], draft.view(1, 1), ended_B, sampler)
        counts[draft if kept else token_B[0]] += 1
    assert torch.allclose(counts / rounds, p_V, atol=4 * (0.25 / rounds) ** 0.5)


def test_rows_kept_back_by_another_keep_their_drafts() -> None:
    """Row 1 rejects, row 0 would have accepted: both go on after the same position, row 0 with its draft."""
    p_B2V = torch.tensor([[[0.0, 1.0, 0.0]] * 2, [[0.0, 0.0, 1.0]] * 2])
    q_BV = torch.tensor([[0.0, 1.0, 0.0]] * 2)
    kept, token_B = verify(p_B2V, [q_BV], torch.tensor([[1], [1]]), torch.zeros(2, dtype=torch.bool), Greedy())
    assert kept == 0
    assert token_B.tolist() == [1, 2]


@pytest.mark.parametrize("family", DISTINCT)
def test_a_split_gives_the_same_tokens(family: str) -> None:
    with upcast64():
        model, backbone = pair(family)
        wanted = generate(model, prompt(9), 8)
        for depth in (1, 3, 5):
            below, above = backbone.new_cache(span=Span(0, depth)), backbone.new_cache(span=Span(depth, DEPTH))
            feed_BT, got = prompt(9), []
            for _ in range(8):
                h_BTD = backbone.run(backbone.embed(feed_BT, below), Span(0, depth), below)
                h_BTD = _over_the_wire(h_BTD)
                h_BTD = backbone.run(h_BTD, Span(depth, DEPTH), above)
                feed_BT = backbone.unembed(h_BTD[:, -1:])[:, -1:].argmax(-1)
                got.append(feed_BT)
            assert torch.cat(got, 1).equal(wanted)


@pytest.mark.slow
def test_a_split_between_two_processes_gives_the_same_tokens() -> None:
    with upcast64():
        model, backbone = pair("llama")
        wanted = generate(model, prompt(9), 8)
        here, there = multiprocessing.Pipe()
        other = multiprocessing.get_context("spawn").Process(target=_upper_half, args=(there, 2), daemon=True)
        other.start()
        below, feed_BT, got = backbone.new_cache(span=Span(0, 2)), prompt(9), []
        for _ in range(8):
            h_BTD = backbone.run(backbone.embed(feed_BT, below), Span(0, 2), below)
            here.send_bytes(h_BTD.contiguous().numpy().tobytes())
            feed_BT = torch.tensor([[int.from_bytes(here.recv_bytes(), "little")]])
            got.append(feed_BT)
        here.send_bytes(b"end")
        other.join(30)
        assert torch.cat(got, 1).equal(wanted)


def _upper_half(wire: Connection, depth: int) -> None:
    with upcast64():
        _, backbone = pair("llama")
        above = backbone.new_cache(span=Span(depth, DEPTH))
        while (raw := wire.recv_bytes()) != b"end":
            h_BTD = torch.frombuffer(bytearray(raw), dtype=torch.float64).view(1, -1, backbone.spec.width)
            token = backbone.unembed(backbone.run(h_BTD, Span(depth, DEPTH), above)[:, -1:]).argmax()
            wire.send_bytes(int(token).to_bytes(4, "little"))


def _over_the_wire(h_BTD: Tensor) -> Tensor:
    """To bytes and back."""
    raw = bytearray(h_BTD.contiguous().numpy().tobytes())
    return torch.frombuffer(raw, dtype=h_BTD.dtype).reshape(h_BTD.shape)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma2", *RECURRENT])
def test_a_step_that_leaves_at_d_calls_d_blocks(family: str) -> None:
    with upcast64():
        _, backbone = fresh_pair(family)
        calls: list[int] = []
        for index, block in enumerate(backbone._blocks):
            block.register_forward_hook(lambda *_, index=index: calls.append(index))
        bank = exits(backbone, tuple(range(1, DEPTH)))
        for depth in range(1, DEPTH):
            for number, step in enumerate(
                EarlyExit(backbone, bank, AtDepth(depth)).decode(prompt(9), max_new_tokens=6)
            ):
                wanted = DEPTH if number == 0 else depth
                assert calls == list(range(wanted)) == [i for i, n in enumerate(step.work.calls) if n]
                assert step.depth == wanted
                calls.clear()


COPIED = [(rule, family) for rule in (CopyToken(), CopyLayer()) for family in ATTENTION]
FILLED = [(rule, family) for rule in (Propagate(), Skip()) for family in (*ATTENTION, *RECURRENT)]


@pytest.mark.parametrize(("rule", "family"), COPIED + FILLED)
def test_rules_keep_the_books_and_change_nothing_if_nothing_leaves(rule: SkippedState, family: str) -> None:
    with upcast64():
        model, backbone = pair(family)
        bank = exits(backbone)
        assert tokens(EarlyExit(backbone, bank, Never(), skipped_state=rule), prompt(9)).equal(
            generate(model, prompt(9), LIMIT)
        )
        steps = list(EarlyExit(backbone, bank, Dice(0.5), skipped_state=rule).decode(prompt(9), max_new_tokens=16))
        assert all(sum(step.work.calls) == step.depth for step in steps)
        assert {step.depth for step in steps} == {2, 3, 5, 6}
