from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dynamax.metrics.language import DepthScores


def batch(rows: int, length: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(rows, length, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    return logits, torch.randint(0, 5, (rows, length), generator=generator)


def test_scores_are_those_of_all_positions_at_once() -> None:
    scores = DepthScores([2, 4])
    lost, right, agreed = [], [], []
    for seed, shape in enumerate([(3, 7), (1, 2)]):
        logits, tokens = batch(*shape, seed)
        scores.update(logits, tokens)
        for row in range(shape[0]):
            for t in range(shape[1] - 1):
                low, top = logits[0][row, t], logits[1][row, t]
                lost.append(-F.log_softmax(low, -1)[tokens[row, t + 1]].item())
                right.append(bool(low.argmax() == tokens[row, t + 1]))
                agreed.append(bool(low.argmax() == top.argmax()))
    found = scores.compute()
    assert found[2]["perplexity"] == pytest.approx(math.exp(sum(lost) / len(lost)))
    assert found[2]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found[2]["agreement"] == pytest.approx(sum(agreed) / len(agreed))
    assert found[4]["agreement"] == 1.0


def test_nothing_counted() -> None:
    assert DepthScores([1]).compute()[1]["accuracy"] == 0.0


def test_distance_from_a_teacher_counts_every_position() -> None:
    batches = [batch(3, 7, 0), batch(1, 2, 1)]
    taught = {tokens.shape: batch(*tokens.shape, 9)[0][0] for _, tokens in batches}
    scores = DepthScores([2, 4], lambda tokens: taught[tokens.shape])
    apart, same = [], []
    for logits, tokens in batches:
        scores.update(logits, tokens)
        p, q = taught[tokens.shape].softmax(-1), logits[0].softmax(-1)
        apart += (p * (p / q).log()).sum(-1).flatten().tolist()
        same += (p.argmax(-1) == q.argmax(-1)).flatten().tolist()
    found = scores.compute()[2]
    assert found["divergence"] == pytest.approx(sum(apart) / 23)
    assert found["fidelity"] == pytest.approx(sum(same) / 23)
