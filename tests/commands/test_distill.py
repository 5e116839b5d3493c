"""``distill`` from YAML: a student is made that the other commands take, and mistakes are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists", "ignore:Found .* in eval mode", "ignore:.*there is no last checkpoint"
)
Run = Callable[..., int]
DISTILL = """
trainer:
  max_steps: 4
  val_check_interval: 2
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  accelerator: cpu
  enable_checkpointing: true
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger: {class_path: CSVLogger, init_args: {save_dir: logs}}
  callbacks:
  - class_path: ModelCheckpoint
    init_args: {dirpath: checkpoints, every_n_train_steps: 2, save_last: true}
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
    length: 16
    validation: 0.2
    validation_blocks: 4
    folder: text
    portions:
    - corpus: {class_path: LocalText, init_args: {path: sums.txt, sample_by: line}}
      rows: 2
"""
ARGUMENTS = ("distill", "-c", "distill.yaml")


@pytest.fixture
def prepared(place: Path) -> Path:
    (place / "distill.yaml").write_text(DISTILL)
    (place / "sums.txt").write_text("\n".join(f"{n} and {n} make {2 * n} by adding." for n in range(100)))
    return place


def test_a_student_is_made_goes_on_and_has_heads_fitted_to_it(run: Run, prepared: Path) -> None:
    assert run(*ARGUMENTS, "--ckpt_path", "last") == 0  # there is none yet, and so it starts anew
    (metrics,) = (prepared / "logs").rglob("metrics.csv")
    assert "val/divergence/6" in metrics.read_text().splitlines()[0]
    assert run(*ARGUMENTS, "--ckpt_path", "last", "--trainer.max_steps", "6") == 0
    assert '"steps": 6' in (prepared / "student" / "training.json").read_text()
    assert run("fit", "-c", "fit.yaml", "--model.backbone", "Folder", "--model.backbone.path", "student") == 0


CASES = {
    "another model": (["distill", "-c", "fit.yaml"], ["HeadsModule", "Use: dynamax fit"]),
    "train": (["train", "-c", "distill.yaml"], ["DistillationModule", "Use: dynamax distill"]),
    "fit": (["fit", "-c", "distill.yaml"], ["DistillationModule", "Use: dynamax distill"]),
    "loss": ([*ARGUMENTS, "--model.loss", "LogitDistilation"], ["Did you mean LogitDistillation"]),
    "teacher": ([*ARGUMENTS, "--model.teacher", "SmolLM3"], ["Did you mean SmolLM2"]),
    "no teacher": ([*ARGUMENTS, "--model.teacher.path", "nope"], ["nope is not a folder"]),
    "block": ([*ARGUMENTS, "--model.keep=[6]"], ["keep [6]", "0 to 5"]),
    "both": ([*ARGUMENTS, "--data.vocab", "300"], ["vocab=300", "beside a tokenizer"]),
    "own tokens": ([*ARGUMENTS, "--data.tokenizer", "null", "--data.vocab", "280"], ["Set data.tokenizer"]),
    "export": ([*ARGUMENTS, "--model.export", "parts"], ["parts exists and is no model"]),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_told_in_one_screen(
    run: Run, prepared: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, told = CASES[case]
    assert run(*arguments) == 2
    message = capsys.readouterr().err.split("dynamax: ")[-1]
    assert all(words in message for words in told), message
    assert "Traceback" not in message
    assert not (prepared / "student").exists()
