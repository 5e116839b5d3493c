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
        self._predicted = self._positions = 0  # the last position of a row has a distribution, but no next token

    def update(self, logits: Sequence[Tensor], tokens_BT: Tensor) -> None:
        """Count one batch.

        Args:
            logits: ``logits_BTV`` at each depth, the top's last.
            tokens_BT: The tokens that went in; each position is compared with the next one.
        """
        next_N = tokens_BT[:, 1:].flatten()
        top_N = logits[-1][:, :-1].argmax(-1).flatten()
        wanted_NV = None if self._teacher is None else self._teacher(tokens_BT).log_softmax(-1).flatten(0, 1)
        for row, logits_BTV in enumerate(logits):
            logits_NV = logits_BTV[:, :-1].flatten(0, 1)
            token_N = logits_NV.argmax(-1)
            loss = F.cross_entropy(logits_NV, next_N, reduction="sum")
            sums = [loss, (token_N == next_N).sum(), (token_N == top_N).sum()]
            if wanted_NV is not None:
                logp_NV = logits_BTV.log_softmax(-1).flatten(0, 1)
                divergence = F.kl_div(logp_NV, wanted_NV, log_target=True, reduction="sum")
                sums += [divergence, (logp_NV.argmax(-1) == wanted_NV.argmax(-1)).sum()]
            self._sums_E5[row, : len(sums)] += torch.stack([each.double() for each in sums]).cpu()
        self._predicted += len(next_N)
        self._positions += tokens_BT.numel()

    def compute(self) -> dict[int, dict[str, float]]:
        """The scores of each depth.

        ``perplexity`` is the exponential of the mean cross-entropy of true next tokens; ``accuracy`` is how often the
        likeliest token is the true next one, ``agreement`` how often it is the top's likeliest token. With a teacher
        also ``divergence``, the mean KL(teacher || this depth) in nats a position, and ``fidelity``, how often the
        likeliest token is the teacher's.
        """
        found = {}
        for depth, (loss, right, agreed, divergence, same) in zip(self.depths, self._sums_E5.tolist(), strict=True):
            predicted, positions = max(1, self._predicted), max(1, self._positions)
            scores = {"perplexity": math.exp(loss / predicted)}
            scores |= {"accuracy": right / predicted, "agreement": agreed / predicted}
            if self._teacher is not None:
                scores |= {"divergence": divergence / positions, "fidelity": same / positions}
            found[depth] = scores
        return found
