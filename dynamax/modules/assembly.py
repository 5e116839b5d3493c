"""The heads to be trained, fresh or saved, and whether they fit what they are trained towards. Knows no trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from dynamax.backbones.base import Backbone
from dynamax.errors import UserError
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.base import ExitHead
from dynamax.objectives.base import Objective, Phase
from dynamax.paths import InputPath

Objectives = Mapping[Phase, Objective | None]

OPTIONS: dict[Phase, str] = {"lenses": "lens_objective", "gates": "gate_objective"}


def trained(bank: ExitBank, phase: Phase) -> Iterator[ExitHead]:
    """The heads that one phase trains."""
    for depth in bank.depths:
        yield from [bank.lens(depth)] if phase == "lenses" else bank.gates(depth).values()


def assembled(exits: Mapping[int, Exit], folder: InputPath | None, top: Backbone) -> ExitBank:
    """Fresh heads, or those saved in a folder.

    Raises:
        UserError: If heads are saved there that are not those of the exits, or belong to another backbone.
    """
    fresh = ExitBank(exits, top.site)
    if folder is None:
        return fresh
    bank = ExitBank.load(Path(folder), top.site)
    asked, found = (json.dumps(each.record(top.spec)["exits"], sort_keys=True) for each in (fresh, bank))
    if asked != found:
        raise UserError(
            f"The heads in {folder} are not those of the exits. Saved: {found}. Exits: {asked}. "
            f"Give the exits they were trained with, or leave heads out and train anew."
        )
    return bank


def check_phases(objectives: Objectives) -> None:
    """Refuse an objective in the other's place: its loss would have no gradient.

    Raises:
        UserError: Naming the place it belongs in.
    """
    for phase, objective in objectives.items():
        if objective is not None and objective.phase != phase:
            raise UserError(
                f"{type(objective).__name__} was given as {OPTIONS[phase]}, but it trains {objective.phase}. "
                f"Give it as {OPTIONS[objective.phase]}."
            )


def check_taught(bank: ExitBank, objectives: Objectives) -> None:
    """Refuse heads without an objective, and an objective without heads.

    Raises:
        UserError: Naming what is missing.
    """
    for phase, objective in objectives.items():
        learn = any(True for head in trained(bank, phase) for _ in head.parameters())
        if learn and objective is None:
            raise UserError(f"The exits have {phase} to train, but no {OPTIONS[phase]} was given. Give one.")
        if not learn and objective is not None:
            raise UserError(
                f"A {OPTIONS[phase]} was given, but no exit has {phase} with anything to learn. "
                f"Add such heads to the exits, or set {OPTIONS[phase]} to null."
            )
