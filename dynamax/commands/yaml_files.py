"""YAML that a user wrote: read once before the parser reads it, which reports faults without the file and the place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from dynamax.errors import UserError, shown

LOAD_YAML = get_loader("yaml")
SUFFIXES = (".yaml", ".yml")
TAG = "tag:yaml.org,2002:"
TOO_DEEP = "lists or mappings lie in one another too deep, or one holds itself"


def load_value(text: str) -> Any:  # noqa: ANN401 - whatever YAML holds
    """What jsonargparse loads, for values that are written on the command line; files are checked before.

    Raises:
        YAMLError: If it is no YAML; then it is text.
        UserError: If a key stands twice.
    """
    try:
        for _ in _texts(yaml.compose(text, Loader=yaml.SafeLoader), ""):
            pass
        return LOAD_YAML(text)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def check_files(arguments: Sequence[str], *, parts: bool = False) -> None:
    """Check the YAML files that the arguments of a command name.

    Args:
        arguments: Those of a command.
        parts: Whether to check the files that these files name, too.

    Raises:
        UserError: Naming the file and the place in it.
    """
    checked: set[Path] = set()
    for option, value in _given(arguments):
        if option in ("-c", "--config"):
            if not os.path.isfile(value):
                what = "is a folder" if os.path.isdir(value) else "does not exist"
                raise UserError(
                    f"{shown(value)} was given after {option}, but it {what}. Wanted: a YAML file. Correct the path."
                )
            _check_file(Path(value), checked, whole=True, parts=parts)
        elif parts and value.endswith(SUFFIXES) and os.path.isfile(value):
            _check_file(Path(value), checked, parts=True)


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options and their values, up to ``--``; a value alone stands behind no option."""
    words = iter(arguments)
    for word in words:
        if word == "--":
            return
        if word in ("-c", "--config"):
            value = next(words, None)
            if value is not None:
                yield word, value
        elif word.startswith("-c") and not word.startswith("--"):
            yield "-c", word[2:]
        elif word.startswith("-"):
            name, equals, value = word.partition("=")
            if equals:
                yield name, value
        else:
            yield "", word


def _check_file(file: Path, checked: set[Path], *, whole: bool = False, parts: bool = False) -> None:
    if file.resolve() in checked:
        return
    checked.add(file.resolve())
    for name in _read(file, whole=whole):
        if parts and name.endswith(SUFFIXES) and (part := file.parent / os.path.expanduser(name)).is_file():
            _check_file(part, checked, parts=True)


def _read(file: Path, *, whole: bool) -> list[str]:
    """All values in a file that are text."""
    try:
        text = file.read_text("utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        texts = list(_texts(node, f"{file}: "))
        if whole:
            _check_whole(file, node)
        LOAD_YAML(text)
        return texts
    except UserError:
        raise
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file}, line {line}: the byte 0x{error.object[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        tab = " YAML is indented by spaces, not tabs." if "'\\t'" in str(error.problem) else ""
        raise UserError(f"{file}{place}: this is not YAML: {error.problem}.{tab} Correct the line.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: this is not YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise UserError(f"{file}: {TOO_DEEP}. Write it flatter.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: a value is not of the kind that its tag says: {error}. Leave out the tag.") from error


def _check_whole(file: Path, node: yaml.Node | None) -> None:
    """Refuse a file that is no list of options by name."""
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "one value"
        raise UserError(f"{file} holds {found}; wanted: options, a line each, such as `model: HeadsModule`.")
    for key, _ in node.value:
        if key.tag != f"{TAG}str":
            raise UserError(
                f"{file}, line {key.start_mark.line + 1}: {shown(key.value)} is no name of an option, which is text. "
                f"Correct the line."
            )


def _texts(node: yaml.Node | None, place: str, above: tuple[yaml.Node, ...] = ()) -> Iterator[str]:
    """All values that are text; what no option can be is refused: two equal keys, of which YAML keeps the last."""
    if node is None:
        return
    if any(node is each for each in above):
        raise RecursionError
    within = (*above, node)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, place)
        for _, value in node.value:
            yield from _texts(value, place, within)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _texts(value, place, within)
    else:
        yield node.value


def _check_keys(node: yaml.MappingNode, place: str) -> None:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    line = node.start_mark.line + 1
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag in (f"{TAG}null", f"{TAG}bool"):
            found = f"the key {key.value!r}" if isinstance(key, yaml.ScalarNode) else "a list or a mapping as a key"
            raise UserError(f"{place}The mapping that begins on line {line} has {found}; wanted: text or a number.")
        if keys.count(key.value) > 1:
            raise UserError(
                f"{place}The key {key.value} stands twice in the mapping that begins on line {line}. A key may stand "
                f"once, or the second would hide the first."
            )
