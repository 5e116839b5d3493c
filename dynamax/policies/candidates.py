"""Policies that read the lens over some candidate tokens: a small part of the output matrix.

Candidates are frequent tokens, and what the text suggests: the tokens that followed the newest one before, the likely
tokens of the steps before, and the tokens of the text. Where there is no text, the whole matrix is read.

Sources: SpecEE (Xu et al. 2025, arXiv 2504.08850), whose candidates are those of a drafting model; FR-Spec (Zhao et al.
2025, arXiv 2502.14856), whose drafts read the frequent tokens alone.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from dynamax.errors import UserError
from dynamax.past import gathered
from dynamax.policies.base import ScorePolicy
from dynamax.types import Evidence


class _Candidates(ScorePolicy):
    """Scores the logits of candidate tokens.

    Where it lets a row leave, the token is the best candidate; the most likely token of all may be none of them
    (``benchmarks.candidates`` counts how often).
    """

    gates = ()

    def __init__(
        self,
        threshold: float | dict[int, float],
        *,
        limit: int = 256,
        recent: int = 16,
        likely: int = 16,
        frequent: int = 2048,
    ) -> None:
        super().__init__(threshold)
        if limit < 2 or recent < 0 or likely < 1 or frequent < 0:
            raise UserError(
                f"{type(self).__name__} was given limit {limit}, recent {recent}, likely {likely} and frequent "
                f"{frequent}; wanted: limit at least 2, likely at least 1, recent and frequent at least 0. Raise them, "
                f"or leave them out."
            )
        self.frequent = frequent
        self.limit = limit
        self.recent = recent
        self.likely = likely

    @abstractmethod
    def score_few(self, probs: Tensor) -> Tensor:
        """The score, from probabilities of candidates or of all tokens, ``[..., C]``."""

    def score(self, evidence: Evidence) -> Tensor:
        """How sure the exit is among the candidates, ``score_B``."""
        if evidence.past is None or 0 < evidence.vocab <= self.frequent:
            return self.score_few(evidence.probs)
        some = (self.limit, self.recent, self.likely, evidence.hidden.device, self.frequent)
        return self.score_few(evidence.over(*evidence.past.derive(gathered, *some), self.frequent).softmax(-1))


class CandidateProb(_Candidates):
    """Probability of the most likely candidate, among the candidates: ``MaxProb`` without the output matrix.

    The row leaves with its best candidate. The token that the whole matrix would give may not be among them.

    Args:
        threshold: In [0, 1]; one number for all exits, or a mapping from each exit's depth to its own.
        limit: Most candidates of a row that its text suggests.
        recent: Steps before whose likely tokens are candidates. With 0 the candidates do not depend on where earlier
            tokens left, so one pass over a text tells what decoding does, and ``calibrate`` takes the policy.
        likely: Likely tokens of each such step.
        frequent: How many token ids, from 0 on, are always candidates. A tokenizer that merges pairs of tokens numbers
            them as it learns them, the most frequent first.
    """

    def score_few(self, probs: Tensor) -> Tensor:
        """The greatest probability."""
        return probs.amax(-1)


class CandidateMargin(_Candidates):
    """Probability of the most likely candidate less that of the second, among the candidates.

    The row leaves with its best candidate. The token that the whole matrix would give may not be among them.

    Args:
        threshold: In [0, 1]; one number for all exits, or a mapping from each exit's depth to its own.
        limit: Most candidates of a row that its text suggests.
        recent: Steps before whose likely tokens are candidates. With 0 the candidates do not depend on where earlier
            tokens left, so one pass over a text tells what decoding does, and ``calibrate`` takes the policy.
        likely: Likely tokens of each such step.
        frequent: How many token ids, from 0 on, are always candidates. A tokenizer that merges pairs of tokens numbers
            them as it learns them, the most frequent first.
    """

    def score_few(self, probs: Tensor) -> Tensor:
        """The two greatest probabilities' difference."""
        best = probs.topk(min(2, probs.shape[-1]), -1).values
        return best[..., 0] - (best[..., 1] if best.shape[-1] > 1 else 0)
