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
    assert found[2].perplexity == pytest.approx(math.exp(sum(lost) / len(lost)))
    assert found[2].accuracy == pytest.approx(sum(right) / len(right))
    assert found[2].agreement == pytest.approx(sum(agreed) / len(agreed))
    assert found[4].agreement == 1.0


def test_nothing_counted() -> None:
    assert DepthScores([1]).compute()[1].accuracy == 0.0
