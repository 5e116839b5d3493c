"""Which of some policies keep a risk below a bound with a stated probability. The statistics are MAPIE's, but for one.

Policies are given in order, the surest first. What is counted are documents: they are drawn alike and do not depend on
one another, which positions of one document do.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np

from dynamax.errors import UserError

Method = Literal["ltt", "ucb", "crc", "naive"]
METHODS: tuple[Method, ...] = get_args(Method)

ROUNDING = 1e-12

MOST = 100_000
"""Documents beyond which nobody is told how many would be needed."""


def promised(
    losses_DC: np.ndarray, epsilon: float, delta: float, method: Method, *, binary: bool = False
) -> int | None:
    """Place of the last policy whose promise holds, in the order given; None if not even the first one's does.

    - ``ltt``: the mean loss of all documents is at most epsilon with probability at least 1 - delta. Hoeffding-Bentkus
      p-values, tested one after the other in the order given (Angelopoulos et al. 2021, arXiv 2110.01052).
    - ``ucb``: the same promise, from the upper bound of Waudby-Smith and Ramdas; see ``below``.
    - ``crc``: the mean loss is at most epsilon on average over calibrations; delta is not read (Angelopoulos et al.
      2022, arXiv 2208.02814).
    - ``naive``: the mean loss of these very documents is at most epsilon. It promises nothing, and is here to compare.

    Args:
        losses_DC: Loss in [0, 1] of each document under each policy.
        epsilon: The bound, in (0, 1).
        delta: Probability in (0, 1) that the bound does not hold.
        method: See above.
        binary: Whether every loss is 0 or 1, for which ``ltt`` has a closer p-value.

    Raises:
        UserError: If MAPIE is not installed.
    """
    count, policies = losses_DC.shape
    if method == "naive":
        return last_of(losses_DC.mean(0) <= epsilon)
    mapie = statistics()
    if method == "ltt":
        p_values = mapie["compute_hoeffding_bentkus_p_value"](losses_DC.mean(0), count, epsilon, binary=binary)[:, 0]
        valid = mapie["control_fwer"](p_values, delta, mapie["FWERFixedSequenceTesting"]())
        return int(max(valid)) if len(valid) else None
    # Both need losses that do not fall along the order. Where one does, the greatest so far stands for it.
    rising_DC = np.maximum.accumulate(losses_DC, axis=1)
    if method == "ucb":
        return last_of(below(rising_DC, epsilon, delta))
    _, bound_C = mapie["get_r_hat_plus"](rising_DC, np.arange(policies), "crc", None, None, None)
    return last_of(np.asarray(bound_C) <= epsilon + ROUNDING)


def below(losses_DC: np.ndarray, epsilon: float, delta: float) -> np.ndarray:
    """Whether the upper bound of Waudby-Smith and Ramdas on each mean is below epsilon, ``holds_C``.

    Somebody bets against a mean of epsilon, document after document. Were it true, his money would grow to 1 / delta
    with a probability of at most delta. MAPIE 1.6 bets on two halves and adds their greatest gains, for which that does
    not hold: its bound is too low more often than delta says.

    Source: Bates et al. 2021, arXiv 2101.02703, section 3.1.3.
    """
    number_D1 = np.arange(1, len(losses_DC) + 1)[:, None]
    mean_DC = (0.5 + losses_DC.cumsum(0)) / (number_D1 + 1)
    spread_DC = (0.25 + ((losses_DC - mean_DC) ** 2).cumsum(0)) / (number_D1 + 1)
    before_DC = np.concatenate([np.full_like(spread_DC[:1], 0.25), spread_DC[:-1]])  # of the documents before
    stake_DC = np.minimum(1.0, np.sqrt(2 * np.log(1 / delta) / (len(losses_DC) * before_DC)))
    return np.log1p(-stake_DC * (losses_DC - epsilon)).cumsum(0).max(0) > np.log(1 / delta)


def last_of(holds_C: np.ndarray) -> int | None:
    """Place of the last of those that hold without a gap from the first on."""
    count = int(np.logical_and.accumulate(holds_C).sum())
    return count - 1 if count else None


def documents_needed(risk: float, epsilon: float, delta: float) -> int | None:
    """Documents at which ``ltt`` would accept a policy of this observed risk; None if no number up to 100,000 does."""
    p_value = statistics()["compute_hoeffding_bentkus_p_value"]
    known = 1
    while known <= MOST and p_value(np.array([risk]), known, epsilon)[0, 0] > delta:
        known = math.ceil(known * 1.05) + 1
    return known if known <= MOST else None


def statistics() -> dict[str, Any]:
    """What is used of MAPIE.

    Raises:
        UserError: If it is not installed.
    """
    try:
        from mapie.risk_control import FWERFixedSequenceTesting, control_fwer
        from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value, get_r_hat_plus
    except ImportError as error:
        raise UserError(
            f"Calibration needs MAPIE 1.6 or later, which is not installed ({error}). Install the extra: pip install "
            f"'dynamax-exits[calibrate]'."
        ) from error
    used = (FWERFixedSequenceTesting, control_fwer, compute_hoeffding_bentkus_p_value, get_r_hat_plus)
    return {each.__name__: each for each in used}
