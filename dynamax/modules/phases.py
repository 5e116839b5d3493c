"""Phases of training heads: which heads, towards what, for how long, on which documents. Knows no weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch import Trainer

from dynamax.data.batch import HiddenBatch
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.heads.base import ExitHead
from dynamax.modules.schedule import warm_cosine
from dynamax.objectives.base import KINDS, Kind, Objective

EPOCHS = 4
"""Length of a phase that is not the last one, where none is given."""
HELD_BACK = 0.25
"""Part of the prompts that is kept from the lenses and trains the gates, where nothing else is given."""
PARTS = 1 << 16
"""Parts of the prompts that shares are counted in: by the low bits of their hash, as validation goes by the high."""


@dataclass(frozen=True, repr=False)
class Phase:
    """One stretch of training; the heads that its objective does not train rest, in eval mode and without gradients.

    Args:
        objective: What is trained towards. It decides which heads train: lenses, gates, or both.
        epochs: Length in epochs. Give ``epochs`` or ``steps``, or neither: then the last phase gets the rest of the
            training, and any other phase 4 epochs.
        steps: Length in optimiser steps.
        learning_rate: Peak. Left out, 2e-3 if lenses train, 1e-3 if only gates do.
        prompts: Which prompts' documents are used: those from the first to the second of two numbers in [0, 1],
            in an order that does not change. Phases whose ranges do not overlap share no document. Left out, if
            lenses and gates train in phases of their own, the lenses get [0.25, 1] and the gates [0, 0.25]; otherwise
            all get [0, 1].
    """

    objective: Objective
    epochs: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    prompts: tuple[float, float] | None = None

    @property
    def trains(self) -> frozenset[Kind]:
        """The kinds of heads that train."""
        return self.objective.trains

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-3 if "lenses" in self.trains else 1e-3


def completed(phases: Mapping[str, Phase], alternate: Sequence[str]) -> dict[str, Phase]:
    """The phases in the order of their first turns, with lengths and prompts filled in where they were left out.

    Args:
        phases: As given, by name.
        alternate: Names of those that take turns once the others are done.

    Raises:
        UserError: If an option is out of range, or ``alternate`` does not name two or more of the phases.
    """
    for name, phase in phases.items():
        start, stop = phase.prompts or (0.0, 1.0)
        lengths = [length for length in (phase.epochs, phase.steps) if length is not None]
        if not (0 < phase.rate <= 1 and 0 <= start < stop <= 1 and len(lengths) < 2 and all(n >= 1 for n in lengths)):
            raise UserError(
                f"The phase {name} was given epochs {phase.epochs}, steps {phase.steps}, learning_rate "
                f"{phase.learning_rate} and prompts {phase.prompts}. Give epochs or steps, not both, of at least 1; "
                f"learning_rate must lie in (0, 1]; prompts are two numbers in [0, 1], the smaller one first."
            )
    if alternate and (len(set(alternate)) != len(alternate) or len(alternate) < 2 or not set(alternate) <= set(phases)):
        raise UserError(
            f"alternate was given {list(alternate)}, but the phases are {list(phases)}. Name two or more of these, "
            f"each once."
        )
    ordered = {name: phases[name] for name in [*(name for name in phases if name not in alternate), *alternate]}
    apart = {phase.trains for phase in phases.values()} == {frozenset(["lenses"]), frozenset(["gates"])}
    found = {}
    for place, (name, phase) in enumerate(ordered.items(), 1):
        if phase.epochs is None and phase.steps is None and (alternate or place < len(ordered)):
            if name in alternate:
                raise UserError(
                    f"The phase {name} takes turns with others, but has no length. Give it steps or epochs, such as "
                    f"model.phases.{name}.steps: 200."
                )
            phase = replace(phase, epochs=EPOCHS)
        if phase.prompts is None:
            part = (HELD_BACK, 1.0) if "lenses" in phase.trains else (0.0, HELD_BACK)
            phase = replace(phase, prompts=part if apart else (0.0, 1.0))
        found[name] = phase
    return found


def heads_of(bank: ExitBank, kinds: Iterable[Kind]) -> Iterator[ExitHead]:
    """The heads of some kinds, by depth."""
    for kind in kinds:
        for depth in bank.depths:
            yield from [bank.lens(depth)] if kind == "lenses" else bank.gates(depth).values()


def check_trained(bank: ExitBank, phases: Mapping[str, Phase], *, may_rest: Collection[Kind] = ()) -> None:
    """Raise a UserError for a phase with nothing to train, and for heads that no phase trains, unless they may rest."""
    learn = {kind for kind in KINDS if any(True for head in heads_of(bank, [kind]) for _ in head.parameters())}
    for name, phase in phases.items():
        if not phase.trains & learn:
            kinds = " and ".join(sorted(phase.trains))
            raise UserError(
                f"The phase {name} trains {kinds}, but no exit has {kinds} with anything to learn. Add such heads to "
                f"the exits, or leave the phase out of model.phases."
            )
    for kind in sorted(learn):
        if kind not in may_rest and not any(kind in phase.trains for phase in phases.values()):
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
    lengths = []
    for name, phase in phases.items():
        given = f"{phase.epochs} epochs" if phase.epochs is not None else f"{phase.steps} steps"
        lengths.append(f"{name} {'the rest' if phase.epochs is None and phase.steps is None else given}")
    turns = ", ".join(lengths)
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
            f"Training ends before every phase had its turn: the phases are {turns}, trainer.max_epochs is {epochs} "
            f"and trainer.max_steps {steps}{known}. Raise "
            f"trainer.max_epochs (or max_steps), make a phase shorter (model.phases.NAME.epochs or .steps), or leave "
            f"a phase out."
        )
    exact = epoch_steps is not None or (not in_steps and steps < 0) or (not in_epochs and epochs < 0)
    if exact and not rest and not alternate and available > least:
        raise UserError(
            f"Training goes on when all phases are over: the phases are {turns}, trainer.max_epochs is {epochs} and "
            f"trainer.max_steps {steps}{known}. Give no length to the last "
            f"phase, which then gets the rest, or lower trainer.max_epochs."
        )


class PhaseSchedule:
    """Which phase each optimiser step belongs to, and its learning rate.

    Args:
        phases: As ``completed`` gives them.
        alternate: Names of those that take turns once the others are done.
        epoch_steps: Steps of an epoch.
        total: Steps of the whole training.
    """

    def __init__(self, phases: Mapping[str, Phase], alternate: Sequence[str], *, epoch_steps: int, total: int) -> None:
        self.phases, self.alternate, self.total = phases, alternate, total
        self.turn: dict[str, int] = {}
        for name, phase in phases.items():
            given = phase.steps if phase.epochs is None else phase.epochs * epoch_steps
            self.turn[name] = max(1, total - sum(self.turn.values())) if given is None else given
        once = sum(self.turn[name] for name in phases if name not in alternate)
        self.all_turns = dict(self.turn)  # steps of each phase in all its turns
        place = once
        cycle = sum(self.turn[name] for name in alternate)
        for name in alternate:
            rounds, rest = divmod(max(0, total - once), cycle)
            self.all_turns[name] = rounds * self.turn[name] + min(self.turn[name], max(0, rest - (place - once)))
            place += self.turn[name]

    def at(self, step: int) -> tuple[str, int]:
        """The name of the phase that a step belongs to, and how many steps this phase has had before."""
        name = ""
        for name in self.phases:
            if name in self.alternate:
                break
            if step < self.turn[name]:
                return name, step
            step -= self.turn[name]
        if not self.alternate:
            return name, step + self.turn[name]
        rounds, place = divmod(step, sum(self.turn[name] for name in self.alternate))
        for name in self.alternate:
            if place < self.turn[name]:
                break
            place -= self.turn[name]
        return name, rounds * self.turn[name] + place

    def rate(self, kind: Kind, warmup: float, step: int) -> float:
        """The learning rate of one kind of heads: 0 while they rest.

        It rises and falls once over all steps of a phase, however many turns these are spread over.

        Args:
            kind: Which heads.
            warmup: Part of the phase's steps over which the rate rises.
            step: Counted from 0.
        """
        name, done = self.at(step)
        phase = self.phases[name]
        if step >= self.total or kind not in phase.trains:
            return 0.0
        return phase.rate * warm_cosine(done, length=self.all_turns[name], warmup=warmup)


def share(batch: HiddenBatch, prompts: tuple[float, float]) -> HiddenBatch:
    """The documents of a batch that belong to a range of the prompts: all of a prompt or none.

    Args:
        batch: At least one document.
        prompts: From, and up to, in [0, 1]; prompts are ordered by their hash.

    Returns:
        These documents; where there are none, one of number -1 with no position counted, which teaches nothing.
    """
    if prompts == (0.0, 1.0):
        return batch
    parts_B = batch.origins_B % PARTS
    chosen_B = ((parts_B >= prompts[0] * PARTS) & (parts_B < prompts[1] * PARTS)).nonzero()[:, 0]
    if len(chosen_B):
        return batch.rows(chosen_B)
    first = batch.rows(torch.tensor([0], device=batch.origins_B.device))
    nobody_1 = torch.full_like(first.documents_B, -1)
    return replace(first, answer_BT=torch.zeros_like(first.answer_BT), documents_B=nobody_1)
