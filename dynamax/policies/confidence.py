"""Policies that read what an exit says: its lens, a gate, or how it compares with the exits before it.

Those that read the lens cost the output matrix at every exit; ``GateConfidence`` and ``Saturation`` do not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from dynamax.errors import UserError
from dynamax.policies.base import CountPolicy, ScorePolicy, check_gate
from dynamax.types import Evidence


class _Softmax(ScorePolicy):
    """Scores the distribution of the lens, ``softmax(logits / temperature)``."""

    gates = ()

    def __init__(self, threshold: float | dict[int, float], *, temperature: float = 1.0) -> None:
        super().__init__(threshold)
        if not 0 < temperature < math.inf:
            raise UserError(
                f"{type(self).__name__} was given temperature {temperature}; it must be greater than 0 and finite. "
                f"1 leaves the lens as it is, a greater one makes it less sure."
            )
        self.temperature = temperature
        self.made_of = () if temperature == 1 else (f"temperature {temperature:g}",)

    def probs(self, evidence: Evidence) -> Tensor:
        """The lens' distribution at the temperature, ``probs_BV``."""
        return evidence.probs if self.temperature == 1 else (evidence.logits / self.temperature).softmax(-1)


class MaxProb(_Softmax):
    """Probability of the lens' most likely token.

    Args:
        threshold: In [0, 1]; one number for all exits, or a mapping from each exit's depth to its own.
        temperature: What logits are divided by.

    Source: CALM's softmax response, without its second term (Schuster et al. 2022, arXiv 2207.07061); temperature:
    Guo et al. 2017, arXiv 1706.04599.
    """

    def score(self, evidence: Evidence) -> Tensor:
        """The greatest probability, ``score_B``."""
        return self.probs(evidence).amax(-1)


class Margin(_Softmax):
    """Probability of the lens' most likely token less that of the second.

    Args:
        threshold: In [0, 1]; one number for all exits, or a mapping from each exit's depth to its own.
        temperature: What logits are divided by.

    Source: CALM's softmax response (Schuster et al. 2022, arXiv 2207.07061); temperature: Guo et al. 2017,
    arXiv 1706.04599.
    """

    def score(self, evidence: Evidence) -> Tensor:
        """The two greatest probabilities' difference, ``score_B``."""
        best_B2 = self.probs(evidence).topk(2, dim=-1).values
        return best_B2[:, 0] - best_B2[:, 1]


class Entropy(_Softmax):
    """One less the normalised entropy, ``1 - H(p) / log V``: 1 for a certain lens, 0 for a uniform one.

    Over a large vocabulary most scores lie close to 1: H = 1 nat at V = 49,152 scores 0.907.

    Args:
        threshold: In [0, 1]; one number for all exits, or a mapping from each exit's depth to its own.
        temperature: What logits are divided by.

    Source: BranchyNet (Teerapittayanon et al. 2017, arXiv 1709.01686), which leaves below an entropy; here
    the sign is changed, so that greater is surer. Temperature: Guo et al. 2017, arXiv 1706.04599.
    """

    def score(self, evidence: Evidence) -> Tensor:
        """Certainty of the whole distribution, ``score_B``."""
        probs_BV = self.probs(evidence)
        entropy_B = torch.special.entr(probs_BV).sum(-1)
        return (1 - entropy_B / math.log(probs_BV.shape[-1])).clamp(0.0, 1.0)


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

    def check_gates(self, offered: Mapping[int, Collection[str]], total: int) -> None:
        """Refuse exits without the gate."""
        check_gate(self.gate, offered, total)

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


class Voting(CountPolicy):
    """Leaves when that many of the exits so far, this one included, give this exit's token.

    ``Patience`` wants them one after the other; here other exits may lie between them.

    Args:
        votes: Exits that must agree, at least 1; 1 leaves at the first exit. A sweep changes this number.

    Source: voting of internal classifiers (Sun et al. 2021, arXiv 2105.13792). There the token with most votes is the
    answer, and the votes are divided by a power of the number of exits; here the exit answers with its own token.
    """

    gates = ()

    def __init__(self, votes: int) -> None:
        self.threshold = self.checked(votes)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Where enough exits give the same token as this one; none is read before there are enough exits."""
        if len(evidence.trail) + 1 < self.count:
            return evidence.hidden.new_zeros(len(evidence.hidden), dtype=torch.bool)
        votes_B = torch.ones_like(evidence.token)
        for before in evidence.trail:
            votes_B = votes_B + (before.token == evidence.token)
        return votes_B >= self.count


class Saturation(ScorePolicy):
    """Cosine similarity of the hidden state with the previous exit's; negative ones score 0.

    The first exit has nothing to compare with and scores 0. Neither lens nor gate is read.

    Source: CALM's hidden-state saturation (Schuster et al. 2022, arXiv 2207.07061), there between neighbouring layers.
    """

    gates = ()
    reads_trail = True

    def score(self, evidence: Evidence) -> Tensor:
        """Cosine similarity with the exit before, ``score_B``."""
        h_BD = evidence.hidden.float()
        if not evidence.trail:
            return h_BD.new_zeros(h_BD.shape[0])
        before_BD = evidence.trail[-1].hidden.float()
        return torch.cosine_similarity(h_BD, before_BD, dim=-1).clamp(0.0, 1.0)
