"""Samplers against transformers' logits processors, and draws against the distribution they are drawn from."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dynamax.decoding.sampling import Greedy, Sampled


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("top_p", [0.1, 0.8, 1.0])
def test_distribution_is_transformers(temperature: float, top_k: int | None, top_p: float) -> None:
    logits_BV = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    wanted_BV = warpers(torch.zeros(6, 1, dtype=torch.long), logits_BV).softmax(-1)
    got_BV = Sampled(temperature, top_k=top_k, top_p=top_p).distribution(logits_BV)
    torch.testing.assert_close(got_BV, wanted_BV)


def test_draws_follow_the_distribution() -> None:
    p_V, n = torch.tensor([0.6, 0.3, 0.1, 0.0]), 100_000
    counts_V = torch.bincount(Sampled(seed=3).draw(p_V.expand(n, 4)), minlength=4)
    assert torch.allclose(counts_V / n, p_V, atol=4 * (0.25 / n) ** 0.5)
    assert counts_V[3] == 0


def test_the_same_seed_draws_the_same() -> None:
    logits_BV = torch.randn(4, 9)
    first, second = Sampled(seed=5), Sampled(seed=5)
    assert [first(logits_BV).tolist() for _ in range(5)] == [second(logits_BV).tolist() for _ in range(5)]


def test_a_turn_draws_the_same_whatever_was_drawn_before() -> None:
    logits_BV = torch.zeros(4, 999)
    first, second = Sampled(seed=5), Sampled(seed=5)
    first(logits_BV)
    first.restart(3)
    second.restart(3)
    third = first(logits_BV)
    assert third.equal(second(logits_BV))
    first.restart(4)
    assert not third.equal(first(logits_BV))


def test_greedy_is_the_argmax_with_all_the_mass() -> None:
    logits_BV = torch.randn(4, 9)
    assert Greedy()(logits_BV).equal(logits_BV.argmax(-1))
    assert Greedy().distribution(logits_BV).sum(-1).equal(torch.ones(4))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"temperature": 0.0}, "above 0 in float32, and finite. For the most likely token, leave it out"),
        ({"top_k": 0}, "at least 1, or left out"),
        ({"top_p": 0.0}, "lie in"),
        ({"top_p": 1.5}, "lie in"),
    ],
)
def test_out_of_range_is_refused(options: dict, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Sampled(**options)
