"""What becomes of an earlier value when a later file or option gives the same one. Knows jsonargparse's actions.

jsonargparse lays a value over the earlier one, however deep. An exit would so keep the lens or the gates of the
exit that stood at its depth before; and of a mapping that it cannot look into, the earlier entries would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse._typehints import ActionTypeHint

Check = Callable[..., Any]


def set_merge_rules(parser: ArgumentParser) -> None:
    """Set the rules for those options of a class or a function that have one."""
    for action in parser._actions:
        if isinstance(action, ActionTypeHint) and action.dest in RULES:
            action._check_type_ = RULES[action.dest](action._check_type_, action.dest)


def replaced(check: Check, option: str) -> Check:
    """A whole value begins anew; a part of one, as ``--model.exits.2.lens`` gives it, changes the earlier value."""

    def checked(value: object, *, cfg: Namespace | None = None, **more: object) -> object:
        return check(value, cfg=None if isinstance(value, dict | str) else cfg, **more)

    return checked


def merged(check: Check, option: str) -> Check:
    """Entries lie over the earlier ones; those that name a model type are another model's, and begin anew."""

    def checked(value: object, *, cfg: Namespace | None = None, **more: object) -> object:
        found, earlier = check(value, cfg=cfg, **more), cfg.get(option) if cfg else None
        if isinstance(found, dict) and isinstance(earlier, dict) and "model_type" not in found:
            return {**earlier, **found}
        return found

    return checked


RULES = {"exits": replaced, "config": merged}
