"""What stands at one depth: as given, checked, and built. Knows nothing of decoding or of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        return f"Exit({factory_name(self.lens or LogitLens)}, [{', '.join(map(factory_name, self.gates))}])"


def factory_name(factory: Callable[[Site], ExitHead]) -> str:
    """The name of the class that a factory makes heads of, where it can be told."""
    parts = (factory.func, *factory.args) if isinstance(factory, partial) else (factory,)
    classes = [part.__name__ for part in parts if isinstance(part, type)]
    return classes[-1] if classes else getattr(factory, "__name__", repr(factory))


def check_depths(exits: Mapping[int, Exit], total: int) -> None:
    """Refuse exits that no model of ``total`` blocks can have.

    Raises:
        UserError: Naming what was given, what is possible, and what to do.
    """
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
        if not 1 <= depth < total:
            raise UserError(
                f"An exit was given at depth {depth}, but the backbone has {total} blocks: exits stand at 1 to "
                f"{total - 1} (blocks completed). Choose a depth in that range; the top is always there."
            )


def built(given: Exit, site: Site) -> nn.ModuleDict:
    """Build the heads of one exit.

    Raises:
        UserError: If a lens stands where a gate should or the reverse, or two gates have one class.
    """
    lens = checked((given.lens or LogitLens)(site), Lens, site.depth)
    gates = nn.ModuleDict()
    for factory in given.gates:
        gate = checked(factory(site), Gate, site.depth)
        name = type(gate).__name__
        if name in gates:
            raise UserError(
                f"The exit at depth {site.depth} was given two gates of class {name}; gates are told apart by class "
                f"name. Remove one, or give the variant a class of its own."
            )
        gates[name] = gate
    return nn.ModuleDict({"lens": lens, "gates": gates})


def checked(head: object, wanted: type[ExitHead], depth: int) -> ExitHead:
    """The head, if it is of the wanted kind and can be saved.

    Raises:
        UserError: If it is not.
    """
    if not isinstance(head, wanted):
        raise UserError(
            f"The exit at depth {depth} was given {type(head).__name__} where a {wanted.__name__.lower()} is wanted. "
            f"Put lenses under lens and gates under gates."
        )
    saved.check_recipe(head)
    return head
