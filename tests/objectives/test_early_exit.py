"""Losses over a whole backbone, held against the blocks of transformers called by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dynamax.backbones.hf import HFBackbone
from dynamax.objectives.early_exit import LayerSkip, NextToken, chances, left_out
from tests.tiny import tiny

EXITS = [1, 3, 4]
DEPTH = 6


def backbone(depth: int = DEPTH) -> HFBackbone:
    built = HFBackbone(tiny("llama-tied", depth=depth))
    return built.requires_grad_(True)


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def by_hand(built: HFBackbone, tokens_BT: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    """Cross-entropy after some blocks, through the shared norm and the output matrix; transformers' own modules."""
    model = built.model
    base = model.base_model
    h = base.embed_tokens(tokens_BT)
    positions = torch.arange(tokens_BT.shape[1])[None]
    angles = base.rotary_emb(h, positions)
    for block in blocks:
        h = base.layers[block](h, attention_mask=None, position_ids=positions, position_embeddings=angles)
    logits = model.lm_head(base.norm(h))
    return nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, 61), tokens_BT[:, 1:].reshape(-1))


def test_next_token_is_the_loss_of_transformers() -> None:
    built, tokens_BT = backbone(), tokens()
    loss, seen = NextToken().loss(built, tokens_BT, EXITS, 0)
    torch.testing.assert_close(loss, built.model(tokens_BT, labels=tokens_BT).loss, check_dtype=False)
    assert set(seen) == {"cross_entropy/top"}


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("length", [2, 9])
def test_exits_take_turns_beside_the_top(step: int, length: int) -> None:
    built, tokens_BT = backbone(), tokens(length=length)
    loss, seen = LayerSkip(weight=0.5, dropout=0.0).loss(built, tokens_BT, EXITS, step)
    depth = EXITS[step % 3]
    at_exit, top = by_hand(built, tokens_BT, list(range(depth))), by_hand(built, tokens_BT, list(range(DEPTH)))
    torch.testing.assert_close(loss, top + 0.5 * at_exit)
    torch.testing.assert_close(seen[f"cross_entropy/{depth}"], at_exit.detach())
    torch.testing.assert_close(seen["cross_entropy/top"], top.detach())


def test_gradients_are_those_of_the_reference() -> None:
    built, tokens_BT = backbone(), tokens()
    parameters = list(built.parameters())
    loss, _ = LayerSkip(dropout=0.0).loss(built, tokens_BT, EXITS, 1)
    found = torch.autograd.grad(loss, parameters)
    wanted = by_hand(built, tokens_BT, [0, 1, 2]) + by_hand(built, tokens_BT, list(range(DEPTH)))
    torch.testing.assert_close(
        found, torch.autograd.grad(wanted, parameters), atol=1e-6, rtol=1e-5
    )  # norms are float32


def test_blocks_left_out_are_as_if_they_were_not_there() -> None:
    built, tokens_BT = backbone(), tokens()
    objective = LayerSkip(dropout=0.9, seed=3)
    kept = sorted(set(range(DEPTH)) - left_out(DEPTH, 2, dropout=0.9, seed=3))
    blocks, rest = [block for block in kept if block < 4], [block for block in kept if block >= 4]
    assert 0 < len(blocks) + len(rest) < DEPTH
    loss, _ = objective.loss(built, tokens_BT, EXITS, 2)
    wanted = by_hand(built, tokens_BT, blocks) + by_hand(built, tokens_BT, blocks + rest)
    torch.testing.assert_close(loss, wanted)


def test_dropout_rises_with_depth_and_hits_as_often_as_it_says() -> None:
    wanted = torch.tensor([0.5 * (2 ** (block / 5) - 1) for block in range(DEPTH)])
    torch.testing.assert_close(chances(DEPTH, 0.5), wanted)
    kept = torch.zeros(DEPTH)
    for step in range(2000):
        kept[sorted(set(range(DEPTH)) - left_out(DEPTH, step, dropout=0.5, seed=0))] += 1
    assert kept[0] == 2000
    torch.testing.assert_close(1 - kept / 2000, wanted, atol=0.04, rtol=0)


def test_a_step_repeats_itself_and_a_seed_makes_a_difference() -> None:
    out = [left_out(32, 7, dropout=0.5, seed=seed) for seed in (0, 0, 1)]
    assert out[0] == out[1] != out[2]


def test_one_block_has_no_chance_to_be_left_out() -> None:
    assert chances(1, 0.9).tolist() == [0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"weight": 0.0},
        {"weight": float("nan")},
        {"weight": float("inf")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
    ],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="use NextToken"):
        LayerSkip(**options)


def test_cross_entropy_counts_every_position_but_the_last() -> None:
    built, tokens_BT = backbone(), tokens(rows=1, length=3)
    loss, _ = NextToken().loss(built, tokens_BT, EXITS, 0)
    logits = built.reference(tokens_BT)
    lost = [-F.log_softmax(logits[0, t], -1)[tokens_BT[0, t + 1]] for t in range(2)]
    torch.testing.assert_close(loss, (lost[0] + lost[1]) / 2)
