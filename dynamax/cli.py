"""The command ``dynamax``: which command is meant, and how its errors are shown.

A command's own module, and torch with it, is imported only when that command is run.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from dynamax import __version__
from dynamax.commands.streams import abandon, prepare_streams, tell
from dynamax.errors import UserError, around_us, shown
from dynamax.registry import near


class Command(NamedTuple):
    """Where a command lives, what it does, and what it says when it begins and when it is stopped.

    The module has ``main(arguments)``; importing it takes seconds.
    """

    module: str
    purpose: str
    begins: str = "starting"
    stopped: str = "Nothing was written. Run the same command again."


RUNS = "dynamax.commands.runs"
TELLS = ""
"""Where the command itself says what is kept of a run that was stopped."""
BENCH = "starting; a line below shows what is being done"
COMMANDS = {
    "fit": Command(RUNS, "fill the hidden-state store if need be, then train exit heads on it", stopped=TELLS),
    "validate": Command(RUNS, "score trained heads on the store's held-out documents", stopped=TELLS),
    "test": Command(RUNS, "decode a task with policies over thresholds; report and picture", stopped=TELLS),
    "predict": Command(RUNS, "answer a task's examples", stopped=TELLS),
    "cache": Command(
        RUNS, "fill the hidden-state store, or write the text of tune; goes on where it was stopped", stopped=TELLS
    ),
    "train": Command(RUNS, "train a small language model from the start, with exits built in", stopped=TELLS),
    "tune": Command(RUNS, "tune a pretrained model so that it can be read early", stopped=TELLS),
    "distill": Command(RUNS, "train a Mamba-2 student of a Transformer, or a hybrid", stopped=TELLS),
    "generate": Command("dynamax.commands.generate", "answer a prompt, each token coloured by the depth it left at"),
    "import-heads": Command(
        "dynamax.commands.import_heads", "write heads that DSSD published in this project's format"
    ),
    "split": Command("dynamax.commands.split", "write a model in two folders, for an edge device and a cloud"),
    "serve cloud": Command(
        "dynamax.commands.serve_cloud", "finish tokens for edges, with a model's upper part", stopped=""
    ),
    "serve edge": Command(
        "dynamax.commands.serve_edge", "answer OpenAI's clients, with an edge or a whole model", stopped=""
    ),
    "suitability": Command(
        "dynamax.commands.suitability", "say whether early exits will pay on a model, before anything is trained"
    ),
    "calibrate": Command("dynamax.commands.calibrate", "choose thresholds and test what can be promised of them"),
    "report": Command("dynamax.commands.report", "make one page of what runs of test, fit and calibrate found"),
    "bench": Command("dynamax.commands.bench", "measure how fast a model decodes here, beside other packages", BENCH),
    "list": Command("dynamax.commands.list", "names that a configuration can use, such as exit heads and policies", ""),
    "info": Command("dynamax.commands.info", "versions, device, kernels; what is known of a model"),
}
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command that SIGTERM stopped, as shells give it."""


HELP = ([], ["-h"], ["--help"])
"""What asks a group of commands for its pages."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit.

    The code is 0, or 2 for a mistake in what was asked, 1 for a failure, 130 if stopped by Ctrl-C, 143 by SIGTERM, 141
    if nobody reads its output any more.
    """
    prepare_streams()
    try:
        try:
            _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            print(end="", flush=True)  # a closed pipe or a full disk is noticed here, not after the end
    except BrokenPipeError:  # whoever reads, such as head, has had enough
        abandon("stdout", "stderr")
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        known = around_us(error)
        if known is None or wants_traceback(sys.argv[1:] if arguments is None else arguments):
            raise
        abandon("stdout")
        if isinstance(error.__context__, SystemExit) and error.__context__.code:
            sys.exit(error.__context__.code)  # the same was told before
        tell(f"dynamax: the output could not be written. {known[1]}")
        sys.exit(known[0])


def _run(arguments: list[str]) -> NoReturn:
    ended = arguments.index("--") if "--" in arguments else len(arguments)  # what follows is text, never an option
    options = arguments[:ended]
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        signal.signal(signal.SIGTERM, _terminated)  # Lightning keeps it beside its own, which would let fit exit with 0
    try:
        _dispatch([option for option in options if option != "--debug"], arguments[ended:])
    except (KeyboardInterrupt, SystemExit) as stopped:
        by_hand = isinstance(stopped, KeyboardInterrupt) or isinstance(stopped.__context__, KeyboardInterrupt)
        if by_hand or (isinstance(stopped, SystemExit) and stopped.code == TERMINATED):
            _, command = named(options)
            kept = "" if command is None else f". {command.stopped}".rstrip(". ")
            tell(f"dynamax: stopped by {'Ctrl-C' if by_hand else 'SIGTERM'}{kept}")
        if by_hand:
            sys.exit(130)  # Lightning turns Ctrl-C into an exit of 1
        raise
    except BrokenPipeError:
        raise
    except Exception as error:
        if wants_traceback(arguments):
            raise
        code, message = verdict(error)
        tell(f"dynamax: {fault(error) if code is None else message}")
        sys.exit(1 if code is None else code)
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminated:
            signal.signal(signal.SIGTERM, before)
    sys.exit(0)


def _terminated(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what is being tidied up should be finished
    sys.exit(TERMINATED)


def wants_traceback(arguments: Sequence[str]) -> bool:
    """Whether ``--debug`` or the environment's ``DYNAMAX_DEBUG`` asks to see where an error was raised."""
    return "--debug" in [*itertools.takewhile(lambda each: each != "--", arguments)] or bool(
        os.environ.get("DYNAMAX_DEBUG")
    )


def named(options: Sequence[str]) -> tuple[str, Command | None]:
    """The command that the first words name, and where it lives; None if there is no such command."""
    first = options[0] if options else "--help"
    if (both := " ".join(options[:2])) in COMMANDS:  # such as serve cloud
        first = both
    return first, COMMANDS.get(first)


def _dispatch(options: list[str], texts: list[str]) -> None:
    first, command = named(options)
    if first in ("-h", "--help", "help"):
        print(overview())
    elif first == "--version":
        print(f"dynamax {__version__}")
    elif command is not None:
        asked = next((place for place, option in enumerate(options) if option in ("-h", "--help")), None)
        if asked is None:
            if command.begins:
                tell(f"dynamax {first}: {command.begins}")
            import_module(command.module).main([*options, *texts])
        else:
            _help(first, command, options[asked + 1 :])
    elif (group := [name for name in COMMANDS if name.startswith(f"{first} ")]) and options[1:] in HELP:
        print("\n\n".join(import_module("dynamax.commands.help").page(name, COMMANDS[name].purpose) for name in group))
    elif first.startswith("-"):
        raise UserError(f"{first} stands before a command. Write the command first: dynamax fit {first} ...")
    else:
        raise UserError(f"There is no command {first!r}.{near(first, COMMANDS)} Commands: {', '.join(COMMANDS)}.")


def _help(name: str, command: Command, asked: list[str]) -> None:
    """The page of a command; behind ``--help all`` every option, behind ``--help trainer`` those of the Trainer."""
    pages = import_module("dynamax.commands.help")
    if asked == ["all"] and name not in ("list", "info", "report"):
        import_module(command.module).main([*name.split(), "--help"])
    elif asked == ["trainer"] and name in pages.PARTS:
        print(pages.trainer(name))
    elif asked and asked != ["all"] and not asked[0].startswith("-"):
        known = ["all", *(["trainer"] if name in pages.PARTS else [])]
        raise UserError(
            f"There is no help on {asked[0]!r}. Behind --help may stand nothing, or {' or '.join(known)}; "
            f"--OPTION.help NAME shows the options of a part."
        )
    else:
        print(pages.page(name, command.purpose))


def overview() -> str:
    """The help page."""
    commands = "\n".join(f"  {name:<14}{command.purpose}" for name, command in COMMANDS.items())
    return f"""Dynamic depth (early exit) for decoder-only language models.

usage: dynamax COMMAND [-c CONFIG]... [--OPTION VALUE]...

{commands}

A later -c lies over an earlier one, and options lie over both:
  dynamax fit -c configs/demo/fit.yaml -c mine.yaml --trainer.max_epochs 12

dynamax COMMAND --help lists its options; --print_config prints all that a run would use.
--debug shows where an error was raised; --version, the version."""


def verdict(error: BaseException) -> tuple[int | None, str]:
    """Exit code and message: 2 for a mistake in what was asked, 1 for a failure around us, None for a bug.

    The parser may have wrapped the error.
    """
    if isinstance(error, UserError):
        return 2, str(error)
    if (known := around_us(error)) is not None:
        return known
    return verdict(error.__cause__) if error.__cause__ is not None else (None, "")


def fault(error: BaseException) -> str:
    """What is said of a bug: what it was, where, and what to do."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = (
        "" if trace is None else f" in {os.path.basename(trace.tb_frame.f_code.co_filename)}, line {trace.tb_lineno}"
    )
    return (
        f"this is a fault in dynamax, not in what was asked: {type(error).__name__}{place}: {shown(error)}\nPlease "
        f"report it to the project, with the command and what it prints with --debug."
    )
