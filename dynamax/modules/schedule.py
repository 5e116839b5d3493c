"""Learning rates over a run, and the optimiser of a whole model. Knows parameters and steps alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from dynamax.errors import UserError


class OneRate(NamedTuple):
    """AdamW for a whole model, betas .9 and .95: its learning rate rises, stays, and falls in a straight line to 0.

    Attributes:
        learning_rate: Peak.
        warmup: Steps over which it rises.
        flat: Part of all steps, in [0, 1], after which it falls.
        weight_decay: On matrices; vectors are spared.
    """

    learning_rate: float
    warmup: int
    flat: float
    weight_decay: float

    def check(self, owner: str) -> None:
        """Refuse options out of range.

        Raises:
            UserError: In the owner's name.
        """
        known = 0 < self.learning_rate <= 1 and 0 <= self.weight_decay < math.inf  # false where one is not a number
        if not known or self.warmup < 1 or not 0 <= self.flat <= 1:
            raise UserError(
                f"{owner} was given learning_rate {self.learning_rate}, warmup {self.warmup}, flat {self.flat} and "
                f"weight_decay {self.weight_decay}; learning_rate must lie in (0, 1], warmup be at least 1, flat lie "
                f"in [0, 1], weight_decay be a number of at least 0."
            )

    def over(self, parameters: Sequence[nn.Parameter], steps: int) -> OptimizerLRScheduler:
        """Optimiser and schedule of so many steps."""
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        schedule = LambdaLR(optimizer, warm_flat_linear(steps, warmup=self.warmup, flat=self.flat))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warm_cosine(length: int, warmup: float) -> Callable[[int], float]:
    """Factor of the learning rate by step: a linear rise, then half a cosine; 0 outside [0, length).

    Args:
        length: Steps in all.
        warmup: Part of them over which the rate rises.
    """
    length = max(1, length)
    rise = max(1, round(warmup * length))

    def factor(step: int) -> float:
        if not 0 <= step < length:
            return 0.0
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, length - rise)))

    return factor


def warm_flat_linear(length: int, *, warmup: int, flat: float) -> Callable[[int], float]:
    """Factor of the learning rate by step: a linear rise, a plateau, then a straight line to 0 at the end.

    Args:
        length: Steps in all.
        warmup: Steps of the rise.
        flat: Part of all steps after which the rate falls.
    """
    bend = max(warmup, round(flat * length))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if step < bend:
            return 1.0
        return max(0.0, (length - step) / max(1, length - bend))

    return factor
