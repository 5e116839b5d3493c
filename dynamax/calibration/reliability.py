"""May scores be taken for probabilities of being right? Errors, bins, and two maps that mend scores.

A map is fitted on some scores and measured on others: where it was fitted, every map looks better than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from dynamax.calibration.scores import Scores
from dynamax.errors import UserError

BINS = 15
"""Bins of an expected calibration error, as JEI-DNN counts them (Regol et al. 2024, arXiv 2310.09163)."""

SHOWN = 10
"""Bins of a reliability diagram: each point is a tenth of the positions."""

EDGE = 1e-6
"""Scores are kept so far from 0 and 1 where log-odds are taken."""

COLDEST, HOTTEST = 0.01, 100.0
"""Temperatures beyond these are not looked for. Scores that are all right, or all wrong, end at one of them."""

Treatment = Literal["as scored", "temperature", "isotonic"]
TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)


class Bin(NamedTuple):
    """Positions of neighbouring scores: how many, their mean score, and the share that is right."""

    positions: int
    score: float
    right: float


class Errors(NamedTuple):
    """How far scores are from probabilities.

    Attributes:
        ece: Expected calibration error, in [0, 1].
        brier: Brier score, the mean squared difference from being right (1) or wrong (0), in [0, 1].
        bins: For a reliability diagram, by rising score.
    """

    ece: float
    brier: float
    bins: list[Bin]


@dataclass(frozen=True)
class ExitReliability:
    """One exit's scores.

    Attributes:
        depth: Of the exit.
        positions: That were measured.
        right: Share of them at which the exit says what the full model says.
        score: Their mean score.
        temperature: What was fitted on other positions.
        errors: Of the scores as they are, after the temperature, and after isotonic regression, both fitted on others.
    """

    depth: int
    positions: int
    right: float
    score: float
    temperature: float
    errors: dict[Treatment, Errors]


def reliability(fitted: Sequence[Scores], measured: Sequence[Scores], depths: Sequence[int]) -> list[ExitReliability]:
    """How reliable each exit's scores are.

    Args:
        fitted: Scores of at least one document, on which temperature and isotonic regression are fitted.
        measured: Scores of at least one other document, of which all figures are.
        depths: Of the exits.

    Raises:
        UserError: If scikit-learn is not installed.
    """
    rows: list[ExitReliability] = []
    for index, depth in enumerate(depths):
        known_N, truth_N = joined(fitted, index)
        score_N, right_N = joined(measured, index)
        temperature = fitted_temperature(known_N, truth_N)
        treated: dict[Treatment, np.ndarray] = {
            "as scored": score_N,
            "temperature": at_temperature(score_N, temperature),
            "isotonic": isotonic(known_N, truth_N)(score_N),
        }
        errors: dict[Treatment, Errors] = {
            name: Errors(calibration_error(each_N, right_N), brier(each_N, right_N), binned(each_N, right_N, SHOWN))
            for name, each_N in treated.items()
        }
        rows.append(
            ExitReliability(depth, len(score_N), float(right_N.mean()), float(score_N.mean()), temperature, errors)
        )
    return rows


def joined(scores: Sequence[Scores], index: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores at one exit, document after document, and whether it is right: ``score_N`` and ``right_N``."""
    score_N = np.concatenate([each.score_ET[index] for each in scores])
    return score_N, np.concatenate([each.right_ET[index] for each in scores])


def binned(score_N: np.ndarray, right_N: np.ndarray, bins: int) -> list[Bin]:
    """Bins that hold as many positions each, by rising score; none is empty.

    Positions with equal scores may fall into several bins. Each then counts as right by the share of all of them, so
    that the order in which positions are given does not matter.

    Args:
        score_N: Scores in [0, 1], at least one.
        right_N: Whether each is right.
        bins: How many bins, if there are as many positions.
    """
    _, value_N = np.unique(score_N, return_inverse=True)
    share_N = (np.bincount(value_N, right_N) / np.bincount(value_N))[value_N]
    parts = np.array_split(np.argsort(score_N, kind="stable"), bins)
    return [Bin(len(part), float(score_N[part].mean()), float(share_N[part].mean())) for part in parts if len(part)]


def calibration_error(score_N: np.ndarray, right_N: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: the mean over positions of ``|share right - mean score|`` of their bin.

    Bins hold as many positions each (``binned``). Few positions in a bin make the error greater than it is: with n
    positions in a bin, chance alone gives about ``0.4 / sqrt(n)`` where half are right.

    Source: Naeini et al. 2015 (AAAI), there with bins of equal width; bins of equal size as in JEI-DNN.
    """
    return sum(each.positions * abs(each.right - each.score) for each in binned(score_N, right_N, bins)) / len(score_N)


def brier(score_N: np.ndarray, right_N: np.ndarray) -> float:
    """Brier score, the mean of ``(score - right)^2``.

    Raises:
        UserError: If scikit-learn is not installed.
    """
    return float(learners()["brier_score_loss"](right_N.astype(int), score_N, labels=[0, 1]))


def at_temperature(score_N: np.ndarray, temperature: float) -> np.ndarray:
    """``sigmoid(logit(score) / temperature)``, scores first kept within [EDGE, 1 - EDGE]."""
    return np.exp(-np.logaddexp(0.0, -log_odds(score_N) / temperature))


def log_odds(score_N: np.ndarray) -> np.ndarray:
    """``log(score / (1 - score))``, scores first kept within [EDGE, 1 - EDGE]."""
    inside_N = np.clip(score_N.astype(float), EDGE, 1 - EDGE)
    return np.log(inside_N) - np.log1p(-inside_N)


def fitted_temperature(score_N: np.ndarray, right_N: np.ndarray) -> float:
    """The temperature in [COLDEST, HOTTEST] at which being right and wrong is likeliest, given the scores.

    The negative log-likelihood is convex in 1 / T, so it has one minimum in T. Above 1, scores were too far from one
    half: too sure where they are high.

    Source: Guo et al. 2017, arXiv 1706.04599, for two classes.

    Raises:
        UserError: If scikit-learn is not installed, with which SciPy comes.
    """
    signed_N = np.where(right_N, 1.0, -1.0) * log_odds(score_N)
    found = learners()["minimize_scalar"](
        lambda log_t: float(np.logaddexp(0.0, -signed_N / np.exp(log_t)).mean()),
        bounds=(np.log(COLDEST), np.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def isotonic(score_N: np.ndarray, right_N: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """How often a score is right: the rising step function that fits best; scores outside count as the nearest.

    Raises:
        UserError: If scikit-learn is not installed.
    """
    regression = learners()["IsotonicRegression"](y_min=0.0, y_max=1.0, out_of_bounds="clip")
    return regression.fit(score_N, right_N.astype(float)).predict


def learners() -> dict[str, Any]:
    """What is used of scikit-learn, and of SciPy, which it brings.

    Raises:
        UserError: If it is not installed.
    """
    try:
        from scipy.optimize import minimize_scalar
        from sklearn.isotonic import IsotonicRegression
        from sklearn.metrics import brier_score_loss
    except ImportError as error:
        raise UserError(
            f"Calibration needs scikit-learn, which is not installed ({error}). Install the extra: pip install "
            f"'dynamax-exits[calibrate]'."
        ) from error
    return {each.__name__: each for each in (minimize_scalar, IsotonicRegression, brier_score_loss)}
