"""DYNAMAX's objective: each gate learns whether leaving at its exit is right. Knows no policy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.data.batch import HiddenBatch
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.objectives.base import ExitReader, Kind, Objective, Through, best_token, counted, in_top_k
from dynamax.types import Site

GateLabels = Literal["agreement", "oracle-in-exit", "exit-in-oracle"]
Weights = Literal["uniform", "increasing", "decreasing"]


class GateObjective(Objective):
    """Binary cross-entropy of every gate against labels made from the exit's and the full model's tokens.

    Labels are remembered by document for as long as the lenses do not change.

    Source: DYNAMAX (Nogales et al. 2025, arXiv 2504.20922). The authors' code has ``labels: oracle-in-exit``,
    ``k: 15``, ``readout: logit-lens`` and ``weights: increasing``; descriptions of the paper also have
    ``exit-in-oracle`` and ``decreasing``. The defaults ask what matters to lossy decoding instead: is the token that
    would be emitted here the full model's?

    Args:
        labels: Leaving is right where the exit's token is the full model's (``agreement``); where the full model's
            token is among the exit's ``k`` most likely ones (``oracle-in-exit``); or where the exit's token is among
            the full model's ``k`` most likely ones (``exit-in-oracle``).
        k: For the latter two; with 1 all three say the same. At most what the store kept, for ``exit-in-oracle``.
        readout: What the exit's tokens are read through: its ``lens``, as in decoding, or the ``logit-lens``.
        weights: Share of each exit in the loss, by depth. As gates share no parameters, a constant factor hardly
            moves an Adam-type optimiser.
        balance: Weigh positive positions so that they count as much as the negative ones of a batch. Confidences are
            then no longer probabilities of being right.

    Raises:
        UserError: If ``k`` is not positive, or is given beside ``agreement``.
    """

    trains: ClassVar[frozenset[Kind]] = frozenset(["gates"])

    def __init__(
        self,
        *,
        labels: GateLabels = "agreement",
        k: int = 1,
        readout: Through = "lens",
        weights: Weights = "uniform",
        balance: bool = False,
    ) -> None:
        if k < 1 or (labels == "agreement" and k != 1):
            raise UserError(
                f"GateObjective was given labels {labels} and k {k}; k must be at least 1, and agreement is about one "
                f"token. Leave k out, or choose oracle-in-exit or exit-in-oracle."
            )
        self.direction: GateLabels = labels
        self.k = k
        self.weights: Weights = weights
        self.balance = balance
        self.tokens = k if labels == "exit-in-oracle" else 1
        self._reader = ExitReader(readout, best_token if labels == "exit-in-oracle" else in_top_k(k))

    def forget(self, changed: Collection[Kind] | None) -> None:
        """Forget the labels, if the lenses that they were read through have changed."""
        self._reader.forget(changed)

    def loss(self, bank: ExitBank, batch: HiddenBatch, sites: Mapping[int, Site]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum over exits and gates; ``positive/DEPTH`` and ``bce/DEPTH/GATE`` are reported."""
        shares = dict(zip(bank.depths, depth_weights(len(bank.depths), self.weights), strict=True))
        total, seen = torch.zeros((), device=batch.live_BT.device), {}
        evidence = bank.known_texts(batch.hidden, sites, counted(batch), batch.text)
        for depth, label_N in self.labels(bank, batch, sites).items():
            target_N = label_N.float()
            positions, positive = max(1, len(target_N)), target_N.sum()
            weight = None
            if self.balance:
                weight = torch.where(positive > 0, (len(target_N) - positive) / positive.clamp_min(1), 1.0)
            seen[f"positive/{depth}"] = positive / positions
            for name in bank.gates(depth):
                score_N = evidence[depth].score(name).float()
                loss = F.binary_cross_entropy_with_logits(score_N, target_N, pos_weight=weight, reduction="sum")
                total = total + shares[depth] * (loss / positions)
                seen[f"bce/{depth}/{name}"] = (loss / positions).detach()
        return total, seen

    def labels(self, bank: ExitBank, batch: HiddenBatch, sites: Mapping[int, Site]) -> dict[int, Tensor]:
        """Whether leaving is right, bool ``label_N`` at the counted positions, for each exit that has a gate."""
        answers = {depth: self._reader(bank, batch, sites[depth]) for depth in bank.depths if bank.gates(depth)}
        if self.direction != "exit-in-oracle":
            return answers
        likely_NK = batch.top_tokens_BTK[counted(batch)]
        if self.k > likely_NK.shape[1]:
            raise UserError(
                f"GateObjective was given labels exit-in-oracle and k {self.k}, but the store keeps "
                f"{likely_NK.shape[1]} tokens a position. Lower k, or fill a store with more."
            )
        return {d: (answer_N[:, None] == likely_NK[:, : self.k]).any(-1) for d, answer_N in answers.items()}


def depth_weights(exits: int, weights: Weights) -> list[float]:
    """Share of each exit, shallowest first; they add up to 1. DYNAMAX's four: 0.1, 0.2, 0.3, 0.4."""
    rising = [1.0] * exits if weights == "uniform" else [float(rank + 1) for rank in range(exits)]
    ordered = rising[::-1] if weights == "decreasing" else rising
    return [share / sum(ordered) for share in ordered]
