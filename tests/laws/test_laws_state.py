"""Law 4: after any sequence of exits the settled state is what one full pass leaves, and the books balance."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dynamax.backbones.cache import Cache
from dynamax.backbones.hf import HFBackbone
from dynamax.decoding.sampling import Greedy
from dynamax.decoding.session import Session
from dynamax.policies.schedule import AtDepth
from dynamax.types import Memory, Span
from tests.float64 import upcast64
from tests.laws.house import DEPTH, exits, padded, pair, prompt
from tests.states import CLOSE, reference, row_of, same, state
from tests.tiny import FAMILIES, RECURRENT


def balanced(cache: Cache) -> None:
    cache.group.balance()
    assert cache.filled == sorted(cache.filled, reverse=True), "fill levels never rise with depth"


def wander(backbone: HFBackbone, text_BT: Tensor, cache: Cache, seed: int) -> None:
    """Feed a text in pieces of 1 to 7 positions that stop at random depths, in spans cut at random."""
    dice, at = random.Random(seed), 0
    while at < text_BT.shape[1]:
        piece_BT = text_BT[:, at : at + dice.choice([1, 1, 2, 3, 7])]
        depth = dice.randint(1, DEPTH)
        cuts = sorted({0, depth, *(dice.randint(0, depth) for _ in range(2))})
        h_BTD = backbone.embed(piece_BT, cache)
        for start, stop in zip(cuts, cuts[1:], strict=False):
            h_BTD = backbone.run(h_BTD, Span(start, stop), cache)
        if depth < DEPTH:
            cache.group.owe(depth, h_BTD)
        at += piece_BT.shape[1]
        balanced(cache)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_settled_state_is_that_of_one_full_pass(family: str, seed: int) -> None:
    with upcast64(), torch.inference_mode():
        model, backbone = pair(family)
        text_BT = prompt(41, seed=seed)
        cache = backbone.new_cache(capacity=4)
        wander(backbone, text_BT, cache, seed)
        backbone.settle(cache)
        balanced(cache)
        assert cache.filled == [41] * DEPTH
        for cell, wanted in zip(cache.states, reference(model, text_BT), strict=True):
            same(state(cell, 41), wanted)


@pytest.mark.parametrize("family", ["llama", "mistral-eager", "gemma3_text", "gpt2", "phi3", *RECURRENT])
def test_settled_state_of_padded_rows(family: str) -> None:
    """Each row's is that of the row alone."""
    with upcast64(), torch.inference_mode():
        model, backbone = pair(family)
        text_BT, pad_B = padded((30, 26, 19))
        cache = backbone.new_cache(pad_B=pad_B)
        wander(backbone, text_BT, cache, seed=3)
        backbone.settle(cache)
        for row, pad in enumerate(pad_B.tolist()):
            alone = reference(model, text_BT[row : row + 1, pad:])
            for cell, wanted in zip(cache.states, alone, strict=True):
                same(row_of(state(cell, 30), row, pad), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_a_step_leaves_with_is_the_full_passes(family: str) -> None:
    with upcast64(), torch.inference_mode():
        _, backbone = pair(family)
        text_BT, dice = prompt(30), random.Random(1)
        whole = [backbone.embed(text_BT)]
        for index in range(DEPTH):
            whole.append(backbone.run(whole[-1], Span(index, index + 1)))
        cache = backbone.new_cache()
        for at in range(30):
            depth = dice.randint(1, DEPTH)
            h_BTD = backbone.run(backbone.embed(text_BT[:, at : at + 1], cache), Span(0, depth), cache)
            torch.testing.assert_close(h_BTD[:, 0], whole[depth][:, at], **CLOSE)
            if depth < DEPTH:
                cache.group.owe(depth, h_BTD)


@pytest.mark.parametrize("family", FAMILIES)
def test_rollback_at_every_place_is_as_if_it_had_not_been(family: str) -> None:
    with upcast64(), torch.inference_mode():
        _, backbone = pair(family)
        text_BT, wrong_BT = prompt(20), prompt(7, seed=9)
        for keep in (0, 1, 4, 7):
            cache = backbone.new_cache(capacity=8)
            wander(backbone, text_BT[:, :12], cache, seed=keep)
            before = cache.snapshot()
            kept_BT = torch.cat([text_BT[:, 12 : 12 + keep], wrong_BT[:, keep:]], 1)
            wander(backbone, kept_BT, cache, seed=keep + 1)
            cache.rollback(before, keep)
            balanced(cache)
            assert cache.length == 12 + keep
            wander(backbone, text_BT[:, 12 + keep :], cache, seed=keep + 2)
            backbone.settle(cache)
            never = backbone.new_cache()
            backbone.run(backbone.embed(text_BT, never), Span(0, DEPTH), never)
            for cell, untouched in zip(cache.states, never.states, strict=True):
                same(state(cell, 20), state(untouched, 20))


@pytest.mark.parametrize("batch", [1, 3])
def test_recurrent_gates_read_what_a_full_pass_shows_them(batch: int) -> None:
    """Gates catch up with debts, and return to a mark, as blocks do."""
    with upcast64(), torch.inference_mode():
        _, backbone = pair("llama")
        bank = exits(backbone)
        text_BT, pad_B = (prompt(40), None) if batch == 1 else padded((40, 33, 25))
        session = Session(backbone, bank, Greedy(), text_BT[:, :9], max_new_tokens=31, capacity=40, pad_B=pad_B)
        cache, dice, at = session.cache, random.Random(5), 9
        session.prefill()
        while at < 40:
            session.snapshot()
            rows = dice.choice([1, 2, 3])
            for row in range(at, min(at + rows, 40)):
                leave_at = AtDepth(dice.choice([2, 3, 5]))
                arrival = session.run_to_exit(leave_at, text_BT[:, row])
                cache.group.owe(arrival.depth, arrival.h_BTD)
            session.settle()
            keep = dice.randint(1, min(rows, 40 - at))
            session.rollback(keep)
            at += keep
        h_BTD, below = backbone.embed(text_BT, backbone.new_cache(pad_B=pad_B)), 0
        whole = backbone.new_cache(pad_B=pad_B)
        for depth in bank.depths:
            h_BTD = backbone.run(h_BTD, Span(below, depth), whole)
            below = depth
            for name in ("MambaGate", "AttentionGate"):
                memory, alone = cache.memories[depth, name], Memory(pad_B)
                assert memory.read == 40
                bank.gates(depth)[name].score(bank.sequence(backbone.site(depth), h_BTD, 0), alone)
                for key, value in alone.values.items():
                    torch.testing.assert_close(memory.values[key], value, rtol=1e-12, atol=1e-10)


def test_a_forgotten_debt_is_caught() -> None:
    _, backbone = pair("llama")
    cache = backbone.new_cache()
    backbone.run(backbone.embed(prompt(3), cache), Span(0, 2), cache)
    with pytest.raises(AssertionError, match="block 2 has seen 0 positions"):
        backbone.run(backbone.embed(prompt(1), cache), Span(0, 2), cache)
