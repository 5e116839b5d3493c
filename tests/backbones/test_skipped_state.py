"""The rules for skipped state, each against its formula written out by hand from transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dynamax.backbones.cache import Cache
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.plan import StepPlan
from dynamax.backbones.skipped_state import CopyLayer, CopyToken, Exact, Propagate, Skip, SkippedState
from dynamax.types import Span
from tests.float64 import upcast64
from tests.states import State, same, state, told
from tests.tiny import FAMILIES as ALL
from tests.tiny import RECURRENT, tiny

DEPTH, EXIT, LENGTH = 6, 2, 11
FAMILIES = [name for name in ALL if name not in RECURRENT]
CLOSE = {"rtol": 1e-12, "atol": 1e-11}


def left(backbone: HFBackbone, rule: SkippedState, *, ran: bool = False) -> tuple[Cache, Tensor]:
    """A prompt at full depth, then one token that leaves under a rule."""
    tokens = torch.randint(0, 61, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    cache = backbone.new_cache(capacity=4)
    backbone.run(backbone.embed(tokens[:, :LENGTH], cache), Span(0, DEPTH), cache)
    h_BTD = backbone.run(backbone.embed(tokens[:, LENGTH:], cache), Span(0, EXIT), cache)
    rule.leave(backbone, cache, EXIT, h_BTD, last_block_ran=ran)
    cache.group.balance()
    return cache, h_BTD


def by_transformers(backbone: HFBackbone, block: int, h_BTD: Tensor, chunk: StepPlan, held: DynamicCache) -> Tensor:
    """One block as transformers runs it, behind what its own cache holds."""
    options = {
        "attention_mask": None,
        "position_ids": chunk.positions_BT,
        "position_embeddings": chunk.angles(backbone._rotary_types[block]),
        backbone.row.cache_argument: held,
    }
    return backbone.row.call_block(backbone._blocks[block], h_BTD, block, options)


def written_by_the_block(backbone: HFBackbone, block: int, h_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that transformers' layer writes for one row at position LENGTH, the whole layer run."""
    store = DynamicCache()
    by_transformers(backbone, block, h_BTD, backbone.plan(h_BTD, start=LENGTH), store)
    return store.layers[block].keys, store.layers[block].values


@pytest.mark.parametrize("family", FAMILIES)
def test_propagate_writes_what_the_block_would_for_the_exits_state(family: str) -> None:
    with upcast64(), torch.inference_mode():
        backbone = HFBackbone(tiny(family, depth=DEPTH))
        cache, h_BTD = left(backbone, Propagate())
        assert cache.filled == [LENGTH + 1] * DEPTH
        assert cache.calls == [2, 2, 1, 1, 1, 1], "no skipped block was run"
        for block in range(EXIT, DEPTH):
            torch.testing.assert_close(
                cache.states[block].keys.read(LENGTH, LENGTH + 1), written_by_the_block(backbone, block, h_BTD), **CLOSE
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_token_repeats_the_token_before_at_the_new_position(family: str) -> None:
    """The reference writes the previous token's keys again, by the layer itself, at the next position."""
    with upcast64(), torch.inference_mode():
        backbone = HFBackbone(tiny(family, depth=DEPTH))
        inputs: dict[int, Tensor] = {}

        def note(i: int, h_BTD: Tensor) -> None:
            inputs.setdefault(i, h_BTD)

        hooks = [
            block.register_forward_hook(lambda _, args, __, i=i: note(i, args[0]))
            for i, block in enumerate(backbone._blocks)
        ]
        cache, _ = left(backbone, CopyToken())
        for hook in hooks:
            hook.remove()
        for block in range(EXIT, DEPTH):
            newest_B1D = inputs[block][:, -1:]
            torch.testing.assert_close(
                cache.states[block].keys.read(LENGTH, LENGTH + 1),
                written_by_the_block(backbone, block, newest_B1D),
                **CLOSE,
            )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copy_layer_takes_the_block_below(family: str) -> None:
    with torch.inference_mode():
        backbone = HFBackbone(tiny(family, depth=DEPTH))
        cache, _ = left(backbone, CopyLayer())
        below = cache.states[EXIT - 1].keys.read(LENGTH, LENGTH + 1)
        for block in range(EXIT, DEPTH):
            assert all(
                mine.equal(theirs)
                for mine, theirs in zip(cache.states[block].keys.read(LENGTH, LENGTH + 1), below, strict=True)
            )


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "llama-eager"])
def test_skip_leaves_state_as_it_is_and_unseen(family: str) -> None:
    """The next token's state is what it would be if the skipped slots had never been."""
    with upcast64(), torch.inference_mode():
        backbone = HFBackbone(tiny(family, depth=DEPTH))
        cache, h_BTD = left(backbone, Skip())
        never, _ = left(backbone, Exact())
        never.group.due(EXIT)
        for block in range(EXIT, DEPTH):
            for mine, theirs in zip(
                cache.states[block].keys.read(0, LENGTH), never.states[block].keys.read(0, LENGTH), strict=True
            ):
                assert mine.equal(theirs)
        chunk = backbone.plan(h_BTD, start=LENGTH + 1, past=LENGTH)
        for block in range(EXIT, DEPTH):
            wanted_BTD = _beside(backbone, never, block, h_BTD, chunk)
            got_BTD = backbone.run(h_BTD, Span(block, block + 1), cache)
            torch.testing.assert_close(got_BTD, wanted_BTD, **CLOSE)


def _beside(backbone: HFBackbone, cache: Cache, block: int, h_BTD: Tensor, chunk: StepPlan) -> Tensor:
    """One block at position LENGTH + 1 over a plain cache that holds the first LENGTH positions."""
    first = chunk.first_key(backbone.window(block))
    store = DynamicCache()
    store.update(*cache.states[block].keys.read(first, LENGTH), block)
    return by_transformers(backbone, block, h_BTD, chunk, store)


@pytest.mark.parametrize("rule", [CopyToken(), CopyLayer(), Skip()])
def test_a_last_block_that_ran_keeps_what_it_computed(rule: SkippedState) -> None:
    """DYNAMAX: the last block really runs after an exit, so its keys are from the exit's state under any rule."""
    with upcast64(), torch.inference_mode():
        backbone = HFBackbone(tiny("llama", depth=DEPTH))
        cache, h_BTD = left(backbone, rule, ran=True)
        wanted = written_by_the_block(backbone, DEPTH - 1, h_BTD)
        torch.testing.assert_close(cache.states[DEPTH - 1].keys.read(LENGTH, LENGTH + 1), wanted, **CLOSE)


# -- recurrent and hybrid blocks ---------------------------------------------------------------------


@pytest.mark.parametrize("family", RECURRENT)
def test_propagate_advances_a_recurrent_state_as_the_block_would(family: str) -> None:
    """The reference is transformers' own block, the prompt behind it, run whole on the exit's state."""
    with upcast64(), torch.inference_mode():
        backbone = HFBackbone(tiny(family, depth=DEPTH))
        cache, h_BTD = left(backbone, Propagate())
        assert cache.filled == [LENGTH + 1] * DEPTH
        assert cache.calls == [2, 2, 1, 1, 1, 1], "no skipped block was run"
        for block in range(EXIT, DEPTH):
            same(state(cache.states[block], LENGTH + 1), advanced_by_the_block(backbone, block, h_BTD))


def advanced_by_the_block(backbone: HFBackbone, block: int, h_BTD: Tensor) -> State:
    tokens = torch.randint(0, 61, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))[:, :LENGTH]
    held = DynamicCache(config=backbone.model.config)
    for rows, start in ((backbone.run(backbone.embed(tokens), Span(0, block)), 0), (h_BTD, LENGTH)):
        by_transformers(backbone, block, rows, backbone.plan(rows, start=start), held)
    return told(held.layers[block])


@pytest.mark.parametrize("family", ["mamba", "mamba2", "granitemoehybrid", "falcon_h1", "lfm2", "nemotron_h", "zamba2"])
def test_skip_leaves_a_recurrent_state_bit_for_bit(family: str) -> None:
    with torch.inference_mode():
        backbone = HFBackbone(tiny(family, depth=DEPTH))
        cache, _ = left(backbone, Skip())
        never, _ = left(backbone, Exact())
        for block in range(EXIT, DEPTH):
            mine, theirs = cache.states[block].recurrent, never.states[block].recurrent
            if mine is not None and theirs is not None:
                assert mine.tensors is not None
                assert theirs.tensors is not None
                assert all(x.equal(y) for x, y in zip(mine.tensors, theirs.tensors, strict=True))
        assert cache.filled == [LENGTH + 1] * DEPTH


@pytest.mark.parametrize("ran", [False, True])
def test_the_last_block_advances_once(ran: bool) -> None:
    """DYNAMAX's published code advanced the exit's block twice; here each block reads each position once."""
    with upcast64(), torch.inference_mode():
        backbone = HFBackbone(tiny("mamba2", depth=DEPTH))
        cache, h_BTD = left(backbone, Propagate(), ran=ran)
        assert cache.filled == [LENGTH + 1] * DEPTH
        for block in (EXIT, DEPTH - 1):
            same(state(cache.states[block], LENGTH + 1), advanced_by_the_block(backbone, block, h_BTD))


@pytest.mark.parametrize("rule", [CopyToken(), CopyLayer()])
@pytest.mark.parametrize("family", ["mamba2", "granitemoehybrid", "falcon_h1"])
def test_copies_are_refused_where_there_are_no_keys(rule: SkippedState, family: str) -> None:
    backbone = HFBackbone(tiny(family, depth=DEPTH))
    with pytest.raises(ValueError, match="copies keys and values, but .* keep a recurrent state. Use Exact, Propagate"):
        rule.validate(backbone)


def test_exact_owes() -> None:
    with torch.inference_mode():
        backbone = HFBackbone(tiny("llama", depth=DEPTH))
        cache, h_BTD = left(backbone, Exact())
        assert cache.group.debts == {EXIT: 1}
        owed = cache.group.owed(EXIT)
        assert owed is not None
        assert owed.equal(h_BTD)
