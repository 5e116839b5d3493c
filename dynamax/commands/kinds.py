"""What an option takes, in words: annotations of Python say little to those who do not write it."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dynamax.paths import ReadPath

PLAIN: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    ReadPath: "a path",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
    Any: "any value",
}


def in_words(kind: Any) -> str:  # noqa: ANN401 - an annotation
    """What an annotation means.

    >>> in_words(int | None), in_words(dict[int, str])
    ('a whole number or null', 'a mapping (a whole number: text)')
    """
    if kind in PLAIN:
        return PLAIN[kind]
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(each) for each in parts if each is not int or float not in parts))
    if origin is Literal:
        return ", ".join(map(repr, parts))
    if origin is tuple:
        return f"a list of {len(parts)} entries ({', '.join(map(in_words, parts))})"
    if origin in (list, Sequence, Iterable):
        return f"a list, each entry {in_words(parts[0])}" if parts else "a list"
    if origin is Callable and parts:  # what makes a part
        return in_words(parts[-1])
    if origin in (dict, Mapping):
        return f"a mapping ({in_words(parts[0])}: {in_words(parts[1])})"
    if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
        return f"{kind.__name__}, which is {', '.join(each.name for each in dataclasses.fields(kind))}"
    if inspect.isclass(kind):
        return f"{kind.__name__} (the name of a class, or class_path and init_args)"
    return "another value"


def option_in_words(kinds: Sequence[Any], name: str) -> str | None:
    """What one option of a group takes; None if no kind is a group that has it."""
    groups = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    taken = [hints[name] for hints in map(get_type_hints, groups) if name in hints]
    return in_words(taken[0]) if taken else None


def options_within(kind: Any) -> set[str]:  # noqa: ANN401 - an annotation
    """Names of the options of all groups that a value of a kind may hold."""
    own = {each.name for each in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return own.union(*map(options_within, get_args(kind)))


def is_only_options(kinds: Sequence[Any]) -> bool:
    """Whether a value is a group of options, and never the name of a class."""
    named = [kind for kind in kinds if kind is not type(None)]
    return bool(named) and all(dataclasses.is_dataclass(kind) for kind in named)
