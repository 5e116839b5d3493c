"""What all our parsers do: names of parts, text as it is, paths, what a later value does to an earlier one.

Knows jsonargparse; knows neither Lightning nor any part.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from textwrap import indent
from typing import Any, ClassVar, Union, get_args, get_origin

import jsonargparse._typehints as typehints
import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_loader
from transformers.utils.logging import disable_progress_bar

from dynamax import registry as registered
from dynamax.commands.messages import Known, explain
from dynamax.errors import UserError
from dynamax.paths import ReadPath, read_path
from dynamax.registry import ALL, Registry

LOAD_YAML = get_loader("yaml")
RESOLVE = typehints.resolve_class_path_by_name
SEQUENCES = (list, tuple, Sequence)
_broken: list[UserError] = []
"""Parts that were named and cannot be imported: jsonargparse may then try something else, and report that alone."""

KINDS: dict[str, Registry] = {
    **dict.fromkeys(("backbone", "writer", "teacher", "tokenizer"), registered.SOURCES),
    **dict.fromkeys(("lens", "gates"), registered.HEADS),
    **dict.fromkeys(("policy", "policies"), registered.POLICIES),
    **dict.fromkeys(("objective", "loss"), registered.OBJECTIVES),
    **dict.fromkeys(("text", "texts", "corpus"), registered.TEXT_SOURCES),
    **dict.fromkeys(("rule", "skipped_state"), registered.SKIPPED_STATE),
    "inputs": registered.GATE_INPUTS,
    "decoder": registered.DECODERS,
    "sources": registered.DRAFTS,
    "task": registered.TASKS,
    "sampler": registered.SAMPLERS,
    "callbacks": registered.CALLBACKS,
}
"""What may stand under a key, for messages."""


class Rules:
    """Our rules for a parser of jsonargparse, which raises its complaints and takes no abbreviated options.

    Attributes:
        classes: Classes that may be named and are in no registry, by the key they stand under.
    """

    classes: ClassVar[dict[str, Sequence[type]]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - those of jsonargparse
        super().__init__(*args, **{"exit_on_error": False, "allow_abbrev": False, **kwargs})

    def _add_signature_arguments(self, *args: Any, **kwargs: Any) -> list[str]:  # noqa: ANN401 - those of jsonargparse
        """Options of a class or a function, under our rules."""
        added = super()._add_signature_arguments(*args, **kwargs)  # type: ignore[misc]
        for action in self._actions:  # type: ignore[attr-defined]
            if isinstance(action, typehints.ActionTypeHint) and not isinstance(action._check_type_, _Rule):
                action._check_type_ = _Rule(action._check_type_, action.dest, action._typehint)
        return added

    def read_arguments(self, arguments: Sequence[str]) -> Any:  # noqa: ANN401 - a namespace of jsonargparse
        """Parse the arguments; a UserError of one screen says what is wrong with them."""
        _broken.clear()
        check_files(arguments)
        try:
            return self.parse_args(list(arguments))  # type: ignore[attr-defined]
        except ArgumentError as error:
            check_files(arguments, parts=True)  # only now: what looks like a part's file may be a text
            cause: BaseException | None = _broken[0] if _broken else error
            while cause is not None:
                if isinstance(cause, UserError):
                    raise cause from error
                cause = cause.__cause__
            raise UserError(explain(str(error), Known(self.names, self.options))) from error

    def names(self, key: str) -> list[str]:
        """Names of the parts that may stand under a key; of all parts, if the key is none of ours."""
        ours = key in KINDS or key in self.classes
        registries = [KINDS[key]] if key in KINDS else [] if ours else ALL
        classes = self.classes.get(key, ()) if ours else chain(*self.classes.values())
        return sorted({*chain(*(each.names() for each in registries)), *(each.__name__ for each in classes)})

    def options(self) -> set[str]:
        """Names of options: of the parser, of its commands, and of the parts that were named, which are imported."""
        parser: Any = self
        commands = parser._subcommands_action._name_parser_map.values() if parser._subcommands_action else ()
        actions = [action for each in (parser, *commands) for action in each._actions]
        points = [point.value.partition(":") for registry in ALL for point in registry.points()]
        named = [getattr(sys.modules.get(module), name, None) for module, _, name in points]
        classes = filter(inspect.isclass, chain(named, *self.classes.values()))
        return {
            *(option.lstrip("-") for action in actions for option in action.option_strings),
            *(name for each in classes for name in inspect.signature(each).parameters),
        }


class Parser(Rules, ArgumentParser):
    """A parser with our rules and without Lightning."""


def prepare() -> None:
    """Teach jsonargparse the names of parts, and that a key may stand once in a mapping."""
    typehints.resolve_class_path_by_name = resolve
    typehints.discard_init_args_on_class_path_change = begin_anew
    disable_progress_bar()  # of reading weights
    set_loader("yaml", _load, (yaml.YAMLError,))  # without the errors, text that is no YAML would end in a traceback


def resolve(kind: Any, name: str) -> str:  # noqa: ANN401 - a class, or whatever else an option is annotated with
    """The import path of the class that a name means, where a class of some kind is wanted.

    It replaces jsonargparse's own search, which finds imported classes only: all would have to be imported, and one
    broken plug-in would stop every command.

    Raises:
        UserError: If there is such a part, and it cannot be imported.
    """
    bases = {f"{each.__module__}:{each.__qualname__}" for each in getattr(kind, "__mro__", ())}
    for registry in ALL:
        if "." not in name and bases.intersection(registry.bases) and name in registry.names():
            try:
                part = registry.get(name)
            except UserError as error:
                _broken.append(error)
                raise
            return f"{part.__module__}.{part.__qualname__}"
    return RESOLVE(kind, name)


def begin_anew(_: Any, earlier: Any, later: Any) -> None:  # noqa: ANN401 - jsonargparse's own arguments
    """Drop all options of an earlier class where a later value names another.

    It replaces a function of jsonargparse, which keeps those that the later class has too: the ``limit`` of one task
    would be the limit of another.
    """
    if earlier and "init_args" in earlier and not _same_class(earlier["class_path"], later["class_path"]):
        for key in list(earlier["init_args"].keys()):
            del earlier["init_args"][key]


def _same_class(one: str, other: str) -> bool:
    """Whether two names mean one class; one of them may be an import path and the other not."""
    ends = [name.rpartition(".")[2] for name in (one, other)]
    return one == other or (ends[0] == ends[1] and not ("." in one and "." in other))


# -- options ----------------------------------------------------------------------------------------


class _Rule:
    """How a value given for one option is read, and what it does to an earlier one.

    - Text is taken as it is: it is not YAML. Where there may be none, ``null`` is none. A list of texts is written as
      ``[a, b]``, with quotes where YAML needs them; anything else is a list of one text.
    - A whole mapping of ``exits`` replaces the earlier one: jsonargparse would keep the lens or the gates of an earlier
      exit at the same depth. A part, as ``--model.exits.2.lens`` gives it, changes the earlier value.
    - Entries of ``config`` are added to the earlier ones, which jsonargparse would lose. A mapping that names a model
      type belongs to another model, and replaces the earlier one.
    """

    def __init__(self, check: Callable[..., Any], option: str, kind: Any) -> None:  # noqa: ANN401 - an annotation
        self._check = check
        self.option = option
        kinds = list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]
        self.may_be_none = type(None) in kinds
        self.is_path = ReadPath in kinds
        lists = [each for each in kinds if get_origin(each) in SEQUENCES and set(get_args(each)) - {...} == {str}]
        self.is_list = bool(lists)
        self.is_text = all(each in (str, ReadPath, type(None), *lists) for each in kinds)

    def __call__(self, value: Any, *, cfg: Any = None, append: bool = False, **more: Any) -> Any:  # noqa: ANN401
        if isinstance(value, str) and self.is_text and not append:
            if self.may_be_none and value == "null":
                return None
            if not self.is_list:
                return read_path(value) if self.is_path and type(value) is str else value
            texts = None
            if value.startswith("["):
                with suppress(yaml.YAMLError):
                    texts = yaml.load(value, yaml.BaseLoader)  # noqa: S506 - knows text, lists and mappings only
            listed = isinstance(texts, list) and all(isinstance(each, str) for each in texts)
            value = texts if listed else [value]
        if self.option == "exits":
            return self.check(value, cfg=None if isinstance(value, dict | str) else cfg, append=append, **more)
        found, earlier = self.check(value, cfg=cfg, append=append, **more), cfg.get(self.option) if cfg else None
        if self.option == "config" and isinstance(found, dict) and isinstance(earlier, dict):
            return found if "model_type" in found else {**earlier, **found}
        return found

    def check(self, value: Any, **more: Any) -> Any:  # noqa: ANN401 - whatever the option takes
        """What jsonargparse makes of a value.

        If the content of a file is refused, jsonargparse reads the file once more, and complains of a loop instead.
        """
        try:
            return self._check(value, **more)
        except TypeError as error:
            loop = error.__cause__
            if loop is None or "Config file loop detected" not in str(loop) or loop.__context__ is None:
                raise
            refused = indent(str(loop.__context__), "  ")
            raise TypeError(f'Parser key "{self.option}":\n{refused}') from loop.__context__


# -- files ------------------------------------------------------------------------------------------


def _load(text: str) -> Any:  # noqa: ANN401 - whatever YAML holds
    """What jsonargparse loads, for values that are written on the command line; files are checked before."""
    _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return LOAD_YAML(text)


def check_files(arguments: Sequence[str], *, parts: bool = False) -> None:
    """Check the YAML files that the arguments of a command name: jsonargparse reports a damaged file without its name.

    Args:
        arguments: Those of a command.
        parts: Whether to check the files that these files name, too.

    Raises:
        UserError: Naming the file and the place in it.
    """
    ended = list(arguments).index("--") if "--" in arguments else len(arguments)
    checked: set[Path] = set()
    for before, argument in zip(("", *arguments), arguments[:ended], strict=False):
        option, equals, value = argument.partition("=") if argument.startswith("-") else (before, "=", argument)
        if argument.startswith("-c") and len(argument) > 2:
            option, equals, value = "-c", "=", argument[2:]
        if option in ("-c", "--config") and equals:
            if not os.path.isfile(value):
                what = "is a folder" if os.path.isdir(value) else "does not exist"
                raise UserError(
                    f"{value} was given after {option}, but it {what}. Wanted: a YAML file. Correct the path."
                )
            _check_file(Path(value), checked, whole=True, parts=parts)
        elif parts and value.endswith((".yaml", ".yml")) and os.path.isfile(value):
            _check_file(Path(value), checked, parts=True)


def _check_file(file: Path, checked: set[Path], *, whole: bool = False, parts: bool = False) -> None:
    if file.resolve() in checked:
        return
    checked.add(file.resolve())
    try:
        text = file.read_text("utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
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
    if whole and not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "one value"
        raise UserError(f"{file} holds {found}; wanted: options, a line each, such as `model: HeadsModule`.")
    for name in _check_keys(node, f"{file}: "):
        if parts and name.endswith((".yaml", ".yml")) and (part := file.parent / os.path.expanduser(name)).is_file():
            _check_file(part, checked, parts=True)


def _check_keys(node: yaml.Node | None, place: str) -> Sequence[str]:
    """Refuse two equal keys in one mapping: YAML keeps the last without a word. Returns all values that are text."""
    values: list[str] = []
    left = [node]
    while left:
        node = left.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(
                        f"{place}The key {key} stands twice in the mapping that begins on line "
                        f"{node.start_mark.line + 1}. A key may stand once, or the second would hide the first."
                    )
            left += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.ScalarNode):
            values.append(node.value)
    return values
