"""The loss of tuning, held against transformers' own modules called by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from dynamax.backbones.hf import HFBackbone
from dynamax.data.batch import AnswerBatch
from dynamax.objectives.early_exit import left_out
from dynamax.objectives.tuning import ExitTuning
from tests.tiny import redraw, tiny

EXITS, DEPTH = [1, 3, 4], 6


@pytest.fixture(scope="module")
def models() -> tuple[HFBackbone, HFBackbone]:
    """One that learns, and one that it is not."""
    original = tiny("llama-tied", depth=DEPTH)
    tuned = copy.deepcopy(original)
    redraw(tuned, 7)
    return HFBackbone(tuned).requires_grad_(True), HFBackbone(original)


def batch() -> AnswerBatch:
    tokens_BT = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    counted_BT = torch.zeros(2, 9, dtype=torch.bool)
    counted_BT[0, 3:8] = counted_BT[1, 2:5] = True
    return AnswerBatch(tokens_BT, counted_BT)


def by_hand(built: HFBackbone, blocks: list[int]) -> torch.Tensor:
    """Log-probabilities at the eight counted positions, each from a pass over its own prefix alone."""
    model, base, found = built.model, built.model.base_model, []
    for row, positions in enumerate(([3, 4, 5, 6, 7], [2, 3, 4])):
        for position in positions:
            h = base.embed_tokens(batch().tokens_BT[row : row + 1, : position + 1])
            at = torch.arange(position + 1)[None]
            angles = base.rotary_emb(h, at)
            for block in blocks:
                h = base.layers[block](h, attention_mask=None, position_ids=at, position_embeddings=angles)
            found.append(model.lm_head(base.norm(h))[0, -1].log_softmax(-1))
    return torch.stack(found)


def kl(wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return (wanted.exp() * (wanted - given)).sum(-1).mean()


def next_tokens() -> torch.Tensor:
    tokens_BT = batch().tokens_BT
    return torch.cat([tokens_BT[0, 4:9], tokens_BT[1, 3:6]])


@pytest.mark.parametrize("teacher", ["original", "top"])
@pytest.mark.parametrize(("step", "at_once", "turn"), [(0, 1, [1]), (2, 1, [4]), (1, 2, [1, 4]), (5, 9, [1, 3, 4])])
def test_the_loss_and_its_gradients_are_those_by_hand(
    models: tuple[HFBackbone, HFBackbone], teacher: str, step: int, at_once: int, turn: list[int]
) -> None:
    tuned, original = models
    options = {"distil": 0.7, "hold": 1.3, "text": 0.4, "exits_at_once": at_once, "dropout": 0.9, "seed": 2}
    loss, seen = ExitTuning(**options, teacher=teacher).loss(tuned, original, batch(), EXITS, step)
    kept = sorted(set(range(DEPTH)) - left_out(DEPTH, step, dropout=0.9, seed=2))
    assert len(kept) < DEPTH
    top = by_hand(tuned, kept)
    wanted = by_hand(original, list(range(DEPTH))).detach()
    taught = wanted if teacher == "original" else top.detach()
    read = [by_hand(tuned, [block for block in kept if block < depth]) for depth in turn]
    distil = sum(kl(taught, given) for given in read) / len(read)
    text = F.nll_loss(top, next_tokens()) + sum(F.nll_loss(given, next_tokens()) for given in read) / len(read)
    total = 0.7 * distil + 1.3 * kl(wanted, top) + 0.4 * text
    torch.testing.assert_close(loss, total, check_dtype=False)
    torch.testing.assert_close(seen["hold"], kl(wanted, top).detach(), check_dtype=False)
    assert {f"distil/{depth}" for depth in turn} == {name for name in seen if name.startswith("distil/")}
    learned = list(tuned.parameters())
    both = (torch.autograd.grad(each, learned, materialize_grads=True) for each in (loss, total))
    for found, hand in zip(*both, strict=True):
        torch.testing.assert_close(found, hand, atol=1e-6, rtol=1e-5)


def test_exits_take_turns_and_all_have_theirs(models: tuple[HFBackbone, HFBackbone]) -> None:
    tuned, original = models
    objective = ExitTuning(exits_at_once=2, dropout=0.0)
    read = [set(objective.loss(tuned, original, batch(), EXITS, step)[1]) for step in range(3)]
    counts = {depth: sum(f"distil/{depth}" in seen for seen in read) for depth in EXITS}
    assert counts == {1: 2, 3: 2, 4: 2}


def test_a_model_that_is_the_original_loses_nothing_at_the_top(models: tuple[HFBackbone, HFBackbone]) -> None:
    _, original = models
    _, seen = ExitTuning(dropout=0.0).loss(original, original, batch(), EXITS, 0)
    assert seen["hold"] == 0
    assert seen["distil/1"] > 0.1
    assert set(seen) == {"hold", "distil", "distil/1", "cross_entropy/1", "cross_entropy/top"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"distil": 0.0}, "distil or text must be positive"),
        ({"hold": -1.0}, "hold -1.0"),
        ({"text": float("nan")}, "text nan"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"exits_at_once": 0}, "exits_at_once=0"),
        ({"teacher": "student"}, "teacher 'student'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ExitTuning(**options)
