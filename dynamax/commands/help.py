"""``dynamax COMMAND --help``: a page for a person, made without importing torch, Lightning or the parser."""

from __future__ import annotations

import shutil
import textwrap
from typing import NamedTuple

from dynamax.commands.source import Option, options


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
    "distill": (Part("model", "dynamax.modules.distilling", "DistillationModule"), TEXT),
}
EXAMPLES = {
    "fit": "-c configs/demo/fit.yaml",
    "cache": "-c configs/demo/fit.yaml",
    "validate": "-c configs/demo/fit.yaml --model.heads runs/demo/heads",
    "test": "-c configs/demo/test.yaml",
    "predict": "-c configs/demo/test.yaml",
    "train": "-c configs/siblings/llama.yaml",
    "distill": "-c configs/distill/smollm2-to-mamba2.yaml",
    "generate": '"What is the capital of France?"',
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
PRINT = Option("--print_config", None, "Print all options that the run would use, as YAML, and stop.")


def page(command: str, purpose: str) -> str:
    """The page of a command."""
    usage = {"generate": "PROMPT [-c FILE]... [--OPTION VALUE]...", "list": "[KIND]", "info": ""}
    shown = usage.get(command, "[-c FILE]... [--OPTION VALUE]...")
    lines = [f"usage: dynamax {command} {shown}".rstrip(), "", f"{purpose[0].upper()}{purpose[1:]}."]
    if command == "list":
        lines += ["", "KIND is heads, policies, tasks or another heading of the whole list."]
    if command in EXAMPLES:
        lines += ["", f"  dynamax {command} {EXAMPLES[command]}", "", "Options", *_entry(CONFIG), *_entry(PRINT)]
    if command == "generate":
        told = options("dynamax.commands.generate", "generate")
        prompt = Option("PROMPT", None, "What to answer: any text. One that begins with - stands behind --.")
        lines += [*_entry(prompt), *_entries("", [each for each in told if each.name != "prompt"])]
    for part in PARTS.get(command, ()):
        found = [each for each in options(part.module, part.name) if part is not STORE or each.name not in LINKED]
        lines += ["", f"Options of --{part.prefix} {part.name}", *_entries(f"{part.prefix}.", found)]
    if command in PARTS:
        training = TRAINING if command in ("fit", "train", "distill") else []
        lines += [
            "",
            "Options of Lightning's Trainer that are needed most",
            *_entries("trainer.", [*training, *TRAINER]),
        ]
        own = [Option("seed_everything", "0", "Seed of all that is random.")]
        if command != "cache":
            own.append(Option("ckpt_path", "None", "Checkpoint of the trainer to go on from, or to score."))
        lines += ["", "More options", *_entries("", own)]
    if command in EXAMPLES:
        lines += [
            "",
            "Names of exit heads, policies, tasks and other parts: dynamax list. Options of one of them:",
            "  --OPTION.help NAME, such as "
            + ("--policy.help MaxProb" if command == "generate" else "--model.help " + PARTS[command][0].name),
            "How files are put together: configs/README.md. Every option there is:",
            f"  dynamax {command} --help all",
        ]
    return "\n".join(lines)


def _entries(prefix: str, found: list[Option]) -> list[str]:
    return [line for each in found for line in _entry(each._replace(name=f"--{prefix}{each.name}"))]


def _entry(option: Option) -> list[str]:
    """The name and its text beside it, within the width of the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    default = "" if option.default in (None, "None") else f" Default: {option.default.strip(chr(39))}."
    indent = 30 if width >= 70 else 6
    wrapped = textwrap.wrap(option.text + default, max(width - indent, 20))
    name = f"  {option.name}"
    if len(name) < indent and wrapped:
        return [name.ljust(indent) + wrapped[0], *(" " * indent + line for line in wrapped[1:])]
    return [name, *(" " * indent + line for line in wrapped)]
