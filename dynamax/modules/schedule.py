"""Learning rates over a run, and the optimiser of a whole model. Knows parameters and steps alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def warm_cosine(step: int, *, length: int, warmup: float) -> float:
    """Factor of the learning rate: a linear rise, then half a cosine; 0 outside [0, length).

    Args:
        step: Counted from 0.
        length: Steps in all.
        warmup: Part of them over which the rate rises.
    """
    rise = max(1, round(warmup * length))
    if not 0 <= step < max(1, length):
        return 0.0
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, length - rise)))


def warm_flat_linear(step: int, *, length: int, warmup: int, flat: float) -> float:
    """Factor of the learning rate: a linear rise, a plateau, then a straight line to 0 at the end.

    Args:
        step: Counted from 0.
        length: Steps in all.
        warmup: Steps of the rise.
        flat: Part of all steps after which the rate falls.
    """
    bend = max(warmup, round(flat * length))
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < bend else max(0.0, (length - step) / max(1, length - bend))


class Optimiser(NamedTuple):
    """AdamW, betas .9 and .95; its learning rate rises, stays, and falls in a straight line to 0.

    Attributes:
        learning_rate: Peak.
        warmup: Steps over which it rises.
        flat: Part of all steps, in [0, 1], after which it falls.
        weight_decay: On matrices; vectors have none.
    """

    learning_rate: float
    warmup: int
    flat: float
    weight_decay: float

    def over(self, parameters: Iterable[nn.Parameter], steps: int) -> OptimizerLRScheduler:
        """Optimiser and schedule of so many steps, for the parameters that have gradients."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        rates = {"length": steps, "warmup": self.warmup, "flat": self.flat}
        schedule = LambdaLR(optimizer, lambda step: warm_flat_linear(step, **rates))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
