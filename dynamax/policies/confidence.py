"""Policies that read the lens' distribution. Each costs the output matrix at every exit it is asked at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynamax.policies.base import ScorePolicy
from dynamax.types import Evidence


class MaxProb(ScorePolicy):
    """Probability of the lens' most likely token.

    Source: CALM's softmax response, without its second term (Schuster et al. 2022, arXiv 2207.07061).
    """

    gates = ()

    def score(self, evidence: Evidence) -> Tensor:
        """The greatest probability, ``score_B``."""
        return evidence.probs.amax(-1)


class Margin(ScorePolicy):
    """Probability of the lens' most likely token less that of the second.

    Source: CALM's softmax response (Schuster et al. 2022, arXiv 2207.07061).
    """

    gates = ()

    def score(self, evidence: Evidence) -> Tensor:
        """The two greatest probabilities' difference, ``score_B``."""
        best_B2 = evidence.probs.topk(2, dim=-1).values
        return best_B2[:, 0] - best_B2[:, 1]


class Entropy(ScorePolicy):
    """One less the normalised entropy, ``1 - H(p) / log V``: 1 for a certain lens, 0 for a uniform one.

    Over a large vocabulary most scores lie close to 1: H = 1 nat at V = 49,152 scores 0.907.

    Source: BranchyNet (Teerapittayanon et al. 2017, arXiv 1709.01686), which leaves below an entropy; turned
    round here so that greater is surer.
    """

    gates = ()

    def score(self, evidence: Evidence) -> Tensor:
        """Certainty of the whole distribution, ``score_B``."""
        entropy_B = torch.special.entr(evidence.probs).sum(-1)
        return (1 - entropy_B / math.log(evidence.probs.shape[-1])).clamp(0.0, 1.0)
