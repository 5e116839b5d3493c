"""Chance and knowledge: what no policy should fall below, and what none can surpass."""

from __future__ import annotations

import pytest
import torch

from dynamax.errors import UserError
from dynamax.policies import AllOf, AtDepth, OnlyAt, Oracle, Random
from dynamax.types import Evidence, Past
from tests.policies.evidence import evidence


def read(texts, *, depth=4, top=None):
    """Evidence of rows that have read these texts, in a vocabulary of five, where every lens says token 2."""
    past = Past(lambda: texts, lambda steps, count: [], top=None if top is None else lambda: torch.tensor(top))
    logits_BV = torch.eye(5)[[2] * len(texts)]
    return Evidence(depth, 12, 0, torch.zeros(len(texts), 3), logits=lambda: logits_BV, past=past)


def test_chance_leaves_as_often_as_it_says():
    texts = [[row, 7, row * row] for row in range(2000)]
    for depth in (4, 8):
        seen = read(texts, depth=depth)
        for threshold in (0.0, 0.25, 0.9, 1.0):
            share = Random(threshold)(seen).double().mean()
            assert abs(share - (1 - threshold)) < 0.04, "four standard deviations"
        assert not seen.logits_read


def test_chance_is_drawn_anew_by_text_depth_and_seed_alone():
    texts = [[1, 2], [1, 2, 3], [4, 2]]
    score_B = Random(0.5).score(read(texts))
    assert Random(0.1).score(read(texts[::-1])).flip(0).equal(score_B)
    assert len(score_B.unique()) == 3
    for other in (Random(0.5, seed=1).score(read(texts)), Random(0.5).score(read(texts, depth=6))):
        assert not (other == score_B).any()
    with pytest.raises(UserError, match="not known here"):
        Random(0.5)(evidence(torch.zeros(1, 5)))


def test_the_oracle_leaves_where_the_exit_is_right():
    seen = read([[1], [1], [1]], top=[2, 4, 2])
    assert Oracle()(seen).tolist() == [True, False, True]


def test_the_oracle_needs_to_know():
    for seen in (read([[1]]), evidence(torch.zeros(1, 5))):
        with pytest.raises(UserError, match="not known here"):
            Oracle()(seen)
    assert all(policy.known_text for policy in (AllOf([AtDepth(4), Oracle()]), OnlyAt(Oracle(), [4])))
    assert not AllOf([AtDepth(4), Random(0.5)]).known_text
