"""What several modules refuse: several devices, a store without some exit, values that are not finite."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from dynamax.errors import UserError


class ChecksBeforeFit(ABC):
    """A callback that can refuse a run before its data is prepared, which may take long."""

    @abstractmethod
    def check_before_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a UserError for a run that cannot end well; the model's heads are built."""


def one_device(trainer: Trainer, module: LightningModule) -> None:
    """Raise a UserError for several devices: each would find figures of a part of the examples."""
    if trainer.world_size > 1:
        raise UserError(
            f"{type(module).__name__} was given {trainer.world_size} devices; it runs on one. Set trainer.devices to 1 "
            f"and trainer.num_nodes to 1."
        )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is infinite or not a number; integers always are.

    >>> all_finite([torch.ones(3), torch.arange(2)]), all_finite([torch.ones(3), torch.tensor(float("nan"))])
    (True, False)
    """
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]  # a process checks its shards
    floats = [tensor.detach() for tensor in local if tensor.is_floating_point() and tensor.numel()]
    return math.isfinite(torch.nn.utils.get_total_norm(floats, torch.inf)) if floats else True


def check_depths(exits: Iterable[int], kept: Iterable[int]) -> None:
    """Raise a UserError for a store that lacks the depth of an exit."""
    if not set(exits) <= set(kept):
        raise UserError(
            f"The store keeps hidden states at the depths {sorted(kept)}, but exits are to be trained at "
            f"{sorted(exits)}. Give the data module the same depths as the model's exits."
        )


def check_finite(what: str, tensors: Iterable[Tensor], *, step: int, phase: str, rate: float) -> None:
    """Stop a run whose values are no numbers any more.

    Args:
        what: Name of the values.
        tensors: The values.
        step: Optimiser steps done, this one counted.
        phase: Name of the phase that is running.
        rate: Its learning rate.

    Raises:
        UserError: If a value is infinite or not a number.
    """
    if not all_finite(tensors):
        raise UserError(
            f"{what} is infinite or not a number at step {step}, in the phase {phase}. Training stops here. Lower "
            f"model.phases.{phase}.learning_rate, which is {rate:g}, set trainer.gradient_clip_val: 1, or train "
            f"with trainer.precision: 32-true. Heads that were saved before stay as they are."
        )
