"""Posteriors against scipy's Beta densities; parameters that were drawn from are found again."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import beta

from dynamax.errors import UserError
from dynamax.policies import BetaMixture, BetaPair, GateConfidence, MaxProb, OnlyAt
from tests.policies.evidence import evidence

PAIR = BetaPair((6.0, 1.5), (2.0, 3.0), 0.3)


def test_the_posterior_is_bayes_rule():
    score_B = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.99])
    right, wrong = 0.3 * beta(6.0, 1.5).pdf(score_B), 0.7 * beta(2.0, 3.0).pdf(score_B)
    torch.testing.assert_close(PAIR.posterior(score_B), torch.as_tensor(right / (right + wrong)), atol=1e-6, rtol=1e-6)
    assert PAIR.posterior(torch.tensor([0.0, 1.0])).isfinite().all()


def test_the_policy_scores_with_the_mixture_of_its_exit():
    policy = BetaMixture(0.5, policy=GateConfidence(1.0), mixtures={4: PAIR, 8: BetaPair((2.0, 2.0), (2.0, 2.0), 0.6)})
    p_B = torch.tensor([0.9, 0.2], dtype=torch.float64)
    seen = evidence(torch.zeros(2, 5), gates={"LinearGate": p_B})
    torch.testing.assert_close(policy.score(seen), PAIR.posterior(p_B))
    assert policy(seen).tolist() == [True, False]
    assert not seen.logits_read
    blind = evidence(torch.zeros(2, 5), gates={"LinearGate": p_B}, depth=8)
    torch.testing.assert_close(policy.score(blind), torch.full((2,), 0.6, dtype=torch.float64))
    policy.validate([4, 8])
    with pytest.raises(UserError, match=r"depths \[4, 8\], but there are exits at \[6\] too"):
        policy.validate([4, 6, 8])
    OnlyAt(policy, [4]).validate([4, 6])


def test_fit_finds_the_parameters_that_scores_were_drawn_from():
    torch.manual_seed(0)
    right_N = torch.rand(40_000) < 0.3
    drawn = [torch.distributions.Beta(*map(torch.tensor, each)).sample((40_000,)) for each in (PAIR.right, PAIR.wrong)]
    score_N = torch.where(right_N, *drawn)
    policy = BetaMixture.fit(0.8, MaxProb(0.5), {4: (score_N, right_N)})
    found = policy.mixtures[4]
    assert found.right == pytest.approx(PAIR.right, rel=0.05)
    assert found.wrong == pytest.approx(PAIR.wrong, rel=0.05)
    assert found.prior == pytest.approx(0.3, abs=0.01)
    assert policy.threshold == 0.8
    sure_N = found.posterior(score_N) >= 0.8
    assert sure_N.sum() > 100
    assert right_N[sure_N].double().mean() > 0.8, "at least as often right as it is sure"


@pytest.mark.parametrize(
    ("score_N", "right_N"),
    [
        ([0.5, 0.6, 0.7], [True, True, True]),
        ([0.5, 0.6, 0.7], [True, True, False]),
        ([0.5, 0.5, 0.7, 0.8], [1, 1, 0, 0]),
    ],
)
def test_too_few_scores_are_refused(score_N, right_N):
    with pytest.raises(UserError, match="at depth 4 was right on . of . tokens; wanted: two different scores"):
        BetaMixture.fit(0.5, MaxProb(0.5), {4: (torch.tensor(score_N), torch.tensor(right_N).bool())})


@pytest.mark.parametrize("options", [((0.0, 1.0), (1.0, 1.0), 0.5), ((1.0, 1.0), (1.0, 1.0), 1.0)])
def test_a_pair_out_of_range_is_refused(options):
    with pytest.raises(UserError, match="is no mixture"):
        BetaPair(*options)
