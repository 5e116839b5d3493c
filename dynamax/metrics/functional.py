"""Scores of exits as pure functions, each an ``_update`` (a batch to sums) and a ``_compute`` (sums to a value).

Knows tensors and strings; not who made them. Token scores are shares in [0, 1]; nan where nothing was counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamax.errors import UserError


def _agreement_update(token_BT: Tensor, reference_BT: Tensor, live_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if token_BT.shape != reference_BT.shape or (live_BT is not None and live_BT.shape != token_BT.shape):
        live = "" if live_BT is None else f", live positions {tuple(live_BT.shape)}"
        raise UserError(
            f"Wanted tokens of one shape; given tokens {tuple(token_BT.shape)}, reference "
            f"{tuple(reference_BT.shape)}{live}."
        )
    live_BT = torch.ones_like(token_BT, dtype=torch.bool) if live_BT is None else live_BT.bool()
    return ((token_BT == reference_BT) & live_BT).sum(), live_BT.sum()


def _ratio_compute(part: Tensor, whole: Tensor) -> Tensor:
    return part.double() / whole.double()


def agreement(token_BT: Tensor, reference_BT: Tensor, live_BT: Tensor | None = None) -> Tensor:
    """Share of positions at which two token sequences are equal (an exit's and the full model's: consistency).

    Args:
        token_BT: Token ids; any shape.
        reference_BT: Token ids of the full model, of the same shape.
        live_BT: Positions that count; all if None.

    Raises:
        UserError: If the shapes differ.

    >>> agreement(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 5, 3]])).item()
    0.6666666666666666
    """
    return _ratio_compute(*_agreement_update(token_BT, reference_BT, live_BT))


def _auroc_compute(score_N: Tensor, label_N: Tensor) -> Tensor:
    _, group_N, size_G = score_N.unique(return_inverse=True, return_counts=True)
    rank_G = size_G.cumsum(0).double() - (size_G.double() - 1) / 2  # ties share their mean rank, counted from 1
    positives = label_N.sum().double()
    wins = rank_G[group_N][label_N].sum() - positives * (positives + 1) / 2
    return wins / (positives * (label_N.numel() - positives))


def auroc(score_N: Tensor, label_N: Tensor) -> Tensor:
    """Area under the ROC curve: how often a positive outscores a negative, ties counting half (Mann-Whitney U).

    Unlike torchmetrics' ``binary_auroc`` it takes scores of any range as they are, log-odds among them, and gives nan
    without a warning where one class is absent, as agreement at a good exit may be.

    Args:
        score_N: Confidences; greater is surer. Any shape.
        label_N: Whether leaving was right, bool or 0 and 1, of the same shape.

    Raises:
        UserError: If the shapes differ.

    >>> auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])).item()
    0.75
    """
    _check_labels(score_N, label_N)
    return _auroc_compute(score_N.flatten(), label_N.flatten().bool())


def _check_labels(score_N: Tensor, label_N: Tensor) -> None:
    if score_N.shape != label_N.shape:
        raise UserError(f"Wanted a label a score; given {tuple(score_N.shape)} and {tuple(label_N.shape)}.")


def _answers_update(answers: Sequence[str], references: Sequence[str]) -> tuple[int, int]:
    if len(answers) != len(references):
        raise UserError(f"Wanted a reference an answer; given {len(answers)} answers, {len(references)} references.")
    return sum(map(_same, answers, references)), len(answers)


def _same(answer: str, reference: str) -> bool:
    return answer.casefold().split() == reference.casefold().split()


def answer_agreement(answers: Sequence[str], references: Sequence[str]) -> Tensor:
    """Share of answers equal to the full model's, case and white space apart.

    Raises:
        UserError: If there are not as many of the one as of the other.

    >>> answer_agreement([" Paris.", "Lyon"], ["paris.", "Nice"]).item()
    0.5
    """
    equal, total = _answers_update(answers, references)
    return _ratio_compute(torch.tensor(equal), torch.tensor(total))
