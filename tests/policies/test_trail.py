from __future__ import annotations

import math

import pytest
import torch

from dynamax.errors import UserError
from dynamax.policies import Patience, Saturation, Voting
from tests.policies.evidence import climb, evidence


@pytest.mark.parametrize(
    ("patience", "expected"),
    [
        (1, [[1, 1], [1, 1], [1, 1], [1, 1]]),
        (2, [[0, 0], [1, 0], [0, 1], [0, 1]]),
        (3, [[0, 0], [0, 0], [0, 0], [0, 1]]),
        (5, [[0, 0], [0, 0], [0, 0], [0, 0]]),
    ],
)
def test_patience_counts_exits_that_agree(patience, expected):
    tokens_BE = [[3, 3, 1, 3], [2, 4, 4, 4]]
    leave_EB = torch.stack([Patience(patience)(seen) for seen in climb(tokens_BE)])
    assert leave_EB.int().tolist() == expected


def test_patience_reads_no_logits_before_it_could_leave():
    exits = climb([[1, 1, 1]])
    policy = Patience(3)
    policy(exits[0])
    policy(exits[1])
    assert not exits[0].logits_read
    assert policy(exits[2]).tolist() == [True]
    assert all(seen.logits_read for seen in exits)


@pytest.mark.parametrize("patience", [0, -1, 1.5, math.nan, math.inf, -math.inf])
def test_patience_needs_a_whole_number(patience):
    with pytest.raises(UserError, match="whole number of at least 1"):
        Patience(patience)


def test_saturation_is_the_cosine_with_the_exit_before():
    logits_BV = torch.zeros(3, 2)
    first = evidence(logits_BV, hidden=torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    second = evidence(logits_BV, hidden=torch.tensor([[5.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]), trail=[first])
    assert Saturation(0.0).score(first).tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(Saturation(0.0).score(second), torch.tensor([1.0, 0.6, 0.0]))
    assert Saturation(0.5)(second).tolist() == [True, True, False]
    assert not first.logits_read
    assert not second.logits_read


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (1, [[1, 1], [1, 1], [1, 1], [1, 1]]),
        (2, [[0, 0], [1, 0], [0, 1], [1, 1]]),
        (3, [[0, 0], [0, 0], [0, 0], [1, 0]]),
        (5, [[0, 0], [0, 0], [0, 0], [0, 0]]),
    ],
)
def test_voting_counts_exits_in_any_order(votes, expected):
    tokens_BE = [[3, 3, 1, 3], [2, 4, 2, 4]]
    leave_EB = torch.stack([Voting(votes)(seen) for seen in climb(tokens_BE)])
    assert leave_EB.int().tolist() == expected


def test_voting_reads_no_logits_before_it_could_leave():
    first, second, third = climb([[1, 2, 1]])
    policy = Voting(3)
    assert policy(first).tolist() == policy(second).tolist() == [False]
    assert not first.logits_read
    assert policy(third).tolist() == [False]
    assert Voting(2)(third).tolist() == [True]
    with pytest.raises(UserError, match="whole number of at least 1"):
        Voting(0)
