"""Names to parts, by entry points: one way in for our own parts and for those of other packages.

Nothing is imported before a name is asked for. A part that cannot be imported stops only those who ask for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dynamax.errors import UserError


@cache
def _installed(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))  # reads the metadata of every installed distribution, so once is enough


class Registry:
    """The parts of one kind by name: the class name, or the model type of a family.

    Args:
        group: Entry-point group, such as ``dynamax.heads``.
        kind: What one of them is called in messages, such as ``exit head``.
        bases: Classes that parts of this kind are made from, as ``module:Class``. An option that is annotated with
            one of them takes names of this registry.

    Attributes:
        word: What ``dynamax list`` calls the kind, such as ``heads``.
    """

    def __init__(self, group: str, kind: str, *bases: str) -> None:
        self.group = group
        self.kind = kind
        self.bases = bases
        self.word = group.removeprefix("dynamax.")

    def points(self) -> list[EntryPoint]:
        """All entry points, sorted by name; two with one name are possible, and ``find`` refuses them."""
        different = {(point.name, point.value): point for point in _installed(self.group)}
        return [different[key] for key in sorted(different)]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({point.name for point in self.points()})

    def find(self, name: str) -> EntryPoint:
        """The entry point of a name; nothing is imported.

        Raises:
            UserError: If the name is unknown, with near names; if two packages offer it.
        """
        found = [point for point in self.points() if point.name == name]
        if not found:
            known = ", ".join(self.names()) or "none"
            raise UserError(f"There is no {self.kind} named {name!r}.{near(name, self.names())} Known: {known}.")
        if len(found) > 1:
            raise UserError(
                f"Two installed packages offer the {self.kind} {name}: {' and '.join(each.value for each in found)}. "
                f"Uninstall one, or rename its class and entry point."
            )
        return found[0]

    def get(self, name: str) -> Any:  # noqa: ANN401 - a class; of model families a FamilySpec
        """The part of that name, imported now if it was not yet.

        Raises:
            UserError: If the name is unknown, or offered twice; if the part cannot be imported, whatever the reason.
        """
        point = self.find(name)
        try:
            return point.load()
        except Exception as error:  # whatever a module of someone else raises while it is imported
            top = point.value.split(":")[0].split(".")[0]
            file = getattr(sys.modules.get(top), "__file__", None) or "no file"
            reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"The {self.kind} {name} cannot be imported from {point.value}: {reason}. For {top}, Python found "
                f"{file}. If that is another package, rename or remove it; if not, install again the package that "
                f"offers {name}."
            ) from error


def near(given: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """A question with the known names nearest to a given one, after a space; empty if none is near."""
    found = get_close_matches(given, list(names), n=3, cutoff=cutoff)
    return f" Did you mean {' or '.join(found)}?" if found else ""


SOURCES = Registry("dynamax.sources", "backbone source", "dynamax.backbones.sources:Source")
FAMILIES = Registry("dynamax.families", "model family")
HEADS = Registry("dynamax.heads", "exit head", "dynamax.heads.base:Lens", "dynamax.heads.base:Gate")
GATE_INPUTS = Registry("dynamax.gate_inputs", "gate input", "dynamax.heads.inputs:GateInput")
POLICIES = Registry("dynamax.policies", "termination policy", "dynamax.policies.base:TerminationPolicy")
DECODERS = Registry("dynamax.decoders", "decoder", "dynamax.decoding.base:Decoder")
DRAFTS = Registry("dynamax.drafts", "draft source", "dynamax.decoding.drafts:DraftSource")
SKIPPED_STATE = Registry(
    "dynamax.skipped_state", "rule for skipped state", "dynamax.backbones.skipped_state:SkippedState"
)
SAMPLERS = Registry("dynamax.samplers", "sampler", "dynamax.decoding.sampling:Sampler")
OBJECTIVES = Registry(
    "dynamax.objectives",
    "objective",
    "dynamax.objectives.base:Objective",
    "dynamax.objectives.early_exit:LanguageObjective",
    "dynamax.objectives.distillation:DistillationLoss",
    "dynamax.objectives.tuning:TuningLoss",
)
TASKS = Registry("dynamax.tasks", "task", "dynamax.tasks.base:Task")
TEXT_SOURCES = Registry(
    "dynamax.text_sources", "text source", "dynamax.data.text:TextSource", "dynamax.data.text:Corpus"
)
CALLBACKS = Registry("dynamax.callbacks", "callback", "lightning.pytorch.callbacks.callback:Callback")

ALL: tuple[Registry, ...] = (SOURCES, FAMILIES, HEADS, GATE_INPUTS, POLICIES, DECODERS, DRAFTS, SKIPPED_STATE)
ALL += (SAMPLERS, OBJECTIVES, TASKS, TEXT_SOURCES, CALLBACKS)
