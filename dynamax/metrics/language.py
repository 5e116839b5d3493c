"""How well each depth of a language model predicts text. Knows tokens and logits, no models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F


@final
class DepthScores:
    """Scores of each depth over a text, every position counting the same.

    Args:
        depths: Depths that are read, the top last.
        teacher: Logits of another model for tokens, to compare every depth with.
    """

    def __init__(self, depths: Sequence[int], teacher: Callable[[Tensor], Tensor] | None = None) -> None:
        self.depths = tuple(depths)
        self._teacher = teacher
        self._sums_E5 = torch.zeros(len(self.depths), 5, dtype=torch.float64)
        self._predicted = self._compared = 0  # the last position of a row has a distribution, but no next token

    def update(self, logits: Sequence[Tensor], tokens_BT: Tensor) -> None:
        """Count one batch.

        Args:
            logits: ``logits_BTV`` at each depth, the top's last.
            tokens_BT: The tokens that went in; each position is compared with the next one.
        """
        self.predicted([logits_BTV[:, :-1].flatten(0, 1) for logits_BTV in logits], tokens_BT[:, 1:].flatten())
        if self._teacher is not None:
            wanted_BTV = self._teacher(tokens_BT)
            self.compared([logits_BTV.flatten(0, 1) for logits_BTV in logits], wanted_BTV.flatten(0, 1))

    def predicted(self, logits: Sequence[Tensor], next_N: Tensor) -> None:
        """Count positions that have a next token.

        Args:
            logits: ``logits_NV`` at each depth, the top's last.
            next_N: The tokens that came next.
        """
        top_N = logits[-1].argmax(-1)
        for row, logits_NV in enumerate(logits):
            token_N, loss = logits_NV.argmax(-1), F.cross_entropy(logits_NV, next_N, reduction="sum")
            sums = torch.stack([loss.double(), (token_N == next_N).sum().double(), (token_N == top_N).sum().double()])
            self._sums_E5[row, :3] += sums.cpu()
        self._predicted += len(next_N)

    def compared(self, logits: Sequence[Tensor], wanted_NV: Tensor) -> None:
        """Compare positions with another model's.

        Args:
            logits: ``logits_NV`` at each depth, the top's last.
            wanted_NV: The other model's logits.
        """
        logq_NV = wanted_NV.log_softmax(-1)
        for row, logits_NV in enumerate(logits):
            logp_NV = logits_NV.log_softmax(-1)
            divergence = F.kl_div(logp_NV, logq_NV, log_target=True, reduction="sum")
            same = (logp_NV.argmax(-1) == logq_NV.argmax(-1)).sum()
            self._sums_E5[row, 3:] += torch.stack([divergence.double(), same.double()]).cpu()
        self._compared += len(wanted_NV)

    def compute(self) -> dict[int, dict[str, float]]:
        """The scores of each depth.

        ``perplexity`` is the exponential of the mean cross-entropy of true next tokens; ``accuracy`` is how often the
        likeliest token is the true next one, ``agreement`` how often it is the top's likeliest token. Beside another
        model also ``divergence``, the mean KL(that model || this depth) in nats a position, and ``fidelity``, how often
        the likeliest token is that model's.
        """
        found = {}
        for depth, (loss, right, agreed, divergence, same) in zip(self.depths, self._sums_E5.tolist(), strict=True):
            predicted, compared = max(1, self._predicted), max(1, self._compared)
            scores = {"perplexity": math.exp(loss / predicted)}
            scores |= {"accuracy": right / predicted, "agreement": agreed / predicted}
            if self._compared:
                scores |= {"divergence": divergence / compared, "fidelity": same / compared}
            found[depth] = scores
        return found
