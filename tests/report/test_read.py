"""Folders that a page cannot be made of are refused, with what was given, what was wanted and what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamax.cli import main
from dynamax.errors import UserError
from dynamax.report.read import fit_log, read_runs
from tests.report.made import CALIBRATED, FITTED, report, run_folder


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    whole = report()
    change(whole)
    return json.dumps(whole)


DAMAGED = {
    "cut off": (json.dumps(report())[:-40], "report.json is damaged: "),
    "empty": ("", "report.json is damaged: "),
    "a list": ("[]", "holds \\[\\], and not names with values"),
    "version 1": (json.dumps(report(schema_version=1)), "the schema version 1; this release reads 2 and 3"),
    "version 4": (json.dumps(report(schema_version=4)), "the schema version 4; this release reads 2 and 3"),
    "field": (broken(lambda whole: whole["frontier"][1].pop("speed_up")), r"frontier\[1\].speed_up is missing"),
    "part": (broken(lambda whole: whole.pop("answers")), "report.json: answers is missing"),
    "type": (broken(lambda whole: whole["task"].update(examples="3")), "task.examples is 3; wanted: int"),
    "truth": (broken(lambda whole: whole["task"].update(examples=True)), "task.examples is True; wanted: int"),
    "mapping": (broken(lambda whole: whole.update(task=[])), r"task is \[\]; wanted: a mapping"),
    "rows": (broken(lambda whole: whole.update(bounds={})), "bounds is {}; wanted: a list"),
    "in a mapping": (broken(lambda whole: whole["environment"].update(torch=[1])), r"environment.torch is \[1\]"),
    "no rows": (broken(lambda whole: whole.update(frontier=[])), "frontier is empty"),
    "depth": (broken(lambda whole: whole["frontier"][1]["depth_counts"].update(x=1)), "a key of depth_counts"),
    "threshold": (broken(lambda whole: whole["frontier"][2].update(threshold={"2": "x"})), "threshold.2 is x"),
    "promise": (broken(lambda whole: whole["frontier"][2]["promise"].pop("loss")), "promise.loss is missing"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_report_is_refused(tmp_path: Path, kind: str) -> None:
    content, told = DAMAGED[kind]
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=told) as raised:
        read_runs([str(tmp_path)])
    assert "dynamax test` again" in str(raised.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="report.json is damaged"):
        read_runs([str(tmp_path)])


def test_folders_without_a_report_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no report.json.*ExitFrontier"):
        read_runs([str(tmp_path)])
    with pytest.raises(UserError, match="is no folder"):
        read_runs([str(run_folder(tmp_path / "run") / "report.json")])


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    folders = [str(run_folder(tmp_path / place / "demo")) for place in ("a", "b")]
    with pytest.raises(UserError, match=r"have the name demo.*Rename"):
        read_runs(folders)
    with pytest.raises(UserError, match="have the name demo"):
        read_runs([folders[0], folders[0] + "/."])


def test_damaged_files_beside_the_report_are_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "notes.yaml").write_text("- of no matter\n")
    (folder / "fit" / "version_0" / "metrics.csv").write_text(FITTED.replace("0.6159", "half"))
    with pytest.raises(UserError, match="metrics.csv is damaged: .*half"):
        read_runs([str(folder)])
    (folder / "fit" / "version_0" / "metrics.csv").unlink()
    for content, told in (
        (CALIBRATED + "]", "calibrated.yaml is damaged"),
        (CALIBRATED.replace("epsilon: 0.125", "epsilon: low"), "promise.epsilon is low"),
        (CALIBRATED.split("\n", 2)[2], "does not begin with its promise and its command"),
    ):
        (folder / "calibrated.yaml").write_text(content)
        with pytest.raises(UserError, match=told):
            read_runs([str(folder)])


def test_the_newest_log_with_gates_counts(tmp_path: Path) -> None:
    for version, content in enumerate((FITTED, FITTED.replace("0.6159", "0.75"), "epoch,step\n0,1\n", "")):
        place = tmp_path / f"version_{version}"
        place.mkdir()
        (place / "metrics.csv").write_text(content)
        os.utime(place / "metrics.csv", (version, version))
    found = fit_log(tmp_path)
    assert found is not None
    assert found.auroc == {"LinearGate": {2: 0.75, 4: 0.7161}}
    assert found.agreement == {2: 0.3137, 4: 0.4148}
    assert found.command is None


# -- the command --------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    return ended.value.code  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "was given no run; wanted: RUN... "),
        (["RUN", "--output", "x"], "was given --output; wanted: RUN... "),
        (["RUN", "--out"], "was given --out; wanted: RUN... "),
        (["RUN", "--out", "nowhere/report.html"], "cannot be written"),
        (["RUN", "--out", "RUN"], "cannot be written"),
        (["elsewhere"], "elsewhere was given, but it is no folder"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "RUN")
    assert run(*given) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"], "nothing is written"


def test_the_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "a")
    run_folder(tmp_path / "b")
    assert run("a", "--out=two.html", "b") == 0
    assert capsys.readouterr().out == "Wrote two.html\n"
    whole = (tmp_path / "two.html").read_text()
    assert whole.endswith("</html>\n")
    assert "dynamax report a --out=two.html b" in whole
    (tmp_path / "b" / "report.json").write_text("{")
    assert run("a", "b", "--out", "two.html") == 2
    assert (tmp_path / "two.html").read_text() == whole
    assert run("a") == 0
    assert (tmp_path / "report.html").is_file()


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    folder, out = run_folder(tmp_path / "a"), tmp_path / "page.html"
    heavy = "[n for n in ('torch', 'numpy', 'lightning', 'jsonargparse', 'matplotlib') if n in sys.modules]"
    program = f"import sys, atexit; atexit.register(lambda: print({heavy})); from dynamax.cli import main; "
    program += f"main(['report', {str(folder)!r}, '--out', {str(out)!r}])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_folder_above_runs_names_them(tmp_path: Path) -> None:
    for name in ("version_0", "version_1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no report.json. These have one: \S*version_0, \S*version_1\."):
        read_runs([tmp_path])
