"""``distill`` from YAML: a student is made that the other commands take, and mistakes are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists", "ignore:Found .* in eval mode", "ignore:.*there is no last checkpoint"
)
Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]
DISTILL = """
trainer:
  max_steps: 4
model:
  class_path: DistillationModule
  init_args:
    teacher: parts/backbone.yaml
    keep: [0, 2, 4]
    loss: LogitDistillation
    exits: [2, 4]
    export: student
data:
  class_path: LanguageData
  init_args:
    tokenizer: parts/backbone.yaml
"""
ARGUMENTS = ("distill", "-c", "training.yaml", "-c", "distill.yaml")


@pytest.fixture
def prepared(place: Path) -> Path:
    (place / "distill.yaml").write_text(DISTILL)
    return place


@pytest.mark.slow
def test_a_student_is_made_goes_on_and_has_heads_fitted_to_it(run: Run, prepared: Path) -> None:
    assert run(*ARGUMENTS, "--ckpt_path", "last") == 0  # there is none yet, and so it starts anew
    (metrics,) = (prepared / "logs").rglob("metrics.csv")
    assert "val/divergence/6" in metrics.read_text().splitlines()[0]
    assert run(*ARGUMENTS, "--ckpt_path", "last", "--trainer.max_steps", "6") == 0
    assert '"steps": 6' in (prepared / "student" / "training.json").read_text()
    assert run("fit", "-c", "fit.yaml", "--model.backbone", "Folder", "--model.backbone.path", "student") == 0


CASES = {
    "another model": (["distill", "-c", "fit.yaml"], ["HeadsModule", "Use: dynamax fit"]),
    "train": (["train", *ARGUMENTS[1:]], ["DistillationModule", "Use: dynamax distill"]),
    "fit": (["fit", *ARGUMENTS[1:]], ["DistillationModule", "Use: dynamax distill"]),
    "loss": ([*ARGUMENTS, "--model.loss", "LogitDistilation"], ["Did you mean LogitDistillation"]),
    "teacher": ([*ARGUMENTS, "--model.teacher", "SmolLM3"], ["Did you mean SmolLM2"]),
    "no teacher": ([*ARGUMENTS, "--model.teacher.path", "nope"], ["nope is not a folder"]),
    "block": ([*ARGUMENTS, "--model.keep=[6]"], ["keep [6]", "0 to 5"]),
    "both": ([*ARGUMENTS, "--data.vocab", "300"], ["vocab=300", "beside a tokenizer"]),
    "own tokens": ([*ARGUMENTS, "--data.tokenizer", "null", "--data.vocab", "280"], ["Set data.tokenizer"]),
    "export": ([*ARGUMENTS, "--model.export", "parts"], ["parts exists and is no model"]),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_told_in_one_screen(refused: Refused, prepared: Path, case: str) -> None:
    refused(*CASES[case])
    assert not (prepared / "student").exists()
