"""Policies that are no use but as bounds in a plot: by chance, and by knowing the answer."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from dynamax.errors import UserError
from dynamax.policies.base import ScorePolicy, TerminationPolicy
from dynamax.types import Evidence


class Random(ScorePolicy):
    """Leaves by chance: at each exit with the probability ``1 - threshold``. Neither lens nor gate is read.

    A policy that is not better than this one at the same cost knows nothing of the token. The score is drawn from the
    text that was read, the depth and the seed, so that it is the same wherever the text is read again.

    Args:
        threshold: In [0, 1]; one number for all exits, or a mapping from each exit's depth to its own.
        seed: Other seeds draw other scores.
    """

    gates = ()

    def __init__(self, threshold: float | dict[int, float], *, seed: int = 0) -> None:
        super().__init__(threshold)
        self.seed = seed

    def score(self, evidence: Evidence) -> Tensor:
        """A number from [0, 1) for each row, ``score_B``."""
        if evidence.past is None:
            raise UserError(
                "Random draws from the text that was read, which is not known here. Decode, or read a text."
            )
        drawn = [random.Random(f"{self.seed} {evidence.depth} {text}").random() for text in evidence.past.texts]
        return torch.tensor(drawn, device=evidence.hidden.device, dtype=torch.float64)


class Oracle(TerminationPolicy):
    """Leaves at the first exit that gives the full model's token: the best that any gate could do with these lenses.

    It must know that token, so it can only be followed along a known text: decoders refuse it. ``dynamax test`` gives
    its agreement and its blocks, no times and no scores.
    """

    gates = ()
    known_text = True

    def __call__(self, evidence: Evidence) -> Tensor:
        """Where the exit's token is the full model's."""
        if evidence.past is None or evidence.past.top is None:
            raise UserError("Oracle goes by the full model's tokens, which are not known here. Read a text with it.")
        return evidence.token == evidence.past.top()
