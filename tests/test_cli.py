"""The command itself: light, helpful when misspelt, and honest about whose mistake an error is."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dynamax import __version__
from dynamax.cli import COMMANDS, main, verdict
from dynamax.errors import UserError, shown
from dynamax.policies import MaxProb


def code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code  # type: ignore[return-value]


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    heavy = "torch lightning transformers jsonargparse numpy"
    program = f"import sys, atexit; atexit.register(lambda: print([n for n in '{heavy}'.split() if n in sys.modules]))"
    program += "; from dynamax.cli import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert code() == 0
    assert "usage: dynamax COMMAND" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("--version") == 0
    assert capsys.readouterr().out == f"dynamax {__version__}\n"


@pytest.mark.parametrize(
    ("given", "told"),
    [("generat", "Did you mean generate?"), ("xyz", "Commands: fit, validate"), ("-c", "Write the command first")],
)
def test_a_wrong_command_is_a_usage_error(capsys: pytest.CaptureFixture[str], given: str, told: str) -> None:
    assert code(given) == 2
    assert told in capsys.readouterr().err


def stopped(_: object) -> None:
    raise KeyboardInterrupt


def stopped_in_lightning(_: object) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize("action", [stopped, stopped_in_lightning])
def test_control_c_is_130(monkeypatch: pytest.MonkeyPatch, action: object) -> None:
    monkeypatch.setattr("dynamax.commands.info.main", action)
    assert code("info") == 130


def test_sigterm_is_143_and_is_handled_as_before_afterwards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("dynamax.commands.info.main", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert code("info") == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopped by SIGTERM" in capsys.readouterr().err
    monkeypatch.setattr("dynamax.commands.info.main", lambda _: None)
    assert code("info") == 0
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_at_once_that_it_begins(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, and before anything heavy is imported."""
    told: list[str] = []

    def imported(name: str) -> SimpleNamespace:
        told.append(capsys.readouterr().err)
        return SimpleNamespace(main=lambda _: None)

    monkeypatch.setattr("dynamax.cli.import_module", imported)
    assert code(command) == 0
    (said,) = told
    assert said == "" if command == "list" else said.startswith(f"dynamax {command}: starting")
    assert capsys.readouterr() == ("", "")


def test_what_stands_behind_two_dashes_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("dynamax.commands.info.main", given.append)
    assert code("info", "--debug", "--", "--debug", "--help") == 0
    assert given == [["info", "--", "--debug", "--help"]]


@pytest.mark.parametrize("options", [["-u"], []], ids=["while it prints", "at the end"])
@pytest.mark.parametrize("command", ["--version", "list heads"])
def test_a_reader_that_went_away_ends_it_quietly(options: list[str], command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        line = [sys.executable, *options, "-m", "dynamax", *command.split()]
        done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_other_exits_keep_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamax.commands.info.main", lambda _: sys.exit(3))
    assert code("info") == 3


def test_debug_shows_where_it_was_raised() -> None:
    with pytest.raises(UserError, match="no command"):
        main(["generat", "--debug"])


def test_debug_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMAX_DEBUG", "1")
    with pytest.raises(UserError, match="no command"):
        main(["generat"])


def raised(action: object) -> Exception:
    try:
        action()  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError


def wrapped() -> None:
    try:
        MaxProb(2.0)
    except ValueError as error:
        raise TypeError("the parser gave up") from error


def test_our_value_errors_are_messages_and_others_are_bugs() -> None:
    assert verdict(raised(lambda: MaxProb(2.0)))[0] == 2
    assert verdict(raised(wrapped)) == verdict(raised(lambda: MaxProb(2.0)))
    assert verdict(raised(lambda: torch.zeros(2).view(3)))[0] is None
    assert verdict(raised(lambda: int("x")))[0] is None


def test_a_full_disk_is_a_failure_and_not_a_mistake() -> None:
    code, message = verdict(OSError(errno.ENOSPC, "No space left on device", "shard"))
    assert code == 1
    assert "The disk is full" in message
    assert verdict(OSError(errno.EIO, "odd"))[0] is None


def test_info_tells_versions_and_where_names_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("info") == 0
    shown = capsys.readouterr().out
    assert f"dynamax       {__version__}" in shown
    assert torch.__version__ in shown
    assert "dynamax list" in shown


FAULTS = {
    "a folder in the way": (lambda place: (place / "folder").mkdir() or (place / "folder").write_text(""), "folder"),
    "a name too long": (lambda place: (place / ("x" * 400)).write_text(""), "File name too long"),
    "nothing there": (lambda place: (place / "none").read_text(), "none cannot be used: No such file"),
    "a loop of links that is followed": (
        lambda place: (place / "loop").symlink_to("loop") or (place / "loop").resolve(strict=True),
        "loop",
    ),
    "no character of a path": (lambda place: (place / "a\0b").read_text(), "embedded null byte"),
    "a loop of links": (lambda place: (place / "loop").symlink_to("loop") or (place / "loop").read_text(), "loop"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_path_that_cannot_be_used_is_a_mistake(case: str, tmp_path: Path) -> None:
    action, told = FAULTS[case]
    found, message = verdict(raised(lambda: action(tmp_path)))
    assert found == 2
    assert told in message


def test_a_package_that_is_not_installed_is_told_and_ours_are_not() -> None:
    found, message = verdict(raised(lambda: importlib.import_module("no_such_package.part")))
    assert found == 2
    assert "no_such_package" in message
    assert verdict(ModuleNotFoundError("No module named 'wandb'"))[0] == 2
    assert verdict(raised(lambda: importlib.import_module("dynamax.no_such_module")))[0] is None


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])
def test_no_memory_is_a_failure_and_not_a_mistake(error: Exception) -> None:
    found, message = verdict(error)
    assert found == 1
    assert "not enough memory" in message


def test_a_fault_of_ours_is_one_line_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dynamax.commands.info.main", lambda _: [][0])
    assert code("info") == 1
    told = capsys.readouterr().err
    assert "fault in dynamax" in told
    assert "IndexError in test_cli.py" in told
    assert "--debug" in told
    with pytest.raises(IndexError):
        main(["info", "--debug"])


def test_a_long_value_is_cut_in_the_middle() -> None:
    assert shown("a\nb") == "a b"
    assert len(shown("x" * 5000)) < 200
