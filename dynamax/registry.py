"""Names to classes, by entry points: the same door for our own classes and for a third party's."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from dynamax.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """The classes of one kind, by class name.

    Args:
        group: Entry-point group, such as ``dynamax.heads``.
        kind: What one of them is called in messages, such as ``exit head``.
    """

    def __init__(self, group: str, kind: str) -> None:
        self.group = group
        self.kind = kind
        self._points: dict[str, EntryPoint] | None = None

    def points(self) -> dict[str, EntryPoint]:
        """Entry points by name.

        Raises:
            UserError: If two installed distributions offer the same name.
        """
        if self._points is None:
            found: dict[str, EntryPoint] = {}
            for point in entry_points(group=self.group):
                known = found.get(point.name)
                if known is not None and known.value != point.value:
                    raise UserError(
                        f"Two installed packages offer the {self.kind} {point.name}: {known.value} and {point.value}. "
                        f"Uninstall one, or rename its class and entry point."
                    )
                found[point.name] = point
            self._points = found
        return self._points

    def names(self) -> list[str]:
        """All known class names, sorted."""
        return sorted(self.points())

    def get(self, name: str) -> type[T]:
        """The class of that name, imported now if it was not yet.

        Raises:
            UserError: If the name is unknown, near names are listed; if its class cannot be imported.
        """
        points = self.points()
        if name not in points:
            raise UserError(self.unknown(name))
        try:
            return points[name].load()
        except (ImportError, AttributeError) as error:
            raise UserError(self.unloadable(points[name], error)) from error

    def unloadable(self, point: EntryPoint, error: Exception) -> str:
        """The message for a class that cannot be imported: where it should be, and what Python found there."""
        top = point.module.split(".")[0]
        found = getattr(sys.modules.get(top), "__file__", None) or "no file"
        return (
            f"The {self.kind} {point.name} cannot be imported from {point.value}: {error}. For {top}, Python found "
            f"{found}. If that is another package, rename or remove it; if not, install again the package that offers "
            f"{point.name}."
        )

    def unknown(self, name: str) -> str:
        """The message for an unknown name: given, near, known."""
        near = get_close_matches(name, self.points(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        return f"There is no {self.kind} named {name!r}.{hint} Known: {', '.join(self.names())}."

    def load_all(self) -> list[type[T]]:
        """Import every class, so that short names work wherever classes are looked up by subclass."""
        return [self.get(name) for name in self.names()]


BACKBONES: Registry = Registry("dynamax.backbones", "backbone")
HEADS: Registry = Registry("dynamax.heads", "exit head")
POLICIES: Registry = Registry("dynamax.policies", "termination policy")
OBJECTIVES: Registry = Registry("dynamax.objectives", "objective")
TASKS: Registry = Registry("dynamax.tasks", "task")

ALL: tuple[Registry, ...] = (BACKBONES, HEADS, POLICIES, OBJECTIVES, TASKS)


def packages() -> set[str]:
    """Top-level packages whose classes are known and whose errors are written for users: ours and plug-ins'."""
    points = [point.value for registry in ALL for point in registry.points().values()]
    return {value.split(":")[0].split(".")[0] for value in points} | {"dynamax", "callbacks"}
