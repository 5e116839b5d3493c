"""A parser's complaint as one short message: where, what was given, what is near, what is known.

jsonargparse reports every alternative it tried, nested. Of these the innermost names the mistake.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from os.path import isdir
from typing import NamedTuple

KEY = re.compile(r'Parser key "([^"]+)"')
PATH = re.compile(r"(?:Expected a path but |given class_path ')([^\s']+)")
NESTED = re.compile(r"NestedArg\(key='([\w.]+)'")
LONGEST = 12
DEMOS = {"fit": "fit", "cache": "fit", "validate": "fit", "test": "test", "predict": "test"}


class Known(NamedTuple):
    """What may be named: class names by the key they stand under, those of them worth listing, and option names."""

    classes: Callable[[str], Sequence[str]]
    listed: Callable[[str], Sequence[str]]
    options: Callable[[], Iterable[str]]


def explain(complaint: str, known: Known) -> str:
    """The message for one complaint of the parser."""
    lines = complaint.splitlines()
    found = [
        (_indent(line), place, told, match)
        for place, line in enumerate(lines)
        for pattern, told in PATTERNS
        if (match := re.search(pattern, line))
    ]
    if not found:
        return _shortened(lines)
    deepest = max(indent for indent, *_ in found)
    _, place, told, match = next(entry for entry in found if entry[0] == deepest)
    return told(_where(lines, place), match.group(1), known, lines)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _where(lines: Sequence[str], place: int) -> str:
    """The key a complaint is about: the keys named above it at smaller indents."""
    keys: list[str] = []
    limit = _indent(lines[place]) + 1
    for line in reversed(lines[: place + 1]):
        key = KEY.search(line)
        if key and _indent(line) < limit:
            keys.insert(0, key.group(1))
            limit = _indent(line)
    return ".".join(keys) or "the command line"


def _no_class(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    key = where.rsplit(".", 1)[-1]
    if isdir(given) and "Folder" in known.classes(key):
        return (
            f"{where} was given the folder {given}; wanted: a class. For a model in a folder, write "
            f"--{where} Folder --{where}.path {given}, or in a file {key}: {{class_path: Folder, init_args: {{path: "
            f"{given}}}}}."
        )
    if _is_file(given):
        return (
            f"{where} names the file {given}, which is not there. A path inside a file counts from that file, one on "
            f"the command line from the current folder. Correct the path."
        )
    names = ", ".join(known.listed(key))
    return f"{where} names the class {given}, which is not known.{_near(given, known.classes(key))} Known: {names}."


def _is_file(given: str) -> bool:
    return given.endswith((".yaml", ".yml", ".json")) or "/" in given


def _no_module(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    file = next(filter(_is_file, PATH.findall("\n".join(lines))), None)
    if file is not None:  # taken for module.Class because of its dot
        return _no_class(where, file, known, lines)
    return (
        f"{where}: the module {given} cannot be imported; put its folder on PYTHONPATH, or install the package that "
        f"holds it."
    )


def _not_in_module(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    return f"{where}: {given}. Correct the name."


def _no_option(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    nested = NESTED.search("\n".join(lines))
    above = nested.group(1).rpartition(".")[0] if nested else ""
    place = where if where.endswith(above) else f"{where}.{above}"
    return (
        f"{place} has no option {given}.{_near(given, known.options())} "
        f"All options of a run with their values: add --print_config."
    )


def _unrecognized(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    option = given.split("=")[0].split()[0]
    return f"There is no option {option}.{_near(option.lstrip('-'), known.options())} See --help."


def _missing(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    command, _, name = given.rpartition(".")
    if name == "prompt":
        return 'There is no prompt. Write what to answer: dynamax generate "What is the capital of France?"'
    start = f", or start from a whole run: -c configs/demo/{DEMOS[command]}.yaml" if command in DEMOS else ""
    return f"{where} lacks {given}. Give it in a file (-c) or as an option{start}."


def _no_config(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    return f"There is no file {given}. Correct the path after -c."


def _wrong_type(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    wanted, _, value = given.partition(". Got value: ")
    values = [value, *(line.split("Given value: ", 1)[1] for line in lines if "Given value: " in line)]
    value = next(filter(None, values), "something else")
    wanted = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", wanted.rstrip("]")).replace("NoneType", "null")
    near = _near(value, re.findall(r"'([^']+)'", wanted))
    return f"{where} was given {value}; wanted: {wanted}.{near or ' Change it.'}"


PATTERNS = (
    (r"Expected a dot import path string: (\S+)", _no_class),
    (r"Unexpected import path format: (\S+)", _no_class),
    (r"Option '([\w.+]+)' is not accepted", _no_option),
    (r"does not accept option '([\w.+]+)'", _no_option),
    (r"[Uu]nrecognized arguments: (.+)", _unrecognized),
    (r"the following arguments are required: (.+)", _missing),
    (r"File does not exist: '?([^']+)'?", _no_config),
    (r"No module named '([^']+)'", _no_module),
    (r"(module '[\w.]+' has no attribute '\w+')", _not_in_module),
    (r"(cannot import name '\w+' from '[\w.]+')", _not_in_module),
    (r"Subtypes: \[((?:<class '(?:int|float|str|bool|NoneType)'>|dict\[.*?\]|list\[.*?\]|, )+)\]", _wrong_type),
    (r"Expected a typing.Literal\[(.*)", _wrong_type),
    (r"Expected a (<class '(?:int|float|str|bool)'>.*)", _wrong_type),
)


def _near(given: str, names: Iterable[str]) -> str:
    near = get_close_matches(given, list(names), n=3, cutoff=0.7)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _shortened(lines: Sequence[str]) -> str:
    kept = [line for line in lines if line.strip()]
    return "\n".join(kept if len(kept) <= LONGEST else [*kept[:LONGEST], "..."])
