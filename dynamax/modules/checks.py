"""What a run was asked for and cannot have, told before time is spent, and whether weights are numbers still."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from dynamax.errors import UserError


class ChecksBeforeFit(ABC):
    """A callback that can refuse a run before its data is prepared, which may take long."""

    @abstractmethod
    def check_before_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run that cannot end well; the model's heads are built.

        Raises:
            UserError: Naming the remedy.
        """


def one_device(trainer: Trainer, module: LightningModule) -> None:
    """Refuse more than one device: figures would be of a part of the examples each.

    Raises:
        UserError: If the trainer has several.
    """
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
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return math.isfinite(torch.nn.utils.get_total_norm(floats, torch.inf)) if floats else True
