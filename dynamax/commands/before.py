"""What is checked of a run of Lightning before it begins: options of the trainer, and folders that are written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer

from dynamax.errors import UserError, shown
from dynamax.files import check_folder

LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "num_nodes": 1,
    "max_epochs": -1,
    "max_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 0,
}
"""Least values of the trainer's numbers; Lightning takes smaller ones, and fails in the middle or does nothing."""
MOST = {"max_epochs": 10**9, "max_steps": 10**12}
SEEDS = 2**32 - 1


def check_numbers(options: Any) -> None:  # noqa: ANN401 - a namespace of jsonargparse
    """Refuse (UserError) numbers with which the trainer would fail later, or never end."""
    trainer, seed = options.trainer, options.seed_everything
    if not hasattr(trainer, "max_epochs"):
        raise UserError(f"trainer was given {shown(trainer)}; wanted: its options, such as max_epochs: 4. Change it.")
    for name, least in LEAST.items():
        value = trainer[name]
        if value is not None and not least <= value <= MOST.get(name, value):
            most = f" and at most {MOST[name]}" if name in MOST else ""
            raise UserError(f"trainer.{name} was given {value}; wanted: at least {least}{most}. Change it.")
    every = trainer.val_check_interval
    if isinstance(every, int | float) and not every > 0:
        raise UserError(f"trainer.val_check_interval was given {every}; wanted: more than 0. Change it.")
    if not isinstance(seed, bool) and not 0 <= seed <= SEEDS:
        raise UserError(f"seed_everything was given {seed}; wanted: a whole number from 0 to {SEEDS}. Change it.")


def check_checkpoint(path: str | Path) -> None:
    """Refuse (UserError) a file that is no checkpoint of the trainer, or is damaged."""
    reason = "it is of another format"
    try:
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True) if is_zipfile(path) else None
        if isinstance(content, dict) and {"state_dict", "loops"} <= set(content):
            return
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        if "Weights only load failed" in reason and is_zipfile(path):
            return  # it holds an object of somebody's: Lightning judges
    raise UserError(
        f"{path} is no checkpoint of the trainer: {shown(reason)}. Name a file that trainer.enable_checkpointing or "
        f"ModelCheckpoint wrote, after --ckpt_path. Folders of heads are given as model.heads."
    )


@contextmanager
def lightning_explained(doing: str) -> Iterator[None]:
    """Around Lightning's own checks: what it refuses is a mistake in what was asked.

    Args:
        doing: What is being done, for the message.

    Raises:
        UserError: With its reason.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"Lightning refuses {doing}: {shown(error, 400)} Correct what it names.") from error


@contextmanager
def trainer_explained() -> Iterator[None]:
    """Around the making of a trainer, which raises errors of several kinds about its options."""
    try:
        yield
    except (UserError, OSError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise UserError(
            f"Lightning's Trainer cannot be made of its options: {shown(error, 400)} Correct the option of trainer "
            f"that it names."
        ) from error


def check_outputs(trainer: Trainer, data: LightningDataModule | None) -> None:
    """Refuse (UserError) folders that logs, stores and texts could not be written to."""
    for logger in trainer.loggers:
        place = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
        if isinstance(place, str | Path):
            check_folder(place, f"What {type(logger).__name__} logs", "trainer.logger")
    folder = getattr(data, "folder", None)
    if isinstance(folder, str | Path):
        check_folder(folder, f"What {type(data).__name__} keeps", "data.folder")
    for callback in trainer.checkpoint_callbacks:
        place = getattr(callback, "dirpath", None)
        if isinstance(place, str | Path):
            check_folder(place, type(callback).__name__, "its option dirpath")
