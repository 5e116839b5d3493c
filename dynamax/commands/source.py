"""Docstrings and options of classes and functions, read from their source files: nothing is imported.

So a page of help, or a list of all parts, takes a fraction of a second where importing them takes several.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

Definition = ast.ClassDef | ast.FunctionDef


class Option(NamedTuple):
    """One argument of a constructor or a function.

    Attributes:
        name: Its name.
        default: Its default as it is written; None where there is none.
        text: What its docstring says.
    """

    name: str
    default: str | None
    text: str


@cache
def _tree(module: str) -> ast.Module:
    top, *names = module.split(".")
    spec = find_spec(top)  # of the top only: for a module inside a package, it would import the package
    if spec is None or spec.origin is None:
        raise LookupError(f"No module named {top!r}")
    file = Path(spec.origin)
    for name in names:
        folder = file.parent / name
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    if not file.is_file():
        raise LookupError(f"No module named {module!r}")
    return ast.parse(file.read_text("utf-8"))


def definition(module: str, name: str) -> Definition:
    """Where a class or a function is defined.

    Raises:
        LookupError: If there is no such module, or it does not define that name itself.
    """
    for node in _tree(module).body:
        if isinstance(node, Definition) and node.name == name:
            return node
    raise LookupError(f"module {module!r} has no attribute {name!r}")


def first_line(text: str | None) -> str:
    """The first line of a docstring; empty if there is none."""
    return (text or "").strip().partition("\n")[0]


def options(module: str, name: str) -> list[Option]:
    """The options of a class or a function, in order, with what the section ``Args`` of its docstring says."""
    node = definition(module, name)
    function = node
    if isinstance(node, ast.ClassDef):
        function = next(each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
    assert isinstance(function, ast.FunctionDef)
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", ast.get_docstring(node) or "", re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section.group(1) if section else "", re.DOTALL | re.M)
    texts = {entry: " ".join(text.split()).replace("``", "") for entry, text in entries}
    given = function.args
    ordered = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [
        *[None] * (len(ordered) - len(given.defaults)),
        *given.defaults,
        *given.kw_defaults,
    ]
    return [
        Option(argument.arg, None if default is None else ast.unparse(default), texts.get(argument.arg, ""))
        for argument, default in zip([*ordered, *given.kwonlyargs], defaults, strict=True)
        if argument.arg != "self"
    ]
