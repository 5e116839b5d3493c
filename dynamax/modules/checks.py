"""What a run was asked for and cannot have, told before time is spent, and whether weights are numbers still."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.modules.phases import Phase, heads_of
from dynamax.objectives.base import KINDS


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


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is infinite or not a number; integers always are.

    >>> all_finite([torch.ones(3), torch.arange(2)]), all_finite([torch.ones(3), torch.tensor(float("nan"))])
    (True, False)
    """
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return math.isfinite(torch.nn.utils.get_total_norm(floats, torch.inf)) if floats else True


def check_trained(bank: ExitBank, phases: Mapping[str, Phase]) -> None:
    """Refuse a phase with nothing to train, and heads that no phase trains.

    Raises:
        UserError: Naming what is missing.
    """
    learn = {kind for kind in KINDS if any(True for head in heads_of(bank, [kind]) for _ in head.parameters())}
    for name, phase in phases.items():
        if not phase.trains & learn:
            kinds = " and ".join(sorted(phase.trains))
            raise UserError(
                f"The phase {name} trains {kinds}, but no exit has {kinds} with anything to learn. Add such heads to "
                f"the exits, or leave the phase out of model.phases."
            )
    for kind in sorted(learn):
        if not any(kind in phase.trains for phase in phases.values()):
            raise UserError(
                f"The exits have {kind} to train, but no phase trains {kind}. Add one to model.phases, such as "
                f"{kind}: {{objective: {'LensDistillation' if kind == 'lenses' else 'GateObjective'}}}."
            )


def check_length(
    phases: Mapping[str, Phase], alternate: Sequence[str], trainer: Trainer, epoch_steps: int | None = None
) -> None:
    """Refuse a run in which some phase does not get its full length, and one that goes on when all phases are over.

    A trial run (``trainer.fast_dev_run``) may do either.

    Args:
        phases: As ``completed`` gives them.
        alternate: Names of those that take turns.
        trainer: Tells when training ends.
        epoch_steps: Steps of an epoch; None before the data is there: then only what is certain is refused.

    Raises:
        UserError: If there are no phases, training has no end, or the lengths do not fit.
    """
    if not phases:
        raise UserError(
            "There is nothing to train: the model has no phases. Add one, such as phases: {gates: {objective: "
            "GateObjective}}, with exits that have gates."
        )
    steps, epochs = trainer.max_steps, -1 if trainer.max_epochs is None else trainer.max_epochs
    if epochs < 0 and steps < 0:
        raise UserError("HeadsModule needs to know when training ends. Set trainer.max_epochs or trainer.max_steps.")
    if cast(Any, trainer).fast_dev_run:
        return
    told = ", ".join(f"{name} {phase.length}" for name, phase in phases.items())
    known = f", with {epoch_steps} steps an epoch" if epoch_steps else ""
    in_epochs = sum(phase.epochs or 0 for phase in phases.values())
    in_steps = sum(phase.steps or 0 for phase in phases.values())
    *_, last = phases.values()
    rest = last.epochs is None and last.steps is None
    least = in_epochs * (epoch_steps or 1) + in_steps + rest  # an epoch has at least one step
    whole = math.inf if epochs < 0 else epochs * (epoch_steps or 1)
    available = min(whole if epoch_steps or not in_steps else math.inf, math.inf if steps < 0 else steps)
    too_few_epochs = 0 <= epochs < in_epochs + (rest or in_steps > 0)
    if too_few_epochs or available < least:
        raise UserError(
            f"Training ends before every phase had its turn: the phases are {told}, trainer.max_epochs is {epochs} "
            f"and trainer.max_steps {steps}{known}. Raise "
            f"trainer.max_epochs (or max_steps), make a phase shorter (model.phases.NAME.epochs or .steps), or leave "
            f"a phase out."
        )
    exact = epoch_steps is not None or (not in_steps and steps < 0) or (not in_epochs and epochs < 0)
    if exact and not rest and not alternate and available > least:
        raise UserError(
            f"Training goes on when all phases are over: the phases are {told}, trainer.max_epochs is {epochs} and "
            f"trainer.max_steps {steps}{known}. Give no length to the last "
            f"phase, which then gets the rest, or lower trainer.max_epochs."
        )


def check_tokens(phases: Mapping[str, Phase], kept: int) -> None:
    """Refuse a store that keeps too few of the full model's likely tokens of a position.

    Raises:
        UserError: Naming the phase that reads more.
    """
    for name, phase in phases.items():
        if phase.objective.tokens > kept:
            raise UserError(
                f"The objective of the phase {name}, {type(phase.objective).__name__}, reads "
                f"{phase.objective.tokens} tokens of a position, but the store keeps {kept}. Raise data.k, which fills "
                f"another store, or lower top or k of the objective."
            )


def check_depths(exits: Iterable[int], kept: Iterable[int]) -> None:
    """Refuse a store that lacks the depth of an exit.

    Raises:
        UserError: Naming the depths there are and those wanted.
    """
    if not set(exits) <= set(kept):
        raise UserError(
            f"The store keeps hidden states at the depths {sorted(kept)}, but exits are to be trained at "
            f"{sorted(exits)}. Give the data module the same depths as the model's exits."
        )


def check_saved(folder: str, asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse saved heads that are not those of the exits; both are given by their records.

    Raises:
        UserError: Naming both.
    """
    one, other = (json.dumps(record["exits"], sort_keys=True) for record in (asked, found))
    if one != other:
        raise UserError(
            f"The heads in {folder} are not those of the exits. Saved: {other}. Exits: {one}. Give the exits they were "
            f"trained with, or leave heads out and train anew."
        )


def check_finite(what: str, tensors: Iterable[Tensor], *, step: int, name: str, phase: Phase) -> None:
    """Stop a run that has gone wrong for good.

    Args:
        what: That which is looked at.
        tensors: Its values.
        step: Optimiser steps done, this one counted.
        name: Of the phase.
        phase: Which is running.

    Raises:
        UserError: If a value is infinite or not a number.
    """
    if not all_finite(tensors):
        raise UserError(
            f"{what} is infinite or not a number at step {step}, in the phase {name}. Training stops here. Lower "
            f"model.phases.{name}.learning_rate, which is {phase.rate:g}, set trainer.gradient_clip_val: 1, or train "
            f"with trainer.precision: 32-true. Heads that were saved before stay as they are."
        )
