"""``dynamax list [KIND]``: the parts that a configuration can name, and where they come from."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from dynamax.commands.help import definition
from dynamax.errors import UserError
from dynamax.registry import ALL, FAMILIES, Registry, near

OURS = ("dynamax", "callbacks")
OTHER_WORDS = {"gates": "heads", "lenses": "heads", "exits": "heads", "models": "families", "backbones": "sources"}
"""What others call a kind."""


def main(arguments: Sequence[str]) -> None:
    """Print one kind of part, or all."""
    kinds = {registry.word: registry for registry in ALL}
    wanted = list(arguments[1:])
    unknown = [word for word in wanted if word not in kinds]
    if unknown or len(wanted) > 1:
        given = " ".join(unknown or wanted)
        hint = near(OTHER_WORDS.get(unknown[0], unknown[0]), kinds) if unknown else ""
        raise UserError(f"dynamax list was given {given}; wanted: at most one of {', '.join(kinds)}.{hint}")
    for registry in [kinds[word] for word in wanted] or ALL:
        rows = []
        for name in registry.names():
            points = [point for point in registry.points() if point.name == name]
            sources = {f"{point.dist.name} {point.dist.version}" if point.dist else point.value for point in points}
            rows.append((name, _description(registry, name), ", ".join(sorted(sources))))
        if registry is FAMILIES:
            from dynamax.backbones.families import FAMILIES as OWN  # torch and transformers, for this kind alone

            rows += [(name, f"transformers' model type {name}", "dynamax.backbones.families") for name in sorted(OWN)]
        width = max((len(name) for name, *_ in rows), default=0)
        print(registry.word)
        print("\n".join(f"  {name:<{width}}  {text}  [{source}]" for name, text, source in rows) or "  none")
        print()


def _description(registry: Registry, name: str) -> str:
    """The first line of a part's docstring; of a part that cannot be used, why.

    Our own are read from source. Others' are imported, since nothing else shows whether they can be.
    """
    try:
        module, _, attribute = registry.find(name).value.partition(":")
        if module.split(".")[0] in OURS:
            text = ast.get_docstring(definition(module, attribute))
        else:
            text = registry.get(name).__doc__
    except (UserError, LookupError) as error:
        return f"BROKEN: {error}"
    return f"transformers' model type {name}" if registry is FAMILIES else (text or "").strip().partition("\n")[0]
