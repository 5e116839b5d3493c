"""What stands at one depth: as given, and built. Knows nothing of decoding or of files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from dynamax.errors import UserError
from dynamax.heads import saved
from dynamax.heads.base import ExitHead, Gate, Lens
from dynamax.heads.lenses import LogitLens
from dynamax.types import Site


@dataclass(repr=False)
class Exit:
    """What stands at one depth.

    Args:
        lens: Says which token; left out, the logit lens.
        gates: Say whether leaving is right; of different classes.
    """

    lens: Callable[[Site], Lens] | None = None
    gates: list[Callable[[Site], Gate]] = field(default_factory=list)

    def __repr__(self) -> str:
        names = []
        for factory in (self.lens or LogitLens, *self.gates):
            parts = (factory.func, *factory.args) if isinstance(factory, partial) else (factory,)
            classes = [part.__name__ for part in parts if isinstance(part, type)]
            names.append(classes[-1] if classes else getattr(factory, "__name__", repr(factory)))
        return f"Exit({names[0]}, [{', '.join(names[1:])}])"


def check_depths(exits: Mapping[int, Exit], total: int) -> None:
    """Raise a UserError for exits that no model of ``total`` blocks can have."""
    if not exits:
        raise UserError(
            "No exits were given; a bank needs at least one. Add one, such as exits: {20: {lens: TunedLens}}."
        )
    for depth in exits:
        if not isinstance(depth, int) or isinstance(depth, bool):
            twin = f", beside {int(depth)}" if str(depth).isdigit() and int(depth) in exits else ""
            raise UserError(
                f"An exit was given at depth {depth!r}{twin}; a depth is a whole number, and each has one exit. "
                f"Write the number without quotes, once."
            )
        if not 1 <= depth <= total:
            raise UserError(
                f"An exit was given at depth {depth}, but the backbone has {total} blocks: exits stand at 1 to "
                f"{total} (blocks completed). Choose a depth in that range."
            )


def build_exit(given: Exit, site: Site) -> nn.ModuleDict:
    """Build the heads of one exit.

    Raises:
        UserError: If a lens stands where a gate should or the reverse, two gates have one class, a gate reads the score
            of one that is not there or reads its own, the top has anything but a LogitLens, or a head has options that
            JSON cannot hold: it could not be built again once it is trained and saved.
    """
    heads: list[ExitHead] = []
    kinds: list[tuple[Callable[[Site], ExitHead], type[ExitHead]]] = [(given.lens or LogitLens, Lens)]
    for factory, wanted in kinds + [(gate, Gate) for gate in given.gates]:
        head = factory(site)
        if not isinstance(head, wanted):
            raise UserError(
                f"The exit at depth {site.depth} was given {type(head).__name__} where a {wanted.__name__.lower()} is "
                f"wanted. Put lenses under lens and gates under gates."
            )
        for name, value in saved.recorded(head)["options"].items():
            try:
                json.dumps(value)
            except TypeError:
                raise UserError(
                    f"{type(head).__name__} was given {name}={value!r} of type {type(value).__name__}; saved heads are "
                    f"built again from JSON, so options are numbers, strings, booleans, lists, mappings. Pass a name "
                    f"or a number, and build the object inside the class."
                ) from None
        heads.append(head)
    names = [type(head).__name__ for head in heads[1:]]
    if site.depth == site.spec.depth and (names or type(heads[0]) is not LogitLens):
        raise UserError(
            f"The exit at depth {site.depth}, the top, was given {', '.join(type(head).__name__ for head in heads)}; "
            f"wanted: LogitLens and no gates, since the exit's output there is the model's own. Leave lens and gates "
            f"out. Such an exit is for CandidateProb, which leaves there without reading the whole output matrix."
        )
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"The exit at depth {site.depth} was given two gates of class {name}; gates are told apart by class "
                f"name. Remove one, or give the variant a class of its own."
            )
    check_asked({type(head).__name__: head.asks for head in heads if isinstance(head, Gate)}, site.depth)
    return nn.ModuleDict({"lens": heads[0], "gates": nn.ModuleDict(dict(zip(names, heads[1:], strict=True)))})


def check_asked(asks: Mapping[str, Sequence[str]], depth: int) -> None:
    """Refuse gates of an exit that read the scores of gates that it has not, or in a circle (UserError)."""
    for name, asked in asks.items():
        if name in needed(asks, asked, depth):
            raise UserError(
                f"At depth {depth} the gate {name} reads its own score, by the inputs GateScore of {name} and of "
                f"{', '.join(asked)}. Take one of them out."
            )


def needed(asks: Mapping[str, Sequence[str]], names: Collection[str], depth: int) -> list[str]:
    """These gates and all whose scores they read, in the order of the exit; a UserError if one of those is not there.

    Args:
        asks: Of each gate of the exit, the gates whose scores it reads.
        names: Some of them.
        depth: Of the exit.
    """
    found = list(names)
    for name in found:  # which grows
        if name not in asks:
            raise UserError(
                f"At depth {depth} a gate reads the score of {name}, but the gates there are {', '.join(asks)}. Add "
                f"{name} to the exit, or take the input GateScore out."
            )
        found += [each for each in asks[name] if each not in found]
    return [name for name in asks if name in found]
