"""Commands on a tiny random model, run in this process as ``dynamax`` would run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dynamax.cli import main
from tests.folders import model_folder

FIT = """
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger: {class_path: CSVLogger, init_args: {save_dir: LOGS}}
  callbacks:
  - class_path: HeadsCheckpoint
    init_args: {folder: heads}
model:
  class_path: HeadsModule
  init_args:
    backbone: parts/backbone.yaml
    exits: {2: parts/exit.yaml, 4: parts/exit.yaml}
    phases:
      lenses: {objective: LensDistillation, epochs: 1}
      gates: {objective: GateObjective}
data:
  class_path: HiddenStates
  init_args:
    text: {class_path: LocalText, init_args: {path: text.txt, length: 32}}
    folder: store
    validation: 0.25
"""
TRAINING = """
trainer:
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
data:
  class_path: LanguageData
  init_args:
    length: 16
    validation: 0.2
    validation_blocks: 4
    folder: text
    portions:
    - corpus: {class_path: LocalText, init_args: {path: sums.txt, sample_by: line}}
      rows: 2
"""
TEST = """
trainer:
  accelerator: cpu
  enable_progress_bar: false
  logger: false
  callbacks:
  - class_path: ExitFrontier
    init_args: {folder: report}
model:
  class_path: DecodingModule
  init_args:
    backbone: parts/backbone.yaml
    heads: heads
    policies:
    - {policy: {class_path: GateConfidence, init_args: {threshold: 0.5, gate: MambaGate}}, thresholds: [0.0, 1.0]}
    timed: 1
data:
  class_path: TaskData
  init_args:
    task: {class_path: Questions, init_args: {limit: 2, max_new_tokens: 4}}
"""
EXIT = """
lens: {class_path: LowRankLens, init_args: {rank: 2}}
gates: [LinearGate, MambaGate]
"""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def place(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configs, text and a model, to stand in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "backbone.yaml").write_text(f"class_path: Folder\ninit_args: {{path: {tiny_folder}}}\n")
    (tmp_path / "parts" / "exit.yaml").write_text(EXIT)
    (tmp_path / "fit.yaml").write_text(FIT.replace("LOGS", "logs"))
    (tmp_path / "test.yaml").write_text(TEST)
    (tmp_path / "training.yaml").write_text(TRAINING)
    (tmp_path / "sums.txt").write_text("\n".join(f"{n} and {n} make {2 * n} by adding." for n in range(100)))
    (tmp_path / "text.txt").write_text("\n\n".join(f"Line {n} is about {n * n}." for n in range(16)))
    return tmp_path


@pytest.fixture
def run(place: Path) -> Callable[..., int]:
    """Run one command line; its exit code."""

    def one(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return ended.value.code  # type: ignore[return-value]

    return one


@pytest.fixture
def refused(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> Callable[[Sequence[str], Sequence[str]], None]:
    """Run a command line that is a mistake, and look at how it is told: all of it in one screen."""

    def one(arguments: Sequence[str], told: Sequence[str]) -> None:
        assert run(*arguments) == 2
        message = capsys.readouterr().err.split("dynamax: ")[-1]
        assert all(words in message for words in told), message
        assert len(message) < 900
        assert "Traceback" not in message

    return one
