"""What a run was asked for and cannot have, told before time is spent. Knows trainers, no models."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

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
