"""A parser's complaint as one short message: where, what was given, what is near, what is known.

jsonargparse reports every alternative it tried, nested; the innermost names the mistake. A few common complaints
are replaced by our words. All others are shown as they are, cut to one screen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dynamax.errors import shown
from dynamax.registry import near

LONGEST = 12
"""Lines of a complaint that is shown as it is."""
WANTED = "Wanted here: "
"""What our rules put before the words for what an option takes."""
WIDEST = 300
"""Characters of one of its lines."""
CUTOFF = 0.7
OVER = "-c configs/demo/fit.yaml -c FILE"
WHOLE = ("model", "data")
"""Keys whose class most files leave to the file before them."""
MODELS = ("backbone", "writer", "teacher")
"""Keys under which a model may stand by its path."""
FILE = re.compile(r"\.(yaml|yml|json)$|/")
DEMOS = {"fit": "fit", "cache": "fit", "validate": "fit", "test": "test", "predict": "test"}


class Known(NamedTuple):
    """What may be named: parts by the key they stand under, and options."""

    names: Callable[[str], Sequence[str]]
    options: Callable[[], Iterable[str]]


def explain(complaint: str, known: Known) -> str:
    """The message for one complaint of the parser."""
    lines = complaint.splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines]
    found = [
        (indents[place], place, handler, match)
        for place, line in enumerate(lines)
        for pattern, handler in PATTERNS
        if (match := re.search(pattern, line))
    ]
    if not found:
        kept = [line for line in lines if line.strip()]
        return "\n".join(shown(line, WIDEST) for line in (kept if len(kept) <= LONGEST else [*kept[:LONGEST], "..."]))
    deepest = max(indent for indent, *_ in found)
    _, place, handler, match = next(entry for entry in found if entry[0] == deepest)
    keys: list[str] = []  # that of the complaint, and those above it at smaller indents
    limit = deepest + 1
    for above in range(place, -1, -1):
        key = re.search(r'Parser key "([^"]+)"', lines[above])
        if key and indents[above] < limit:
            keys.insert(0, key.group(1))
            limit = indents[above]
    return handler(".".join(keys) or "the command line", match.group(1), known, lines)


def _no_class(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    key = where.rsplit(".", 1)[-1]
    names = known.names(key)
    if FILE.search(given):
        return (
            f"{where} names the file {shown(given)}, which is not there. A path inside a file counts from that file, "
            f"one on the command line from the current folder. Correct the path."
        )
    hint = near(given, names, CUTOFF)
    if key in MODELS:
        return (
            f"{where} is {shown(given)}: there is no folder of that name, and no class.{hint} Wanted: a model folder, "
            f"a GGUF file, OWNER/NAME on the Hub, or a class: {', '.join(names)}."
        )
    return f"{where} names the class {shown(given)}, which is not known.{hint} Known: {', '.join(names)}."


def _no_import(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    paths = re.findall(r"(?:Expected a path but |given class_path ')([^\s']+)", "\n".join(lines))
    file = next(filter(FILE.search, paths), None)
    if file is not None:  # taken for module.Class because of its dot
        return _no_class(where, file, known, lines)
    module = re.fullmatch("No module named '([^']+)'", given)
    if module is None:
        return f"{where}: {given}. Correct the name."
    return (
        f"{where}: the module {module.group(1)} cannot be imported; put its folder on PYTHONPATH, or install the "
        f"package that holds it."
    )


def _no_option(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    nested = re.search(r"NestedArg\(key='([\w.]+)'", "\n".join(lines))
    above = nested.group(1).rpartition(".")[0] if nested else ""
    place = where if where.endswith(above) else f"{where}.{above}"
    over = f" A file that names no class lies over a whole run: {OVER}." if place in WHOLE else ""
    return (
        f"{place} has no option {given}.{near(given, set(known.options()) - {given}, CUTOFF)}{over} "
        f"All options of a run with their values: add --print_config."
    )


def _unrecognized(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    option = given.split("=")[0].split()[0]
    if option.endswith((".yaml", ".yml")):
        return f"The file {shown(option)} stands without its option. Write -c {shown(option)}."
    if option.endswith(".help") and option.count(".") == 1:
        return (
            f"There is no option {shown(option)} here. Options of a part inside another can be shown once the other is "
            f"named: put -c FILE before it."
        )
    if not option.startswith("-"):
        return f'{shown(given)!r} is one value too many. A value of several words stands in quotes: "...".'
    return f"There is no option {shown(option)}.{like(option.lstrip('-'), set(known.options()))} See --help."


def like(name: str, options: set[str]) -> str:
    """A question with the options that a name may mean: another word for one, its beginning, or one spelt alike."""
    plain, others = name.replace("-", "_"), options - {name}
    meant = [each for each in OTHER_WORDS.get(plain, ()) if each in others]
    longer = sorted(each for each in others if len(plain) > 2 and each.startswith(plain))
    found = meant[:1] or ([plain] if plain in others else longer)
    if not found:
        return near(name, others, CUTOFF).replace(" or ", " or --").replace("mean ", "mean --")
    return f" Did you mean {' or '.join(f'--{each}' for each in found[:3])}?"


def _no_value(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    return f"{given} was given no value. Write one behind it, such as {given} VALUE."


def _missing(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    command, _, name = given.rpartition(".")
    if name == "prompts":
        return 'There is no prompt. Write what to answer: dynamax generate "What is the capital of France?"'
    if given.split(", ")[0] == "model":
        rest = given.partition(", ")[2].replace(", ", " and --")
        also = f", and the options --{rest}" if rest else ""
        return f"There is no model. Write which behind the command, such as SmolLM2 or the path of a folder{also}."
    start = f", or start from a whole run: -c configs/demo/{DEMOS[command]}.yaml" if command in DEMOS else ""
    return f"{where} lacks {given}. Give it in a file (-c) or as an option{start}."


def _wrong_value(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    wanted, _, value = given.partition(". Got value: ")
    if value == "None":
        value = "null"
    if where in WHOLE and "init_args" in value and "class_path" not in value:
        return (
            f"{where} has options (init_args) and names no class (class_path). Name it, or lay the file over a whole "
            f"run: {OVER}"
        )
    hint = near(value, re.findall(r"'([^']+)'", wanted), CUTOFF)
    return f"{where} was given {value}; wanted: {wanted}.{hint or ' Change it.'}"


def _wrong_type(where: str, given: str, known: Known, lines: Sequence[str]) -> str:
    """The parser's own complaint, in our words for the types that are plain."""
    wanted, _, value = given.partition(". Got value: ")
    values = [value, *(line.split("Given value: ", 1)[1] for line in lines if "Given value: " in line)]
    value = next(filter(None, values), "something else")
    for name, words in TYPES.items():
        wanted = wanted.replace(f"<class '{name}'>", words)
    wanted = re.sub(r"^typing.Literal\[", "", wanted).rstrip("]")
    return _wrong_value(where, f"{wanted}. Got value: {shown(value)}", known, lines)


def is_specific(complaint: str) -> bool:
    """Whether a complaint says more than that a value is of the wrong kind, or comes from an option within."""
    return complaint.count('Parser key "') > 1 or any(
        re.search(pattern, complaint) for pattern, handler in PATTERNS if handler is not _wrong_type
    )


OTHER_WORDS = {
    "model": ("backbone",),
    "tokens": ("max_new_tokens",),
    "max_tokens": ("max_new_tokens",),
    "length": ("max_new_tokens", "data.text.length"),
    "stop": ("stop_strings",),
    "output": ("out",),
    "epochs": ("trainer.max_epochs",),
    "steps": ("trainer.max_steps",),
    "lr": ("model.learning_rate",),
    "batch_size": ("data.batch_size",),
}
"""What others call an option."""
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
    "dict": "a mapping",
    "list": "a list",
}
PATTERNS = (
    (WANTED + r"(.+)", _wrong_value),
    (r"(?:Expected a dot import path string|Unexpected import path format): (\S+)", _no_class),
    (
        r"(No module named '[^']+'|module '[\w.]+' has no attribute '\w+'|cannot import name '\w+' from '[\w.]+')",
        _no_import,
    ),
    (r"(?:Option|does not accept option) '([\w.+]+)'", _no_option),
    (r"[Uu]nrecognized arguments: (.+)", _unrecognized),
    (r"argument (?:-\w/)?(--[\w.+-]+): expected one argument", _no_value),
    (r"the following arguments are required: (.+)", _missing),
    (r"Subtypes: \[((?:<class '(?:int|float|str|bool|NoneType)'>|dict\[.*?\]|list\[.*?\]|, )+)\]", _wrong_type),
    (r"Expected a (typing.Literal\[.*|<class '(?:int|float|str|bool)'>.*)", _wrong_type),
)
