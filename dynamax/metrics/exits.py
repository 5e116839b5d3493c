"""Scores of exits as torchmetrics classes, which add up over batches and processes. Know tensors and text, no models.

A score over nothing is nan.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dynamax.errors import UserError


class Ratio(Metric):
    """A quantity that is one sum over another. A subclass writes ``update``, and calls ``add`` in it."""

    is_differentiable = False
    full_state_update = False
    part: Tensor
    whole: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("part", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("whole", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, part: Tensor | int, whole: Tensor | int) -> None:
        """Add to both sums."""
        self.part = self.part + part
        self.whole = self.whole + whole

    def compute(self) -> Tensor:
        """The ratio, float64."""
        return self.part.double() / self.whole.double()


class ExitAgreement(Ratio):
    """Share of positions at which an exit's token is the full model's; over decoded tokens, consistency.

    >>> metric = ExitAgreement()
    >>> metric.update(torch.tensor([[1, 2]]), torch.tensor([[1, 3]]))
    >>> metric.update(torch.tensor([[4, 4]]), torch.tensor([[4, 9]]), torch.tensor([[True, False]]))
    >>> metric.compute().item()
    0.6666666666666666
    """

    higher_is_better = True

    def update(self, token_BT: Tensor, reference_BT: Tensor, live_BT: Tensor | None = None) -> None:
        """Add positions.

        Args:
            token_BT: Token ids; any shape.
            reference_BT: Token ids of the full model, of the same shape.
            live_BT: Positions that count; all if None.

        Raises:
            UserError: If the shapes differ.
        """
        if token_BT.shape != reference_BT.shape or (live_BT is not None and live_BT.shape != token_BT.shape):
            live = "" if live_BT is None else f", live positions {tuple(live_BT.shape)}"
            raise UserError(
                f"Wanted tokens of one shape; given tokens {tuple(token_BT.shape)}, reference "
                f"{tuple(reference_BT.shape)}{live}."
            )
        live_BT = torch.ones_like(token_BT, dtype=torch.bool) if live_BT is None else live_BT.bool()
        self.add(((token_BT == reference_BT) & live_BT).sum(), live_BT.sum())


class AnswerAgreement(Ratio):
    """Share of answers equal to the full model's, case and white space apart.

    >>> metric = AnswerAgreement()
    >>> metric.update(["Paris", "Lyon"], [" paris", "Nice"])
    >>> metric.compute().item()
    0.5
    """

    higher_is_better = True

    def update(self, answers: Sequence[str], references: Sequence[str]) -> None:
        """Add answers.

        Raises:
            UserError: If there are not as many of the one as of the other.
        """
        if len(answers) != len(references):
            raise UserError(
                f"Wanted a reference an answer; given {len(answers)} answers, {len(references)} references."
            )
        words = [(a.casefold().split(), r.casefold().split()) for a, r in zip(answers, references, strict=True)]
        self.add(sum(mine == theirs for mine, theirs in words), len(words))


class BlocksPerToken(Ratio):
    """Block calls a decoded token.

    Count steps of decoding and leave the prompt's own pass out. A decoder that verifies several tokens in one pass
    gives all calls and all tokens of that pass.

    >>> metric = BlocksPerToken()
    >>> metric.update(10)
    >>> metric.update(30, tokens=3)
    >>> metric.compute().item()
    10.0
    """

    higher_is_better = False

    def update(self, blocks: int, tokens: int = 1) -> None:
        """Add block calls that gave ``tokens`` tokens."""
        self.add(blocks, tokens)


class GateAUROC(Metric):
    """Area under the ROC curve of a gate's score against whether leaving was right.

    Exact, so it keeps every score and label it was given.

    >>> metric = GateAUROC()
    >>> metric.update(torch.tensor([0.1, 0.4]), torch.tensor([False, False]))
    >>> metric.update(torch.tensor([0.35, 0.8]), torch.tensor([True, True]))
    >>> metric.compute().item()
    0.75
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    score: list[Tensor]
    label: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("score", [], dist_reduce_fx="cat")
        self.add_state("label", [], dist_reduce_fx="cat")

    def update(self, score_BT: Tensor, label_BT: Tensor, live_BT: Tensor | None = None) -> None:
        """Add positions; those not live are left out.

        Args:
            score_BT: Scores; greater is surer. Any shape.
            label_BT: Whether leaving was right, bool or 0 and 1, of the same shape.
            live_BT: Positions that count; all if None.

        Raises:
            UserError: If the shapes differ.
        """
        _check_labels(score_BT, label_BT)
        live_BT = torch.ones_like(label_BT, dtype=torch.bool) if live_BT is None else live_BT.bool()
        self.score.append(score_BT.detach()[live_BT])
        self.label.append(label_BT[live_BT].bool())

    def compute(self) -> Tensor:
        """The area, float64; nan if one class is absent."""
        return auroc(dim_zero_cat(self.score), dim_zero_cat(self.label))


def auroc(score_N: Tensor, label_N: Tensor) -> Tensor:
    """Area under the ROC curve: how often a positive outscores a negative, ties counting half (Mann-Whitney U).

    Unlike torchmetrics' ``binary_auroc`` it takes scores of any range as they are, log-odds among them, and gives nan
    without a warning where one class is absent, as agreement at a good exit may be.

    Args:
        score_N: Scores; greater is surer. Any shape.
        label_N: Whether leaving was right, bool or 0 and 1, of the same shape.

    Raises:
        UserError: If the shapes differ.

    >>> auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])).item()
    0.75
    """
    _check_labels(score_N, label_N)
    label_N = label_N.flatten().bool()
    _, group_N, size_G = score_N.flatten().unique(return_inverse=True, return_counts=True)
    rank_G = size_G.cumsum(0).double() - (size_G.double() - 1) / 2  # ties share their mean rank, counted from 1
    positives = label_N.sum().double()
    wins = rank_G[group_N][label_N].sum() - positives * (positives + 1) / 2
    return wins / (positives * (label_N.numel() - positives))


def _check_labels(score_N: Tensor, label_N: Tensor) -> None:
    if score_N.shape != label_N.shape:
        raise UserError(f"Wanted a label a score; given {tuple(score_N.shape)} and {tuple(label_N.shape)}.")
