"""The README does what it says: its Python runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from callbacks import HeadsCheckpoint
from dynamax.cli import COMMANDS, main
from dynamax.commands.runs import DynamaxCLI
from dynamax.modules.heads import HeadsModule

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S)
LINES = [line for kind, body in BLOCKS if not kind for line in body.splitlines() if line.strip()]


def test_there_are_blocks() -> None:
    assert len(LINES) > 5


def test_python_blocks_run() -> None:
    scope: dict[str, object] = {}
    for kind, body in BLOCKS:
        if kind == "python" and "runs/demo" not in body:  # what make demo leaves
            exec(compile(body, "README.md", "exec"), scope)  # noqa: S102 - our own file
    from dynamax.testing import check_head

    check_head(scope["NormGate"])


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_targets_exist(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("line", [line for line in LINES if "dynamax" in line.split()[0]])
def test_commands_are_known_and_their_files_there(line: str) -> None:
    words = shlex.split(line)
    assert {words[1], " ".join(words[1:3])} & set(COMMANDS)
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()


@pytest.mark.slow
def test_the_file_of_ones_own_lies_over_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (text,) = [body for kind, body in BLOCKS if kind == "yaml" and body.startswith("# mine.yaml")]
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "my-model").mkdir()
    built: list[DynamaxCLI] = []
    monkeypatch.setattr(DynamaxCLI, "_run_subcommand", lambda self, _: built.append(self))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "-c", "configs/demo/fit.yaml", "-c", str(tmp_path / "mine.yaml")])
    assert ended.value.code == 0
    model, trainer = built[0].model, built[0].trainer
    assert isinstance(model, HeadsModule)
    assert vars(model.backbone)["path"] == str(tmp_path / "my-model")
    assert [each.folder for each in trainer.callbacks if isinstance(each, HeadsCheckpoint)] == [Path("runs/mine/heads")]


def words_of_a_run() -> list[str]:
    written = ("mine.yaml", "my-model", "calibrated.yaml")  # by the reader, and by another command
    runs = [line for line in LINES if line.startswith(("dynamax fit ", "dynamax test "))]
    return [line for line in runs if not any(name in line for name in written)]


@pytest.mark.parametrize("line", words_of_a_run())
def test_runs_are_built(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[DynamaxCLI] = []
    monkeypatch.setattr(DynamaxCLI, "_run_subcommand", lambda self, _: built.append(self))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line)[1:])
    assert ended.value.code == 0
    assert len(built) == 1


@pytest.mark.parametrize("command", re.findall(r"^\| `dynamax ([\w -]+)` \|", TEXT, re.M))
def test_every_command_of_the_table_is_one(command: str) -> None:
    assert command in COMMANDS


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)]+)\)", TEXT))
def test_links_lead_to_files(target: str) -> None:
    assert (ROOT / target).exists()
