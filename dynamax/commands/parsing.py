"""What all our parsers do: names of parts, text as it is, paths, what a later value does to an earlier one.

Knows jsonargparse; knows neither Lightning nor any part.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from math import isnan
from textwrap import indent
from typing import Any, ClassVar, Union, get_args, get_origin

import jsonargparse._typehints as typehints
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader
from transformers.utils.logging import disable_progress_bar

from dynamax import registry as registered
from dynamax.commands.backbones import SOURCE, as_source
from dynamax.commands.kinds import in_words, is_only_options, option_in_words, options_within
from dynamax.commands.messages import WANTED, Known, explain, is_specific
from dynamax.commands.yaml_files import check_files, load_value
from dynamax.errors import UserError, shown
from dynamax.paths import ReadPath, read_path
from dynamax.registry import ALL, Registry

RESOLVE = typehints.resolve_class_path_by_name
SEQUENCES = (list, tuple, Sequence)
MAPPINGS = (dict, Mapping)
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
        self._check_help(arguments)
        try:
            return self.parse_args(list(arguments))  # type: ignore[attr-defined]
        except RecursionError as error:
            raise UserError(
                "An option holds lists or mappings that lie too deep in one another. Correct it."
            ) from error
        except ArgumentError as error:
            check_files(arguments, parts=True)  # only now: what looks like a part's file may be a text
            cause: BaseException | None = _broken[0] if _broken else error
            while cause is not None:
                if isinstance(cause, UserError):
                    raise cause from error
                cause = cause.__cause__
            raise UserError(explain(str(error), Known(self.names, self.options))) from error

    def _check_help(self, arguments: Sequence[str]) -> None:
        """Refuse ``--policy.help`` without a name: jsonargparse would print a page of nothing."""
        for word, behind in zip(arguments, [*arguments[1:], "-"], strict=False):
            if word == "--":
                return
            key = word.removesuffix(".help").removeprefix("--").rpartition(".")[2]
            if word.startswith("--") and word.endswith(".help") and behind.startswith("-") and self.names(key):
                names = self.names(key)
                raise UserError(f"{word} was given no name; wanted: one of {', '.join(names)}. Add it behind a space.")

    def validate(self, cfg: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - those of jsonargparse
        """Also refuse ``null`` where there must be something: jsonargparse takes it for an option that is not given."""
        for action in self._actions:  # type: ignore[attr-defined]
            rule = getattr(action, "_check_type_", None)
            if isinstance(rule, _Rule) and not rule.may_be_none and action.default is not None:
                name = action.dest
                if name in cfg and cfg[name] is None:
                    raise TypeError(f'Parser key "{name}":\n  {WANTED}{rule.wanted}. Got value: null')
        super().validate(cfg, *args, **kwargs)  # type: ignore[misc]

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
            *chain(*map(_options_of, classes)),
        }


def _options_of(kind: type) -> set[str]:
    """Names of the options of a class, and of the groups that they hold."""
    found = set(inspect.signature(kind).parameters)
    with suppress(NameError, TypeError):  # annotations that only a type checker can read
        parameters = inspect.signature(kind, eval_str=True).parameters.values()
        found = found.union(*(options_within(each.annotation) for each in parameters))
    return found


class Parser(Rules, ArgumentParser):
    """A parser with our rules and without Lightning."""


def prepare() -> None:
    """Teach jsonargparse the names of parts, and that a key may stand once in a mapping."""
    typehints.resolve_class_path_by_name = resolve
    typehints.discard_init_args_on_class_path_change = begin_anew
    disable_progress_bar()  # of reading weights
    set_loader(
        "yaml", load_value, (yaml.YAMLError,)
    )  # without the errors, text that is no YAML would end in a traceback


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


def _exits_at(value: Any) -> Any:  # noqa: ANN401 - whatever exits were given
    """Depths alone, ``[2, 4]``, as exits with all defaults; anything else as it is."""
    depths = value
    if isinstance(value, str) and value.startswith("["):
        with suppress(yaml.YAMLError):
            depths = yaml.safe_load(value)
    plain = isinstance(depths, list) and bool(depths) and all(type(depth) is int for depth in depths)
    return {depth: {} for depth in depths} if plain and len(set(depths)) == len(depths) else value


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever an option was given
    """A value as it was written: what jsonargparse made of a mapping, as a mapping again, without what is not set."""
    if not isinstance(value, Namespace):
        return value
    held = value.init_args if "init_args" in value else value
    return {name: _plain(each) for name, each in vars(held).items() if each is not None}


class _Rule:
    """How a value given for one option is read, and what it does to an earlier one.

    - Text is taken as it is: it is not YAML. Where there may be none, ``null`` is none. A list of texts is written as
      ``[a, b]``, with quotes where YAML needs them; anything else is a list of one text.
    - ``exits`` may be depths alone. A whole mapping of them replaces the earlier one: jsonargparse would keep the lens
      or the gates of an earlier exit at the same depth. A part, as ``--model.exits.2.lens`` gives it, changes the
      earlier value.
    - Entries of ``config`` are added to the earlier ones, which jsonargparse would lose. A mapping that names a model
      type belongs to another model, and replaces the earlier one.
    """

    def __init__(self, check: Callable[..., Any], option: str, kind: Any) -> None:  # noqa: ANN401 - an annotation
        self._check = check
        self.option = option
        self.kinds = kinds = list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]
        self.may_be_none = type(None) in kinds
        self.is_path = ReadPath in kinds
        lists = [each for each in kinds if get_origin(each) in SEQUENCES and set(get_args(each)) - {...} == {str}]
        self.is_list = bool(lists)
        self.is_source = any(
            f"{getattr(k, '__module__', '')}:{getattr(k, '__qualname__', '')}" == SOURCE for k in kinds
        )
        self.is_group = is_only_options(kinds)
        self.wanted = in_words(kind)
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
        if isinstance(value, str) and self.is_source:
            value = as_source(value)
        if self.option == "exits":
            value = _exits_at(value) if any(get_origin(each) in MAPPINGS for each in self.kinds) else value
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
            found = self._check(value, **more)
        except TypeError as error:
            loop = error.__cause__
            if loop is not None and "Config file loop detected" in str(loop) and loop.__context__ is not None:
                refused = indent(str(loop.__context__), "  ")
                raise TypeError(f'Parser key "{self.option}":\n{refused}') from loop.__context__
            if is_specific(str(error)) and not self.is_group:
                raise
            raise self._refusal(value) from error
        if isinstance(found, float) and isnan(found):
            raise self._refusal(value)
        return found

    def _refusal(self, value: Any) -> TypeError:  # noqa: ANN401
        given, part = _plain(getattr(value, "val", value)), getattr(value, "key", None)  # edge.deadline is part of edge
        place, wanted = self.option if part is None else f"{self.option}.{part}", self.wanted
        if part is not None:
            words = option_in_words(self.kinds, part)
            if words is None:
                return TypeError(f"Parser key \"{self.option}\":\n  Option '{part}' is none of its own")
            wanted = words
        return TypeError(f'Parser key "{place}":\n  {WANTED}{wanted}. Got value: {shown(given)}')
