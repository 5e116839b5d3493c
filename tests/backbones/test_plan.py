"""Plans that are used again, views and debts at the edges: against a cache that only ever did the plain thing."""

from __future__ import annotations

import pytest
import torch

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.plan import AngleTable
from dynamax.types import Span
from tests.states import same, state
from tests.tiny import tiny

DEPTH = 6
FAMILIES = ["llama", "mistral", "gemma3_text", "gpt2", "mamba2", "falcon_h1", "granitemoehybrid"]


def tokens(length, seed=0):
    return torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(seed))


def fed(backbone, cache, *pieces, span=None):
    for piece_BT in pieces:
        h_BTD = backbone.run(backbone.embed(piece_BT, cache), span or Span(0, DEPTH), cache)
    return h_BTD


@pytest.mark.parametrize("like", [torch.zeros(1, 3, 4, dtype=torch.bfloat16), torch.zeros(1, 3, 4, device="meta")])
def test_a_plan_is_used_again_only_for_rows_of_one_dtype_and_device(like):
    backbone = HFBackbone(tiny("llama-eager"))
    cache = backbone.new_cache()
    first = backbone.plan(torch.zeros(1, 3, 4, dtype=torch.float64), cache, start=5)
    assert backbone.plan(torch.ones(1, 3, 4, dtype=torch.float64), cache, start=5) is first
    again = backbone.plan(like, cache, start=5)
    assert again.positions_BT.device == like.device
    mask = again.mask(None)
    assert mask is not None
    assert (mask.dtype, mask.device) == (like.dtype, like.device)


@pytest.mark.parametrize("name", ["llama", "llama-eager", "mistral-eager", "mamba2", "zamba2"])
def test_padded_rows_of_the_same_places_after_a_rollback(name):
    """The same start and length once more, with other tokens."""
    with torch.inference_mode():
        backbone = HFBackbone(tiny(name))
        pad_B = torch.tensor([0, 3])
        prompt, wrong, right = (tokens(n, seed).expand(2, -1) for n, seed in ((9, 0), (3, 1), (3, 2)))
        cache, plain = backbone.new_cache(pad_B=pad_B), backbone.new_cache(pad_B=pad_B)
        fed(backbone, cache, prompt)
        before = cache.snapshot()
        fed(backbone, cache, wrong)
        cache.rollback(before)
        torch.testing.assert_close(fed(backbone, cache, right), fed(backbone, plain, prompt, right))


@pytest.mark.parametrize("name", FAMILIES)
def test_peeking_changes_nothing(name):
    """With debts below the block and without; and the same places are run afterwards."""
    with torch.inference_mode():
        backbone = HFBackbone(tiny(name))
        for owed in (False, True):
            cache, plain = backbone.new_cache(capacity=4), backbone.new_cache(capacity=4)
            for each in (cache, plain):
                fed(backbone, each, tokens(11))
                if owed:
                    each.group.owe(2, fed(backbone, each, tokens(2, 1), span=Span(0, 2)))
                h_BTD = fed(backbone, each, tokens(1, 2), span=Span(0, 3))
                if each is cache:
                    for _ in range(2):
                        backbone.peek(h_BTD, DEPTH - 1, each)
                backbone.run(h_BTD, Span(3, DEPTH), each)
            for mine, untouched in zip(cache.states, plain.states, strict=True):
                same(state(mine, cache.length), state(untouched, cache.length))


def test_a_block_that_has_seen_the_positions_cannot_peek_at_them():
    backbone = HFBackbone(tiny("llama"))
    cache = backbone.new_cache()
    with torch.inference_mode():
        h_BTD = fed(backbone, cache, tokens(3))
        with pytest.raises(AssertionError, match="a block has been through 1"):
            backbone.peek(h_BTD[:, -1:], DEPTH - 1, cache)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_settles_at_its_own_top(name):
    with torch.inference_mode():
        backbone, part = HFBackbone(tiny(name)), Span(0, 4)
        cache, plain = backbone.new_cache(span=part), backbone.new_cache(span=part)
        for place, depth in enumerate((1, 3, 1)):
            cache.group.owe(depth, fed(backbone, cache, tokens(2, place), span=Span(0, depth)))
        backbone.settle(cache)
        fed(backbone, plain, *(tokens(2, place) for place in range(3)), span=part)
        assert cache.filled == [6] * 4
        for mine, untouched in zip(cache.states, plain.states, strict=True):
            same(state(mine, 6), state(untouched, 6))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba2", "falcon_h1"])
def test_autocast_through_a_cache_is_autocast_without(name):
    """Prompt and steps, some with autocast and some without, over one cache."""
    with torch.inference_mode():
        backbone = HFBackbone(tiny(name, dtype=torch.float32))
        text = tokens(14)
        cache = backbone.new_cache(capacity=4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            whole = backbone.unembed(backbone.run(backbone.embed(text), Span(0, DEPTH)))[:, -1]
            fed(backbone, cache, text[:, :9], *text[:, 9:13].split(1, 1))
            got = backbone.unembed(fed(backbone, cache, text[:, 13:]))[:, -1]
        assert (got - whole).norm() < 0.1 * whole.norm()


def test_debts_are_paid_up_to_the_top_only():
    """Positions that stopped halfway would be in no block's state and owed nowhere."""
    backbone = HFBackbone(tiny("llama"))
    cache = backbone.new_cache()
    with torch.inference_mode():
        cache.group.owe(2, fed(backbone, cache, tokens(3), span=Span(0, 2)))
        with pytest.raises(AssertionError, match="below the top would be lost"):
            list(backbone.walk(None, [4], cache))
        backbone.settle(cache)
        assert list(backbone.walk(None, [4], cache)) == []
    assert cache.filled == [3] * DEPTH


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_angles_from_a_table_are_those_of_the_positions(name):
    backbone = HFBackbone(tiny(name))
    cache, h_BTD = backbone.new_cache(), torch.zeros(1, 1, 4, dtype=torch.float64)
    kinds = set(backbone._rotary_types)
    for start, length in ((0, 3), (3, 1), (62, 4), (2, 1), (100, 1)):
        here_BTD = h_BTD.expand(1, length, 4)
        from_table, alone = backbone.plan(here_BTD, cache, start=start), backbone.plan(here_BTD, start=start)
        for kind in kinds:
            for mine, wanted in zip(from_table.angles(kind), alone.angles(kind), strict=True):
                torch.testing.assert_close(mine, wanted, rtol=0, atol=0)


def test_a_table_asks_for_many_positions_at_once_and_for_none_beyond_the_context():
    asked = []

    def rotary(like, positions_BT, kind):
        asked.append(positions_BT[0].tolist())
        return positions_BT[..., None] + 0.25, positions_BT[..., None] + 0.5

    table = AngleTable(rotary, 300)
    for place in range(300):
        cos, sin = table.span(torch.zeros(1), place, place + 1, None)
        assert (cos.tolist(), sin.tolist()) == ([[[place + 0.25]]], [[[place + 0.5]]])
    assert len(asked) <= 4
    assert all(places == list(range(len(places))) and len(places) <= 300 for places in asked)


def test_padded_rows_have_angles_of_their_own():
    backbone = HFBackbone(tiny("llama"))
    cache = backbone.new_cache(pad_B=torch.tensor([0, 2]))
    cos, _ = backbone.plan(torch.zeros(2, 1, 4, dtype=torch.float64), cache, start=5).angles()
    assert not cos[0].equal(cos[-1])
    assert cos[1].equal(backbone.plan(torch.zeros(1, 1, 4, dtype=torch.float64), start=3).angles()[0][0])
