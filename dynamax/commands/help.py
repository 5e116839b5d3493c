"""``dynamax COMMAND --help``: docstrings and options are read from source files, and nothing of them is imported.

So a page takes a fraction of a second, where importing torch, Lightning and the parser takes several.
"""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
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


class Part(NamedTuple):
    """A class whose options a command has, and what stands before their names."""

    prefix: str
    module: str
    name: str


HEADS = Part("model", "dynamax.modules.heads", "HeadsModule")
DECODING = Part("model", "dynamax.modules.decoding", "DecodingModule")
STORE = Part("data", "dynamax.data.hidden", "HiddenStates")
TASK = Part("data", "dynamax.data.tasks", "TaskData")
TEXT = Part("data", "dynamax.data.language", "LanguageData")
PARTS = {
    "fit": (HEADS, STORE),
    "cache": (HEADS, STORE),
    "validate": (HEADS, STORE),
    "test": (DECODING, TASK),
    "predict": (DECODING, TASK),
    "train": (Part("model", "dynamax.modules.pretraining", "PretrainingModule"), TEXT),
    "tune": (
        Part("model", "dynamax.modules.tuning", "TuningModule"),
        Part("data", "dynamax.data.written", "WrittenText"),
    ),
    "distill": (Part("model", "dynamax.modules.distilling", "DistillationModule"), TEXT),
}
EXAMPLES = {
    "fit": "-c configs/demo/fit.yaml",
    "cache": "-c configs/demo/fit.yaml",
    "validate": "-c configs/demo/fit.yaml --model.heads runs/demo/heads",
    "test": "-c configs/demo/test.yaml",
    "predict": "-c configs/demo/test.yaml",
    "train": "-c configs/siblings/llama.yaml",
    "tune": "-c configs/tune/smollm2.yaml",
    "distill": "-c configs/distill/smollm2-to-mamba2.yaml",
    "generate": '"What is the capital of France?"',
    "import-heads": "DSSD-Qwen3-0.6B --backbone configs/backbone/qwen3-0.6b.yaml",
    "split": "runs/demo/heads --at 15 --out runs/split",
    "serve cloud": "--part runs/split/cloud --address 127.0.0.1:7070",
    "serve edge": "--edge.folder runs/split/edge --edge.cloud 127.0.0.1:7070 --policy MaxProb",
    "suitability": "SmolLM2 --plot runs/suitability.png",
    "calibrate": "runs/demo/heads -c configs/calibrate/demo.yaml",
    "bench": "SmolLM2",
}
LINKED = ("backbone", "exits")
"""Options of the store that follow the heads it is for."""
TRAINING = [
    Option("max_epochs", None, "When to stop, in passes over the data."),
    Option("max_steps", "-1", "When to stop, in steps of the optimiser."),
    Option("gradient_clip_val", "None", "Longest gradient; of each head on its own where heads are trained."),
    Option("val_check_interval", "None", "How often to validate: a part of an epoch, or a number of batches."),
    Option("enable_checkpointing", "False", "Keep checkpoints of the whole training, to go on from."),
]
TRAINER = [
    Option("callbacks", "None", "What else happens; names: dynamax list callbacks."),
    Option("logger", "None", "Where figures are logged, such as CSVLogger."),
    Option("accelerator", "'auto'", "cpu, cuda, or whatever is there."),
    Option("precision", "None", "Such as bf16-mixed; 32-true by default."),
    Option("fast_dev_run", "False", "One batch of everything, and nothing is saved."),
]
CONFIG = Option(
    "-c FILE, --config FILE",
    None,
    "Options from a YAML file. A later file lies over an earlier one, and "
    "options lie over both. Paths of what is read count from the file that names them.",
)
PROMPT = Option(
    "PROMPT...",
    None,
    "What to answer: any text, or several. - is all of standard input, as one prompt; a text that begins with - "
    "stands behind --.",
)
MODEL = Option(
    "MODEL",
    None,
    "Which model: a folder, a name on the Hub, a GGUF file, a folder of trained heads, or a source such as SmolLM2.",
)
RUN = Option("RUN...", None, "Folders that dynamax test wrote, each with a report.json.")
PUBLISHED = Option("FOLDER", None, "Folder with config.json and aux_heads.pt, as DSSD publishes them.")
PRINT = Option("--print_config", None, "Print all options that the run would use, as YAML, and stop.")
EDGE = Part("edge", "dynamax.serving.options", "EdgeOptions")
GROUPS = {"generate": EDGE, "serve edge": EDGE}
"""Groups of options that a function has."""
FUNCTIONS: dict[str, tuple[str, Option | None]] = {
    "generate": ("dynamax.commands.generate", PROMPT),
    "import-heads": ("dynamax.commands.import_heads", PUBLISHED),
    "split": ("dynamax.commands.split", MODEL),
    "serve cloud": ("dynamax.commands.serve_cloud", None),
    "serve edge": ("dynamax.commands.serve_edge", None),
    "suitability": ("dynamax.commands.suitability", MODEL),
    "calibrate": ("dynamax.commands.calibrate", MODEL),
    "bench": ("dynamax.commands.measuring", MODEL),
}
"""Commands whose options are those of a function of their name: its module, and the argument that is no option."""
HELP = {
    "suitability": "--text.help SelfGenerated",
    "split": "--exits.help Exit",
    "serve cloud": None,
    "import-heads": "--backbone.help Hub",
}
"""What stands for an option with options of its own, where that is no policy; None where there is none."""
HIDDEN = ("generate.prompts", "model", "recipe", "command", "folder")
"""Arguments of these functions that are no options; those of one command stand behind its name."""


def page(command: str, purpose: str) -> str:
    """The page of a command."""
    usage = {"list": "[KIND]", "info": "[MODEL | --precision [MODEL] [--positions N] [--text FILE]]"}
    usage |= {"report": "RUN... [--out FILE]"}
    begins = {name: "" if first is None else f"{first.name} " for name, (_, first) in FUNCTIONS.items()}
    usage |= {name: f"{begin}[-c FILE]... [--OPTION VALUE]..." for name, begin in begins.items()}
    shown = usage.get(command, "[-c FILE]... [--OPTION VALUE]...")
    lines = [f"usage: dynamax {command} {shown}".rstrip(), "", f"{purpose[0].upper()}{purpose[1:]}."]
    if command == "list":
        lines += ["", "KIND is heads, policies, tasks or another heading of the whole list."]
    if command == "report":
        lines += [
            "",
            "  dynamax report runs/demo runs/demo-mamba --out report.html",
            "",
            "Options",
            *_entries("", [RUN]),
        ]
        lines += _entries("--", [each for each in options("dynamax.commands.report", command) if each.name == "out"])
    if command in EXAMPLES:
        lines += ["", f"  dynamax {command} {EXAMPLES[command]}", "", "Options", *_entries("", [CONFIG, PRINT])]
    if command in FUNCTIONS:
        module, first = FUNCTIONS[command]
        lines += _entries("", [] if first is None else [first])
        found = options(module, re.sub("[ -]", "_", command))
        lines += _entries("--", [each for each in found if not {each.name, f"{command}.{each.name}"} & {*HIDDEN}])
    if command in GROUPS:
        group = GROUPS[command]
        found = options(group.module, group.name)
        lines += ["", f"Options of --{group.prefix}", *_entries(f"--{group.prefix}.", found)]
    for part in PARTS.get(command, ()):
        found = [each for each in options(part.module, part.name) if part is not STORE or each.name not in LINKED]
        lines += ["", f"Options of --{part.prefix} {part.name}", *_entries(f"--{part.prefix}.", found)]
    if command in PARTS:
        training = TRAINING if command in ("fit", "train", "tune", "distill") else []
        lines += [
            "",
            f"Options of Lightning's Trainer that are needed most; all: dynamax {command} --help trainer",
            *_entries("--trainer.", [*training, *TRAINER]),
        ]
        own = [Option("seed_everything", "0", "Seed of all that is random.")]
        if command != "cache":
            own.append(Option("ckpt_path", "None", "Checkpoint of the trainer to go on from, or to score."))
        lines += ["", "More options", *_entries("--", own)]
    if command in EXAMPLES:
        parts = HELP.get(command, "--policy.help MaxProb") if command in FUNCTIONS else None
        parts = f"--model.help {PARTS[command][0].name}" if command in PARTS else parts
        named = "Names of exit heads, policies, tasks and other parts: dynamax list. Options of one of them:"
        lines += ["", *([] if parts is None else [named, f"  --OPTION.help NAME, such as {parts}"])]
        lines += [
            "How files are put together: configs/README.md. Every option there is:",
            f"  dynamax {command} --help all",
        ]
    return "\n".join(lines)


def trainer(command: str) -> str:
    """All options of Lightning's Trainer, as its docstring tells them, a sentence each."""
    known = options("lightning.pytorch.trainer.trainer", "Trainer")
    found = [each._replace(text=sentence(each.text)) for each in known]
    return "\n".join([f"Lightning's Trainer, as dynamax {command} takes it", *_entries("--trainer.", found)])


def sentence(text: str) -> str:
    """The first sentence of a text, without marks of reStructuredText."""
    plain = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("`", "")
    return re.split(r"(?<=[.])\s", f"{plain} ")[0].strip()


def _entries(prefix: str, found: list[Option]) -> list[str]:
    """Names of options behind a prefix, and their texts beside them, within the width of the terminal."""
    lines = []
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    indent = 30 if width >= 70 else 6
    for option in found:
        default = "" if option.default in (None, "None") else f" Default: {option.default.strip(chr(39))}."
        wrapped = textwrap.wrap(option.text + default, max(width - indent, 20))
        name = f"  {prefix}{option.name}"
        beside = wrapped.pop(0) if len(name) < indent and wrapped else ""
        lines += [name.ljust(indent) + beside if beside else name, *(" " * indent + line for line in wrapped)]
    return lines


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


def options(module: str, name: str) -> list[Option]:
    """The options of a class or a function, in order, with what its docstring says of them."""
    node = definition(module, name)
    function = node
    if isinstance(node, ast.ClassDef):
        made = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        if not made:  # a dataclass
            texts = _texts(ast.get_docstring(node) or "", "Attributes")
            fields = [
                each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
            ]
            return [_option(ast.unparse(each.target), each.value, texts) for each in fields]
        (function,) = made
    assert isinstance(function, ast.FunctionDef)
    told = [ast.get_docstring(each) or "" for each in (node, function)]  # Lightning has it in the constructor
    texts = _texts(next((each for each in told if "Args:" in each), ""), "Args")
    given = function.args
    ordered = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [
        *[None] * (len(ordered) - len(given.defaults)),
        *given.defaults,
        *given.kw_defaults,
    ]
    return [
        _option(argument.arg, default, texts)
        for argument, default in zip([*ordered, *given.kwonlyargs], defaults, strict=True)
        if argument.arg != "self"
    ]


def _texts(docstring: str, heading: str) -> dict[str, str]:
    """What a section of a docstring says, by name."""
    section = re.search(rf"^{heading}:\n(.*?)(?=^\S|\Z)", docstring, re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section.group(1) if section else "", re.DOTALL | re.M)
    return {entry: " ".join(text.split()).replace("``", "") for entry, text in entries}


def _option(name: str, default: ast.expr | None, texts: dict[str, str]) -> Option:
    return Option(name, None if default is None else ast.unparse(default), texts.get(name, ""))
