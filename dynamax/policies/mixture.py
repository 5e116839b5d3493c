"""A score as a probability: how scores of right and of wrong exits are distributed, and what follows by Bayes' rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from dynamax.errors import UserError
from dynamax.policies.base import ScorePolicy, ScoresByDepth
from dynamax.types import Evidence

EDGE = 1e-6
"""Scores are kept this far from 0 and 1, where a Beta density may be 0 or without bound."""


@dataclass(frozen=True)
class BetaPair:
    """How the scores of one exit are distributed.

    Attributes:
        right: The two parameters of the Beta distribution of scores where the exit is right.
        wrong: The same where it is wrong.
        prior: Share of tokens at which it is right, in (0, 1).
    """

    right: tuple[float, float]
    wrong: tuple[float, float]
    prior: float

    def __post_init__(self) -> None:
        if not (0 < self.prior < 1 and all(0 < x < math.inf for x in (*self.right, *self.wrong))):
            raise UserError(f"{self} is no mixture; wanted: a prior in (0, 1), and parameters greater than 0.")

    def posterior(self, score_B: Tensor) -> Tensor:
        """The probability that the exit is right, given its score, ``[B]``."""
        score_B = score_B.double().clamp(EDGE, 1 - EDGE)
        (a, b), (c, d) = self.right, self.wrong
        constant = math.log(self.prior / (1 - self.prior)) + log_beta(c, d) - log_beta(a, b)
        return (constant + (a - c) * score_B.log() + (b - d) * (-score_B).log1p()).sigmoid()


class BetaMixture(ScorePolicy):
    """The probability that the exit is right, from another policy's score and how such scores were distributed before.

    Where the two densities cross twice, a greater score can have a smaller probability.

    Args:
        threshold: In [0, 1]; one number for all exits, or a mapping from each exit's depth to its own.
        policy: The policy whose score is used; its threshold is not.
        mixtures: For each exit's depth, how scores of right and of wrong exits are distributed. Left out, the policy
            must be fitted before use, as ``dynamax calibrate`` does.

    Source: FREE (Bae et al. 2023, arXiv 2310.05424), its adaptive threshold estimator.
    """

    def __init__(
        self, threshold: float | dict[int, float], *, policy: ScorePolicy, mixtures: dict[int, BetaPair] | None = None
    ) -> None:
        super().__init__(threshold)
        self.policy = policy
        self.mixtures = mixtures
        self.gates = policy.gates
        self.depths = policy.depths
        self.recent = policy.recent
        self.made_of = (policy.label,)

    @classmethod
    def fit(cls, threshold: float, policy: ScorePolicy, scored: ScoresByDepth) -> Self:
        """The policy whose mixtures have the means and variances of scores that were seen (method of moments).

        Args:
            threshold: In [0, 1].
            policy: The policy that scored.
            scored: What it scored.

        Raises:
            UserError: If an exit was right, or wrong, on fewer than two tokens, or with one and the same score on all.

        Example:
            >>> import torch
            >>> from dynamax.policies import GateConfidence
            >>> score_N = torch.tensor([0.8, 0.6, 0.4, 0.2])
            >>> right_N = torch.tensor([True, True, False, False])
            >>> BetaMixture.fit(0.5, GateConfidence(0.5), {4: (score_N, right_N)}).mixtures[4].prior
            0.5
        """
        mixtures = {}
        for depth, (score_N, right_N) in scored.items():
            pairs = []
            for chosen in (score_N[right_N], score_N[~right_N]):
                chosen = chosen.double().clamp(EDGE, 1 - EDGE)
                if len(chosen.unique()) < 2:
                    raise UserError(
                        f"The exit at depth {depth} was right on {int(right_N.sum())} of {len(right_N)} tokens; "
                        f"wanted: two different scores where it is right, and where it is wrong. Score more text."
                    )
                mean = float(chosen.mean())
                size = mean * (1 - mean) / float(chosen.var(correction=0)) - 1
                pairs.append((mean * size, (1 - mean) * size))
            mixtures[depth] = BetaPair(pairs[0], pairs[1], float(right_N.double().mean()))
        return cls(threshold, policy=policy, mixtures=mixtures)

    def fitted(self, scores_of: Callable[[ScorePolicy], ScoresByDepth]) -> Self:
        """The policy with its mixtures; found from the inner policy's scores if none were given."""
        if self.mixtures is not None:
            return self
        assert self.threshold is not None, "a score policy has a threshold"
        return type(self).fit(0.5, self.policy, scores_of(self.policy)).at(self.threshold)

    @property
    def fitted_options(self) -> dict[str, Any]:
        """The mixtures."""
        return {
            "mixtures": {
                depth: {"right": list(pair.right), "wrong": list(pair.wrong), "prior": pair.prior}
                for depth, pair in (self.mixtures or {}).items()
            }
        }

    def score(self, evidence: Evidence) -> Tensor:
        """The probability that the exit is right, ``score_B``."""
        if self.mixtures is None:
            self.validate([evidence.depth])
        assert self.mixtures is not None, "or validate has refused"
        return self.mixtures[evidence.depth].posterior(self.policy.score(evidence))

    def validate(self, depths: Sequence[int]) -> None:
        """Refuse exits without a mixture; check the inner policy."""
        if self.mixtures is None:
            raise UserError(
                f"{type(self).__name__} was given no mixtures, so it has no score. Fit it: `dynamax calibrate` does, "
                f"and writes the mixtures into its file; in Python, {type(self).__name__}.fit does. Or give mixtures."
            )
        super().validate(depths)
        if missing := sorted(set(depths) - set(self.mixtures)):
            raise UserError(
                f"{type(self).__name__} was given mixtures for the depths {sorted(self.mixtures)}, but there are exits "
                f"at {missing} too. Fit them, or ask the policy at its own depths alone (OnlyAt)."
            )
        self.policy.validate(depths)

    def check_gates(self, offered: Mapping[int, Collection[str]], total: int) -> None:
        """Check the inner policy."""
        self.policy.check_gates(offered, total)


def log_beta(a: float, b: float) -> float:
    """Logarithm of the Beta function."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
