"""``tune`` from YAML: text is written ahead, a model is tuned that the other commands take, mistakes are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists", "ignore:Found .* in eval mode", "ignore:.*there is no last checkpoint"
)
Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]
TUNE = """
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
    init_args: {dirpath: checkpoints, every_n_train_steps: 3, save_last: true}
model:
  class_path: TuningModule
  init_args:
    backbone: parts/backbone.yaml
    exits: [2, 4]
    adapter: {rank: 2, alpha: 4}
    loss: {class_path: ExitTuning, init_args: {dropout: 0.1}}
    export: tuned
data:
  class_path: WrittenText
  init_args:
    writer: parts/backbone.yaml
    folder: written
    validation_documents: 4
    validation: 0.5
    texts:
    - {class_path: SelfGenerated, init_args: {questions: 8, passages: 0, documents: 8, max_new_tokens: 4, batch: 4}}
"""
ARGUMENTS = ("tune", "-c", "tune.yaml")


@pytest.fixture
def prepared(place: Path) -> Path:
    (place / "tune.yaml").write_text(TUNE)
    return place


@pytest.mark.slow
def test_a_model_is_tuned_goes_on_and_has_heads_fitted_to_it(run: Run, prepared: Path) -> None:
    assert run("cache", *ARGUMENTS[1:]) == 0
    pieces = {path: path.stat().st_mtime_ns for path in (prepared / "written").rglob("*.npz")}
    assert len(pieces) == 2 + 1
    assert run(*ARGUMENTS, "--ckpt_path", "last") == 0  # there is none yet, and so it starts anew
    assert {path: path.stat().st_mtime_ns for path in (prepared / "written").rglob("*.npz")} == pieces
    (metrics,) = (prepared / "logs").rglob("metrics.csv")
    assert {"train/distil/2", "val/fidelity/4"} <= set(metrics.read_text().splitlines()[0].split(","))
    assert run(*ARGUMENTS, "--ckpt_path", "last", "--trainer.max_steps", "6") == 0
    report = json.loads((prepared / "tuned" / "tuning.json").read_text())
    assert report["steps"] == 6
    assert list(report["validation"]) == ["0", "2", "4", "6"]
    newest = str(prepared / "checkpoints" / "last.ckpt")
    assert run("validate", *ARGUMENTS[1:], "--ckpt_path", newest) == 0
    tuned = ("--model.backbone", "Tuned", "--model.backbone.folder", "tuned")
    assert run("fit", "-c", "fit.yaml", *tuned) == 0
    recorded = json.loads((prepared / "heads" / "heads.json").read_text())
    assert recorded["source"]["class"] == "Tuned"
    assert run("generate", "What?", "--heads", "heads", "--policy", "MaxProb", "--threshold", "0.1") == 0


@pytest.mark.slow
def test_every_weight_is_tuned_if_asked(run: Run, prepared: Path) -> None:
    assert run(*ARGUMENTS, "--model.adapter", "null") == 0
    assert json.loads((prepared / "tuned" / "tuning.json").read_text())["adapter"] is None
    assert (prepared / "tuned" / "model.safetensors").is_file()


CASES = {
    "another model": (["tune", "-c", "fit.yaml"], ["HeadsModule", "Use: dynamax fit"]),
    "train": (["train", *ARGUMENTS[1:]], ["TuningModule", "Use: dynamax tune"]),
    "no checkpoint": (["validate", *ARGUMENTS[1:]], ["validate was given no checkpoint"]),
    "loss": ([*ARGUMENTS, "--model.loss", "ExitTunning"], ["Did you mean ExitTuning"]),
    "weights": ([*ARGUMENTS, "--model.loss.distil", "0"], ["distil or text must be positive"]),
    "rank": ([*ARGUMENTS, "--model.adapter.rank", "0"], ["rank=0"]),
    "modules": ([*ARGUMENTS, "--model.adapter.modules", "[wq]"], ["['wq']", "q_proj"]),
    "exits": ([*ARGUMENTS, "--model.exits=[6]"], ["exits [6]", "1 to 5"]),
    "writer": ([*ARGUMENTS, "--data.writer", "SmolLM3"], ["Did you mean SmolLM2"]),
    "texts": ([*ARGUMENTS, "--data.texts", "[]"], ["no texts"]),
    "rows": ([*ARGUMENTS, "--data.rows", "0"], ["rows=0"]),
    "export": ([*ARGUMENTS, "--model.export", "parts"], ["parts exists and is no model of `dynamax tune`"]),
    "steps": ([*ARGUMENTS, "--trainer.accumulate_grad_batches", "2"], ["accumulate_grad_batches 2"]),
    "devices": ([*ARGUMENTS, "--trainer.devices", "2"], ["2 devices", "DDPStrategy", "ddp_find_unused"]),
    "text of two": (
        [*ARGUMENTS, "--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"],
        ["3 of 3 pieces of text are not in written", "dynamax cache"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_told_in_one_screen(refused: Refused, prepared: Path, case: str) -> None:
    refused(*CASES[case])
    assert not (prepared / "tuned").exists()
    assert not list(prepared.rglob("*.npz"))
