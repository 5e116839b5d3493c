"""Data goes to stdout, all else to stderr, and a command does well whatever these two are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXITS = ("--exits", "{2: {}}", "--policy", "MaxProb", "--policy.threshold", "0.5", "--max_new_tokens", "3")
GENERATE = ("generate", "Hi", "--backbone", "parts/backbone.yaml", *EXITS)
PREDICT = ("predict", "-c", "test.yaml", "--model.heads=null", "--model.exits={2: {}}")
POLICY = "--model.policies=[{policy: {class_path: MaxProb, init_args: {threshold: 0.5}}, thresholds: []}]"


def shell(place: Path, line: str, **environment: str) -> subprocess.CompletedProcess:
    """A command line in a shell, where ``dynamax`` is this project's."""
    line = line.replace("dynamax", f"{sys.executable} -m dynamax")
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", line], cwd=place, env=known, capture_output=True, check=False)


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
DISK = "The disk is full"
LINES = {
    "closed stdout": ("dynamax list heads >&-", 0, ""),
    "closed stderr": ("dynamax list heads 2>&-", 0, ""),
    "closed stdin": ("dynamax list heads <&-", 0, ""),
    "all closed": ("dynamax list heads <&- >&- 2>&-", 0, ""),
    "full stdout": ("dynamax list heads >/dev/full", 1, DISK),
    "full stderr": ("dynamax list heads 2>/dev/full", 0, ""),
    "list to head": ("dynamax list | head -1; exit ${PIPESTATUS[0]}", 141, ""),
    "a mistake to a closed stderr": ("dynamax lisst 2>&-", 2, ""),
    "a mistake to a full stderr": ("dynamax lisst 2>/dev/full", 2, ""),
    "no home": ("unset HOME; dynamax list heads", 0, ""),
}


@pytest.mark.parametrize("case", LINES)
def test_whatever_the_streams_are(tmp_path: Path, case: str) -> None:
    line, code, told = LINES[case]
    done = shell(tmp_path, line)
    assert done.returncode == code
    assert told in done.stderr.decode()
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_text_that_ascii_has_no_room_for_is_written_with_backslashes(place: Path) -> None:
    quoted = " ".join(f"'{each}'" for each in GENERATE)
    done = shell(place, f"dynamax {quoted}", **ASCII)
    assert done.returncode == 0, done.stderr
    done.stdout.decode("ascii")


@pytest.mark.slow
def test_generate_to_a_closed_stdout_is_not_written_into_a_file(place: Path) -> None:
    """The first file that is opened would take the place of the closed descriptor."""
    quoted = " ".join(f"'{each}'" for each in GENERATE)
    done = shell(place, f"dynamax {quoted} >&-")
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.slow
def test_predict_writes_json_and_nothing_else(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*PREDICT, POLICY, "--trainer.enable_progress_bar=true") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(row) for row in rows] == [{"id", "text", "tokens", "depths"}] * 2


@pytest.mark.slow
def test_a_reader_that_leaves_in_the_middle_of_the_answers(place: Path) -> None:
    quoted = " ".join(f"'{each}'" for each in (*PREDICT, POLICY, "--data.task.limit=200"))
    done = shell(place, f"dynamax {quoted} | head -1; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 128 + signal.SIGPIPE
    assert len(done.stdout.splitlines()) == 1
    assert b"Traceback" not in done.stderr
