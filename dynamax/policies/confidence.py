"""Policies that read what an exit says: its lens, a gate, or how it compares with the exits before it.

Those that read the lens cost the output matrix at every exit; ``GateConfidence`` and ``Saturation`` do not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynamax.policies.base import CountPolicy, ScorePolicy
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

    Source: BranchyNet (Teerapittayanon et al. 2017, arXiv 1709.01686), which leaves below an entropy; here
    the sign is changed, so that greater is surer.
    """

    gates = ()

    def score(self, evidence: Evidence) -> Tensor:
        """Certainty of the whole distribution, ``score_B``."""
        entropy_B = torch.special.entr(evidence.probs).sum(-1)
        return (1 - entropy_B / math.log(evidence.probs.shape[-1])).clamp(0.0, 1.0)


class GateConfidence(ScorePolicy):
    """Confidence of a gate of the exit: DYNAMAX's rule, and CALM's with a trained classifier.

    Args:
        threshold: In [0, 1]; one number for all exits, or a mapping from each exit's depth to its own.
        gate: Class name of the gate; may be left out where every exit has just one.

    Source: DYNAMAX (Nogales et al. 2025, arXiv 2504.20922), which leaves strictly above the threshold, here at or
    above it; CALM (Schuster et al. 2022, arXiv 2207.07061).
    """

    def __init__(self, threshold: float | dict[int, float], *, gate: str | None = None) -> None:
        super().__init__(threshold)
        self.gate = gate
        self.gates = None if gate is None else (gate,)
        self.made_of = self.gates or ()

    def score(self, evidence: Evidence) -> Tensor:
        """The gate's confidence, ``score_B``."""
        return evidence.confidence(self.gate)


class Patience(CountPolicy):
    """Leaves when the lens gives the same token at that many consecutive exits, this one included.

    Args:
        patience: Exits that must agree, at least 1; 1 leaves at the first exit. A sweep changes this number.

    Source: PABEE (Zhou et al. 2020, arXiv 2006.04152), which counts repetitions: its ``t`` is ``patience - 1``.
    """

    gates = ()

    def __init__(self, patience: int) -> None:
        self.threshold = self.checked(patience)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Where the last exits and this one say the same token."""
        first = len(evidence.trail) - (self.count - 1)
        leave_B = torch.full(evidence.hidden.shape[:1], first >= 0, device=evidence.hidden.device)
        for before in evidence.trail[first:] if first >= 0 else ():
            leave_B = leave_B & (before.token == evidence.token)
        return leave_B


class Saturation(ScorePolicy):
    """Cosine similarity of the hidden state with the previous exit's; negative ones score 0.

    The first exit has nothing to compare with and scores 0. Neither lens nor gate is read.

    Source: CALM's hidden-state saturation (Schuster et al. 2022, arXiv 2207.07061), there between neighbouring layers.
    """

    gates = ()

    def score(self, evidence: Evidence) -> Tensor:
        """Cosine similarity with the exit before, ``score_B``."""
        h_BD = evidence.hidden.float()
        if not evidence.trail:
            return h_BD.new_zeros(h_BD.shape[0])
        before_BD = evidence.trail[-1].hidden.float()
        return torch.cosine_similarity(h_BD, before_BD, dim=-1).clamp(0.0, 1.0)
