"""``calibrate``: a file that ``test`` and ``generate`` take, with its promise; what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from dynamax.calibration.promise import Promise

Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]
LLAMA = Path("assets/llama").resolve()
EXITS = ("--exits", "{2: {}, 4: {}, 6: {}}")
TEXT = ("--text", "SelfGenerated", "--text.documents", "60", "--text.max_new_tokens", "16", "--text.chat", "false")
SCORE = ("--policy", "MaxProb", "--policy.threshold", "0.5")
TESTED = """
trainer:
  accelerator: cpu
  enable_progress_bar: false
  logger: false
  callbacks:
  - {{class_path: ExitFrontier, init_args: {{folder: report}}}}
model:
  class_path: DecodingModule
  init_args:
    backbone: {{class_path: Folder, init_args: {{path: {llama}}}}}
    exits: {{2: {{}}, 4: {{}}, 6: {{}}}}
    policies: [{policy}]
    timed: 1
data:
  class_path: TaskData
  init_args:
    task: {{class_path: Questions, init_args: {{limit: 4, max_new_tokens: 16}}}}
"""


def calibrate(run: Run, *options: str) -> int:
    return run("calibrate", str(LLAMA), *EXITS, *TEXT, *SCORE, *options)


def test_what_is_written_is_tested_and_generated_with(
    run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert calibrate(run, "--epsilon", "0.3", "--out", "calibrated.yaml", "--plot", "pictures/it.png") == 0
    shown = capfd.readouterr().out
    assert (tmp_path / "pictures" / "it.png").read_bytes().startswith(b"\x89PNG")
    content = yaml.safe_load((tmp_path / "calibrated.yaml").read_text())
    promise = Promise(**content["promise"])
    assert promise.text in shown
    assert f"it lost {promise.loss:.2%}" in shown
    exits = [line.split() for line in shown.splitlines() if line.startswith("   ") and "%" in line]
    assert [int(cells[0]) for cells in exits] == [2, 4, 6]
    assert {int(cells[1]) for cells in exits} == {promise.tokens}
    assert content["policy"]["class_path"] == "OnlyAt"
    levels = content["policy"]["init_args"]["policy"]["init_args"]["threshold"]
    assert sorted(levels) == content["policy"]["init_args"]["depths"]

    (tmp_path / "promised.yaml").write_text(TESTED.format(llama=LLAMA, policy="calibrated.yaml"))
    assert run("test", "-c", "promised.yaml") == 0
    shown = capfd.readouterr().out
    assert f"Promised: {promise.text}. Here: " in shown
    assert "on 4 examples" in shown

    asked = ("generate", "-c", "calibrated.yaml", "--backbone", "Folder", "--backbone.path", str(LLAMA))
    assert run(*asked, "--exits", EXITS[1], "--max_new_tokens", "4", "A kitten") == 0
    assert f"Promised: {promise.text}." in capfd.readouterr().out

    mamba = LLAMA.with_name("mamba2")
    asked = ("generate", "-c", "calibrated.yaml", "--backbone", "Folder", "--backbone.path", str(mamba))
    assert run(*asked, "--exits", EXITS[1], "--max_new_tokens", "4", "A kitten") == 2
    assert "The promise is about the model" in capfd.readouterr().err

    (tmp_path / "other.yaml").write_text(TESTED.format(llama=mamba, policy="calibrated.yaml"))
    assert run("test", "-c", "other.yaml") == 2
    assert "The promise is about the model" in capfd.readouterr().err


def test_nothing_can_be_promised(run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert calibrate(run, "--epsilon", "0.05", "--delta", "0.0001") == 0
    assert "Nothing can be promised: " in capfd.readouterr().out
    content = yaml.safe_load((tmp_path / "calibrated.yaml").read_text())
    assert content["policy"] == {"class_path": "Never"}
    assert content["promise"]["reason"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--epsilon", "1.5"), ("epsilon 1.5", "between 0 and 1")),
        (("--epsilon", "0.1", "--policy", "Patience", "--policy.patience", "2"), ("Patience", "one with a score")),
        (("--epsilon", "0.1", "--out", "nowhere/x.yaml"), ("nowhere/x.yaml cannot be written", "--out")),
        (("--epsilon", "0.1", "--plot", "x.json"), ("x.json", ".png")),
        (("--epsilon", "0.1", "--method", "magic"), ("magic", "ltt")),
        (("--epsilon", "0.1", "--policy", "GateConfidence", "--policy.threshold", "0.5"), ("gate",)),
    ],
)
def test_mistakes_are_told(refused: Refused, options: Sequence[str], named: Sequence[str]) -> None:
    refused(("calibrate", str(LLAMA), *EXITS, *TEXT, *SCORE, *options), named)


def test_a_promise_stands_beside_no_sweep(refused: Refused, tmp_path: Path) -> None:
    promise = {"level": "document", "epsilon": 0.1, "delta": 0.1, "method": "ltt", "documents": 9, "tokens": 90}
    promise |= {"loss": 0.01, "blocks": 7.0, "data": "a", "model": "b"}
    policy = {"class_path": "MaxProb", "init_args": {"threshold": 0.9}}
    text = yaml.safe_dump({"policy": policy, "promise": promise, "thresholds": [0.5]})
    (tmp_path / "both.yaml").write_text(text)
    (tmp_path / "promised.yaml").write_text(TESTED.format(llama=LLAMA, policy="both.yaml"))
    refused(
        ("test", "-c", "promised.yaml"),
        ("a promise and with thresholds [0.5]", "Leave thresholds out"),
    )
