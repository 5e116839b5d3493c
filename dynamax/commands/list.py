"""``dynamax list [KIND]``: the parts that a configuration can name, and where they come from."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib.metadata import EntryPoint

from dynamax.commands.source import definition, first_line
from dynamax.errors import UserError
from dynamax.registry import ALL, FAMILIES, Registry, near

OURS = ("dynamax", "callbacks")


def main(arguments: Sequence[str]) -> None:
    """Print one kind of part, or all."""
    kinds = {registry.word: registry for registry in ALL}
    wanted = list(arguments[1:])
    unknown = [word for word in wanted if word not in kinds]
    if unknown or len(wanted) > 1:
        given = " ".join(unknown or wanted)
        hint = near(unknown[0], kinds) if unknown else ""
        raise UserError(f"dynamax list was given {given}; wanted: at most one of {', '.join(kinds)}.{hint}")
    for registry in [kinds[word] for word in wanted] or ALL:
        print(registry.word)
        print("\n".join(_lines(registry)) or "  none")
        print()


def _lines(registry: Registry) -> list[str]:
    """A line for each part: its name, what it is, where it comes from; of those that cannot be used, why."""
    rows = []
    for name in registry.names():
        points = [point for point in registry.points() if point.name == name]
        sources = {f"{point.dist.name} {point.dist.version}" if point.dist else point.value for point in points}
        rows.append((name, _told(registry, points[0]), ", ".join(sorted(sources))))
    if registry is FAMILIES:
        from dynamax.backbones.families import FAMILIES as BUILT_IN  # torch and transformers, for this kind alone

        rows += [(name, f"transformers' model type {name}", "dynamax.backbones.families") for name in sorted(BUILT_IN)]
    width = max((len(name) for name, *_ in rows), default=0)
    return [f"  {name:<{width}}  {told}  [{source}]" for name, told, source in rows]


def _told(registry: Registry, point: EntryPoint) -> str:
    """The first line of a part's docstring.

    Our own are read from source. Others' are imported, which alone shows whether they can be.
    """
    try:
        registry.find(point.name)
        module, _, name = point.value.partition(":")
        if module.split(".")[0] in OURS:
            return first_line(ast.get_docstring(definition(module, name)))
        part = registry.get(point.name)
    except (UserError, LookupError) as error:
        return f"BROKEN: {error}"
    if registry is FAMILIES:
        return f"transformers' model type {point.name}"
    return first_line(part.__doc__)
