"""``dynamax info``: what a bug report must say; with a model, what is known of that."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from dynamax import __version__
from dynamax.device import chosen
from dynamax.errors import UserError
from dynamax.kernels import PACKAGES, backend
from dynamax.metrics.environment import environment

POSITIONS = 512
"""Positions that precisions are compared on: about a minute for a model of 135 million weights."""

USAGE = "--precision [MODEL] [--positions N] [--text FILE], where MODEL is what dynamax.load takes, SmolLM2 if left out"


def main(arguments: Sequence[str]) -> None:
    """Print versions, device and kernels; facts of a model; with --precision, what each precision gives and costs."""
    given = list(arguments[1:])
    if given[:1] == ["--precision"]:
        precision(given[1:])
        return
    if len(given) > 1 or any(word.startswith("-") for word in given):
        raise UserError(f"dynamax info was given {' '.join(given)}; wanted: nothing, MODEL alone, or {USAGE}.")
    if given:
        from dynamax.commands.info_model import told  # with transformers' models, which versions need not

        print(told(given[0]))
        return
    device = chosen("auto")
    facts = {"dynamax": __version__, **environment(device, dtype="float32", batch=1)}
    for name in ("dtype", "precision", "weights", "batch", "compile_seconds", "graphs"):
        facts.pop(name)
    for package in PACKAGES:
        used = f"installed; {backend(package, device).replace('torch', 'plain PyTorch')} runs on {device}"
        facts[package] = used if find_spec(package) else "not installed; plain PyTorch is used"
    for name, value in facts.items():
        print(f"{name:<14}{value}")
    print("\nFamily, sizes, rules and exits of a model, and what a token costs by depth: dynamax info MODEL")
    print("Names of exit heads, policies and all other parts, with the packages they come from: dynamax list")
    print("Speed and quality of each precision of weights on this machine: dynamax info --precision [MODEL]")


def precision(given: Sequence[str]) -> None:
    """Compare every precision of a model's weights on a text.

    Raises:
        UserError: At other options than those of ``USAGE``, or a file that cannot be read.
    """
    from dynamax.bench.quality import passages, qualities, table  # with the model, which versions need not
    from dynamax.engine import load

    models = [word for word in given[:1] if not word.startswith("--")]
    model, rest = (models or ["SmolLM2"])[0], given[len(models) :]
    options = dict(zip(rest[::2], rest[1::2], strict=False))
    count = options.get("--positions", str(POSITIONS))
    fits = len(rest) == 2 * len(options) and set(options) <= {"--positions", "--text"}
    if not fits or not count.isdecimal() or not int(count):
        raise UserError(f"dynamax info was given --precision {' '.join(given)}; wanted: {USAGE}.")
    text = passages() if "--text" not in options else read_text(Path(options["--text"]))
    print(f"Loading {model}", flush=True)
    engine = load(model, device="cpu")
    print(f"Reading {count} positions in each precision", flush=True)
    print(table(list(qualities(engine, text, int(count)))))


def read_text(file: Path) -> str:
    """A file's text.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return file.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise UserError(f"{file} cannot be read: {reason}. Name a text file in UTF-8.") from error
