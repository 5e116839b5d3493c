"""JEI-DNN: gates and lenses trained in turn, each towards what the other does now. Knows no policy but its rule.

Gates learn where leaving is best by the lenses' losses and the exits' costs; lenses learn most from the positions that
the gates would let out at their exit. The phases of ``HeadsModule`` alternate the two objectives, behind a warm-up of
the lenses alone::

    phases:
      warmup: {objective: LensDistillation, epochs: 2}
      gates: {objective: JointGates, steps: 200}
      lenses: {objective: JointLenses, steps: 200}
    alternate: [gates, lenses]

Source: JEI-DNN (Regol et al. 2024, arXiv 2310.09163), there for images and linear heads; here the unit is a position,
and a lens is right where it says what the full model says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.data.batch import HiddenBatch
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.objectives.base import Kind, Objective, counted
from dynamax.objectives.lens import LensDistillation
from dynamax.policies.joint import exit_distribution
from dynamax.types import Evidence, Site, Spec

Criterion = Literal["cross-entropy", "error", "probability"]
Targets = Literal["subsequent", "best"]


class JointGates(Objective):
    """Binary cross-entropy of every gate with: is it best to have left by here?

    The best place of a position, t, is the exit or the top where ``loss + tradeoff * cost`` is least. The cost is that
    of all blocks up to there and of reading every exit passed, over the cost of plain full decoding.

    Args:
        tradeoff: Lambda of the paper, at least 0: what the whole cost of the model weighs against the loss, in the
            unit of the criterion. Greater leaves earlier.
        criterion: The loss of an exit at a position. ``cross-entropy`` with the full model's token, in nats; ``error``:
            1 where another token is said; ``probability``: less the full model's token's.
        targets: ``subsequent``: every gate from t on learns to leave; ``best``: the one at t alone, for exits that
            get worse with depth.
        limit: Positions that should leave are weighed by how many should not for each that should, up to this, gate by
            gate and batch by batch. 1 for no weights: the gates' confidences are then probabilities.
        readout: Cost of reading an exit, in blocks; left out, that of the output matrix over 12 D^2 weights of a
            usual block, V / (12 D).

    Raises:
        UserError: If an option is out of range.
    """

    trains: ClassVar[frozenset[Kind]] = frozenset(["gates"])

    def __init__(
        self,
        *,
        tradeoff: float = 1.0,
        criterion: Criterion = "cross-entropy",
        targets: Targets = "subsequent",
        limit: float = 5.0,
        readout: float | None = None,
    ) -> None:
        if not tradeoff >= 0 or not limit >= 1 or (readout is not None and not readout >= 0):
            raise UserError(
                f"JointGates was given tradeoff {tradeoff}, limit {limit} and readout {readout}; wanted: a tradeoff "
                f"and a readout of at least 0, a limit of at least 1. Change them."
            )
        self.tradeoff, self.limit, self.readout = tradeoff, limit, readout
        self.criterion: Criterion = criterion
        self.targets: Targets = targets

    def loss(self, bank: ExitBank, batch: HiddenBatch, sites: Mapping[int, Site]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over positions, summed over gates; ``best/DEPTH`` is the share of positions whose best place is there.

        ``bce/DEPTH/GATE`` is each gate's own loss, weights included.
        """
        live_BT = counted(batch)
        evidence = bank.known_texts(batch.hidden, sites, live_BT, batch.text)
        spec = sites[bank.depths[0]].spec
        with torch.no_grad():
            token_N, prob_N = batch.top_tokens_BTK[live_BT][:, 0], batch.top_probs_BTK[live_BT][:, 0]
            losses = [self._losses(evidence[depth], token_N) for depth in bank.depths]
            costs = exit_costs(bank.depths, spec, self.readout)
            place_N = best_places([*losses, self._top(prob_N)], costs, self.tradeoff)
        size = max(1, len(place_N))
        total, seen = torch.zeros((), device=live_BT.device), {}
        for index, depth in enumerate([*bank.depths, spec.depth]):
            seen[f"best/{depth}"] = (place_N == index).sum() / size
        for index, depth in enumerate(bank.depths):
            target_N = (place_N <= index if self.targets == "subsequent" else place_N == index).float()
            leave = target_N.sum()
            weight = ((len(target_N) - leave) / leave.clamp_min(1)).clamp(1.0, self.limit)
            for name in bank.gates(depth):
                score_N = evidence[depth].score(name).float()
                loss = F.binary_cross_entropy_with_logits(score_N, target_N, pos_weight=weight, reduction="sum") / size
                total = total + loss
                seen[f"bce/{depth}/{name}"] = loss.detach()
        return total, seen

    def _losses(self, evidence: Evidence, token_N: Tensor) -> Tensor:
        """The criterion at an exit."""
        if self.criterion == "error":
            return (evidence.token != token_N).float()
        if self.criterion == "probability":
            return -evidence.probs.gather(-1, token_N[:, None])[:, 0]
        return evidence.logits.logsumexp(-1) - evidence.logits.gather(-1, token_N[:, None])[:, 0]

    def _top(self, prob_N: Tensor) -> Tensor:
        """The criterion at the top, which says the full model's token."""
        if self.criterion == "error":
            return torch.zeros_like(prob_N)
        return -prob_N if self.criterion == "probability" else -prob_N.log()


class JointLenses(Objective):
    """Lens distillation in which a position counts at an exit as much as the gates would let it leave there.

    ``sum_e rho P_e CE_e`` over the exits' losses CE, where P is JEI-DNN's exit distribution and rho = sum(CE) /
    sum(P CE) brings a position's sum back to what it is without weights. Rho is taken as a constant. The paper's code
    lets gradients through it; then ``sum(P CE) rho`` is ``sum(CE)`` whatever P is, so gradient and loss are those of
    plain training and the gates change nothing.

    Args:
        lenses: What each lens learns, position by position; left out, ``LensDistillation`` with its defaults.
        gate: Class name of the gates that say P; may be left out where every exit has just one.
    """

    trains: ClassVar[frozenset[Kind]] = frozenset(["lenses"])

    def __init__(self, *, lenses: LensDistillation | None = None, gate: str | None = None) -> None:
        self.lenses = LensDistillation() if lenses is None else lenses
        self.gate = gate
        self.tokens = self.lenses.tokens

    def loss(self, bank: ExitBank, batch: HiddenBatch, sites: Mapping[int, Site]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over positions; ``leave/DEPTH`` is the mean of P, ``cross_entropy/DEPTH`` the plain loss."""
        losses = self.lenses.each(bank, batch, sites)
        if not losses:
            return torch.zeros((), device=batch.live_BT.device), {}
        with torch.no_grad():
            evidence = bank.known_texts(batch.hidden, sites, counted(batch), batch.text)
            leave_EN, _ = exit_distribution(torch.stack([evidence[d].confidence(self.gate) for d in bank.depths]))
        weights = dict(zip(bank.depths, leave_EN, strict=True))
        loss_LN, weight_LN = torch.stack(list(losses.values())), torch.stack([weights[depth] for depth in losses])
        size = max(1, loss_LN.shape[1])
        seen = {f"leave/{depth}": leave_N.sum() / size for depth, leave_N in weights.items()}
        seen |= {f"cross_entropy/{depth}": loss_N.detach().sum() / size for depth, loss_N in losses.items()}
        return (rescaled(loss_LN.detach(), weight_LN) * loss_LN).sum() / size, seen


def rescaled(loss_LN: Tensor, weight_LN: Tensor) -> Tensor:
    """Weights whose weighted sum of the losses is their plain sum at each position; 0 where all weights are."""
    weighted_N = (weight_LN * loss_LN).sum(0)
    rho_N = torch.where(weighted_N > 0, loss_LN.sum(0) / weighted_N.masked_fill(weighted_N <= 0, 1.0), 0.0)
    return weight_LN * rho_N


def exit_costs(depths: Sequence[int], spec: Spec, readout: float | None) -> list[float]:
    """Cost of leaving at each exit, and at the top behind all of them, over that of plain full decoding.

    Args:
        depths: Of the exits, ascending.
        spec: Depth, width and vocabulary of the model.
        readout: Cost of reading an exit or the top, in blocks; None for V / (12 D).
    """
    read = spec.vocab / (12 * spec.width) if readout is None else readout
    return [(depth + read * count) / (spec.depth + read) for count, depth in enumerate([*depths, spec.depth], 1)]


def best_places(losses: Sequence[Tensor], costs: Sequence[float], tradeoff: float) -> Tensor:
    """Index of the exit where ``loss + tradeoff * cost`` is least, ``place_N``; of equals the shallowest.

    Args:
        losses: ``loss_N`` of each exit, shallowest first, then of the top.
        costs: Of the same.
        tradeoff: Lambda.
    """
    total_EN = torch.stack([loss_N + tradeoff * cost for loss_N, cost in zip(losses, costs, strict=True)])
    return total_EN.argmin(0)
