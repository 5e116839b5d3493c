"""One command line in this process, and what may never come of it."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from dynamax.cli import main

LONGEST = 40
"""Seconds of processor time of one command; none of those here needs more than a few."""
WAITING = 600
"""Seconds in all: other work on the machine is no fault."""
LEAKS = ("<class '", "NoneType", "Namespace(", "object at 0x", "Traceback (most", "Union subtypes", "typing.")


class Outcome(NamedTuple):
    """What a command printed, and its exit code; a traceback if it raised anything else than an exit."""

    code: object
    out: str
    err: str
    raised: str = ""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what lasts longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} seconds of processor time, or {WAITING} in all")

    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome(arguments: Sequence[str]) -> Outcome:
    """Run one command line."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code: object = None
    raised = ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), at_most(LONGEST):
            main(list(arguments))
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        raised = traceback.format_exc()
    said = [each.buffer.getvalue().decode("utf-8", "replace") for each in (out, err)]  # type: ignore[attr-defined]
    return Outcome(code, said[0], said[1], raised)


def faults(found: Outcome, arguments: Sequence[str], place: Path) -> list[str]:
    """What is wrong with the outcome of a command that was run in a folder."""
    told = found.err.rsplit("dynamax: ", 1)[-1] if found.code else ""
    wrong = []
    if found.raised:
        wrong.append(f"it raised\n{found.raised}")
    elif found.code not in (0, 1, 2):
        wrong.append(f"its exit code is {found.code!r}")
    if "fault in dynamax" in found.err:
        wrong.append(f"a fault of ours: {told}")
    elif found.code and "dynamax: " not in found.err:
        wrong.append("it failed without a word")
    wrong += [f"a message leaks {leak!r}: {told}" for leak in LEAKS if leak in told]
    if len(told) > 4000:
        wrong.append(f"a message of {len(told)} characters: {told[:300]}")
    if found.code == 0 and not {"-h", "--help"} & set(arguments):
        wrong += (printed if "--print_config" in arguments else missing)(found, arguments, place)
    left = [path for pattern in ("*.part", ".partial-*") for path in place.rglob(pattern)]
    return wrong + [f"half a file was left: {path}" for path in left]


def printed(found: Outcome, arguments: Sequence[str], place: Path) -> list[str]:
    """What is wrong with a printed configuration: it is no YAML, or has another prompt than was given."""
    content = yaml.safe_load(found.out)
    if not isinstance(content, dict):
        return [f"the printed configuration is {content!r}"]
    said = arguments[-1] if "--" in arguments[:-1] else arguments[1]
    if arguments[0] == "generate" and not said.startswith("--print") and content["prompts"] != [said]:
        return [f"the prompt {said!r} became {content['prompts']!r}"]
    return []


def missing(found: Outcome, arguments: Sequence[str], place: Path) -> list[str]:
    """What a command that ended well should have left behind, and did not."""
    command = arguments[0]
    if command == "generate" and "tokens" not in found.out.rsplit("\n\n", 1)[-1] and "first token" not in found.out:
        return ["generate ended well and said nothing"]
    if command == "predict":
        rows = [json.loads(line) for line in found.out.splitlines()]
        return [] if rows else ["predict ended well without a row"]
    if command == "report" and "Wrote" not in found.out:
        return ["report ended well and wrote nothing"]
    for word in [] if any("\n" in each for each in arguments) else found.out.split("Wrote ")[1:]:
        name = word.split("\n")[0].split(" and ")[0].rpartition(" to ")[2].split(", ")[0]
        if name and not (place / name.removeprefix(" ")).exists():
            return [f"it says that it wrote {name}, which is not there"]
    return []
