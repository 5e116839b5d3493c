"""What a run was asked for and cannot have, told before time is spent. Knows trainers, no models."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from dynamax.errors import UserError


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


def as_loaded(trainer: Trainer, module: LightningModule) -> None:
    """Refuse a trainer under which a model would not compute as it was loaded, and the report would not know.

    Raises:
        UserError: For a precision or a strategy of the trainer's own; if it has several devices.
    """
    one_device(trainer, module)
    precision, strategy = trainer.precision_plugin, trainer.strategy
    if type(precision) is not Precision:
        raise UserError(
            f"trainer.precision {precision.precision} ({type(precision).__name__}) would change what "
            f"{type(module).__name__} computes in. Leave trainer.precision out, and set model.dtype, such as bfloat16."
        )
    if not isinstance(strategy, SingleDeviceStrategy):
        raise UserError(
            f"{type(module).__name__} runs in one process on one device, as it was loaded; the trainer's strategy is "
            f"{type(strategy).__name__}. Leave trainer.strategy out."
        )


def measurable(trainer: Trainer) -> None:
    """Refuse a device whose work cannot be timed.

    Raises:
        UserError: If it is neither a processor nor a CUDA device.
    """
    kind = trainer.strategy.root_device.type
    if kind not in ("cpu", "cuda"):
        raise UserError(
            f"test takes times, and there is no clock for the device {kind}. Set trainer.accelerator to cpu or cuda."
        )


def epochs_for_gates(trainer: Trainer, lens_epochs: int) -> None:
    """Refuse a run that ends before the gates' turn; a trial run of one batch may.

    Raises:
        UserError: If no epoch is left.
    """
    epochs = trainer.max_epochs
    if epochs is not None and 0 < epochs <= lens_epochs and not cast(Any, trainer).fast_dev_run:
        raise UserError(
            f"lens_epochs is {lens_epochs} and trainer.max_epochs is {epochs}, so no epoch is left for the gates. "
            f"Raise trainer.max_epochs, lower lens_epochs, or leave out gates and gate_objective."
        )
