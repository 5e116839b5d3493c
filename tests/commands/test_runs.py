"""``fit``, ``validate``, ``test``, ``predict`` and ``cache`` from YAML, end to end on a tiny model."""

from __future__ import annotations

import csv
import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dynamax.modules.phases import EPOCHS

Run = Callable[..., int]
TRAINERS = Path(__file__).parents[2] / "configs" / "trainer"

TURNS = """
model:
  init_args:
    phases:
      warmup: {objective: LensDistillation, epochs: 1}
      gates: {steps: 1, prompts: [0, 0.5]}
      lenses: {epochs: null, steps: 2, learning_rate: 1e-3, prompts: [0.5, 1]}
    alternate: [gates, lenses]
"""


@pytest.fixture
def fitted(run: Run, place: Path) -> Path:
    assert run("fit", "-c", "fit.yaml") == 0
    return place


def rows(place: Path) -> list[tuple[str, float | None]]:
    report = json.loads((place / "report" / "report.json").read_text())
    return [(row["policy"], row["threshold"]) for row in report["frontier"]]


@pytest.mark.slow
def test_fit_then_test_leaves_heads_report_and_picture(run: Run, fitted: Path) -> None:
    assert {path.name for path in (fitted / "heads").iterdir()} == {"heads.safetensors", "heads.json", "last"}
    assert run("test", "-c", "test.yaml") == 0
    report = json.loads((fitted / "report" / "report.json").read_text())
    assert report["frontier"][0]["policy"] == "Full"
    assert report["decoding"]["heads"] == "heads"  # what lies here is named from here: a report is passed on
    assert [exit_["depth"] for exit_ in report["exits"]] == [2, 4]
    first = report["frontier"][1]
    assert first["blocks_per_token"] == 2  # a threshold of 0 leaves at the first exit
    assert (fitted / "report" / "frontier.png").stat().st_size > 10_000


@pytest.mark.slow
def test_report_makes_a_page_of_what_fit_and_test_left(
    run: Run, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into the folder of the report, as the demo's runs log."""
    command = ["test", "-c", "test.yaml", "--model.timed", "2"]
    assert run(*command) == 0
    (fitted / "logs").rename(fitted / "report" / "fit")
    assert run("report", "report", "--out", "page.html") == 0
    assert capsys.readouterr().out.endswith("Wrote page.html\n")
    page = (fitted / "page.html").read_text()
    report = json.loads((fitted / "report" / "report.json").read_text())
    assert report["command"] == "dynamax test -c test.yaml --model.timed 2"
    assert report["command"] in page
    assert "dynamax fit -c report/fit/" in page
    assert page.count("Not here: ") == 1, "nothing was promised"
    for row in (*report["frontier"], *report["bounds"]):
        assert f">{100 * row['agreement']:.1f} %<" in page
        assert f">{100 * row['bytes_fraction']:.1f} %<" in page
    for row in report["reliability"]:
        assert f">{row['brier']:.3f}<" in page


@pytest.mark.slow
def test_a_second_fit_uses_the_store_that_is_there(run: Run, fitted: Path) -> None:
    (before,) = (fitted / "store").glob("*/shard-*")
    written = before.stat().st_mtime_ns
    assert run("fit", "-c", "fit.yaml", "--model.phases.lenses.learning_rate", "1e-4") == 0
    assert before.stat().st_mtime_ns == written


@pytest.mark.slow
def test_validate_scores_the_heads_that_fit_left(run: Run, fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (log,) = (fitted / "logs").rglob("metrics.csv")
    with log.open() as file:
        last = [row for row in csv.DictReader(file) if row["val/agreement/4"]][-1]
    columns = ("val/agreement/4", "val/auroc/4/LinearGate", "val/auroc/4/MambaGate")
    wanted = [f"{float(last[columns[0]]):.1%}", *(f"{float(last[name]):.3f}" for name in columns[1:])]
    capsys.readouterr()
    assert run("validate", "-c", "fit.yaml", "--model.heads", "heads/last", "--trainer.callbacks", "ExitAccuracy") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("exit 4"))
    assert line.split()[2:] == wanted


@pytest.mark.slow
def test_validate_refuses_fresh_heads(run: Run, fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", "-c", "fit.yaml") == 2
    assert "no trained heads" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trainer_that_leaves_the_gates_no_epoch_is_refused_before_the_store_is_filled(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "-c", "fit.yaml", "--trainer.max_epochs", "1") == 2
    assert (
        "Training ends before every phase had its turn: the phases are lenses 1 epochs, gates the rest"
        in capsys.readouterr().err
    )
    assert not (place / "store").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model.phases.gates.learning_rate", ".nan"], "learning_rate was given .nan; wanted: a number"),
        (["--model.phases.lenses.learning_rate", ".inf"], "The phase lenses was given"),
        (["--model.phases.lenses.prompts", "[0.5, 0.1]"], "The phase lenses was given"),
        (["--model.weight_decay", ".nan"], "weight_decay was given .nan; wanted: a number"),
        (["--model.phases.lenses.objective.top", "40"], "The objective of the phase lenses, LensDistillation, reads"),
        (["--trainer.max_steps", "1"], "Training ends before every phase had its turn"),
        (["--trainer.gradient_clip_val", "nan"], "gradient_clip_val"),
        (["--trainer.limit_val_batches", "0"], "limit_val_batches is 0"),
        (["--model.alternate", "[gates, lens]"], "Name two or more of these"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_store_is_filled(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert run("fit", "-c", "fit.yaml", *options) == 2
    assert told in capsys.readouterr().err
    assert not (place / "store").exists()


@pytest.mark.slow
def test_cache_does_not_fill_a_store_that_training_could_not_use(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("cache", "-c", "fit.yaml", "--data.k", "2") == 2
    assert "reads 4 tokens of a position, but the store keeps 2" in capsys.readouterr().err
    assert not (place / "store").exists()


@pytest.mark.slow
def test_heads_of_others_are_not_replaced_and_nothing_is_prepared(
    run: Run, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (fitted / "heads").rglob("*") if path.is_file()}

    before = contents()
    other = ["--model.exits={2: {gates: [LinearGate]}}", "--model.phases={gates: {}}", "--data.folder", "elsewhere"]
    assert run("fit", "-c", "fit.yaml", *other) == 2
    assert "are of other exits" in capsys.readouterr().err
    assert not (fitted / "elsewhere").exists()
    assert contents() == before


@pytest.mark.slow
def test_phases_take_turns_from_yaml(run: Run, place: Path) -> None:
    (place / "turns.yaml").write_text(TURNS)
    assert run("fit", "-c", "fit.yaml", "-c", "turns.yaml", "--trainer.max_epochs", "4") == 0
    (log,) = (place / "logs").rglob("metrics.csv")
    with log.open() as file:
        columns = next(csv.reader(file))
    assert {"val/loss/gates", "val/loss/warmup", "val/loss/lenses"} <= set(columns)
    (config,) = (place / "logs").rglob("config.yaml")
    written = yaml.safe_load(config.read_text())["model"]["init_args"]
    assert list(written["phases"]) == ["warmup", "gates", "lenses"]
    assert written["phases"]["gates"]["steps"] == 1


@pytest.mark.slow
def test_several_devices_are_refused_before_the_store_is_filled(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "-c", "fit.yaml", "--trainer.devices", "2") == 2
    assert "2 devices; it runs on one" in capsys.readouterr().err
    assert not (place / "store").exists()


SEVERAL = {"ddp.yaml", "fsdp.yaml"}
"""For ``tune`` on several GPUs."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({path.name for path in TRAINERS.glob("*.yaml")} - SEVERAL))
def test_the_trainers_that_come_with_the_project_train_as_many_epochs_as_the_demo_needs(
    run: Run, place: Path, name: str
) -> None:
    demo = yaml.safe_load((TRAINERS.parent / "demo" / "fit.yaml").read_text())["model"]["init_args"]["phases"]
    assert "epochs" not in demo["lenses"]
    trainer = ["--trainer", str(TRAINERS / name), "--trainer.log_every_n_steps", "1"]
    assert run("fit", "-c", "fit.yaml", *trainer, "--model.phases.lenses.epochs", str(EPOCHS)) == 0
    assert not (place / "heads").exists()


@pytest.mark.slow
def test_control_c_while_training_is_130(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamax.modules.heads.HeadsModule.training_step", stopped)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert run("fit", "-c", "fit.yaml") == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores further ones


@pytest.mark.slow
def test_a_trial_run_of_fit_leaves_no_heads(run: Run, place: Path) -> None:
    assert run("fit", "-c", "fit.yaml", "--trainer.fast_dev_run", "true") == 0
    assert not (place / "heads").exists()


@pytest.mark.slow
def test_what_the_command_line_says_wins(run: Run, fitted: Path) -> None:
    """Law 6: options over the later file, the later file over the earlier one."""
    policy = {"class_path": "AtDepth", "init_args": {"depth": 2}}
    later = {"model": {"init_args": {"policies": [{"policy": policy, "thresholds": []}]}}}
    (fitted / "later.yaml").write_text(yaml.safe_dump(later))
    assert run("test", "-c", "test.yaml", "-c", "later.yaml") == 0
    assert rows(fitted) == [("Full", None), ("AtDepth", 2)]
    policies = "[{policy: {class_path: MaxProb, init_args: {threshold: 0.5}}, thresholds: [0.25, 0.75]}]"
    assert run("test", "-c", "test.yaml", "-c", "later.yaml", f"--model.policies={policies}") == 0
    assert rows(fitted) == [("Full", None), ("MaxProb", 0.25), ("MaxProb", 0.75)]


@pytest.mark.slow
def test_the_saved_config_is_the_record_of_the_run(run: Run, fitted: Path) -> None:
    (record,) = (fitted / "logs").rglob("config.yaml")
    saved = yaml.safe_load(record.read_text())
    assert saved["model"]["init_args"]["backbone"]["class_path"].endswith("Folder")
    assert set(saved["model"]["init_args"]["exits"]) == {"2", "4"}
    assert run("fit", "-c", str(record), "--print_config") == 0


SHOWN = ["--trainer.enable_progress_bar", "true"]


@pytest.mark.slow
def test_test_tells_examples_done_and_what_runs_on_stderr_without_a_carriage_return(
    run: Run, fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamax.progress.monotonic", itertools.count(step=60).__next__)
    capsys.readouterr()
    assert run("test", "-c", "test.yaml", *SHOWN) == 0
    shown = capsys.readouterr()
    assert "\r" not in shown.err
    lines = [line for line in shown.err.splitlines() if line.startswith("Testing")]
    assert any("1/2" in line and "GateConfidence(MambaGate)@1.0" in line for line in lines), lines
    assert "2/2" in lines[-1]
    assert "Testing" not in shown.out


@pytest.mark.slow
def test_fit_tells_few_lines_in_a_log(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "-c", "fit.yaml", *SHOWN) == 0
    shown = capsys.readouterr()
    assert "\r" not in shown.out + shown.err
    assert {line.split()[0] for line in shown.err.splitlines() if "|" in line} == {"store", "Training:", "Epoch"}
    assert len(shown.err.splitlines()) < 20


@pytest.mark.slow
def test_a_bar_that_is_given_is_the_only_one(run: Run, fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("test", "-c", "test.yaml", *SHOWN, "--trainer.callbacks", "TQDMProgressBar") == 0
    shown = capsys.readouterr()
    assert "Testing" in shown.out
    assert "Testing" not in shown.err


@pytest.mark.slow
def test_predict_prints_a_line_of_json_for_each_example(
    run: Run, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    options = ["--trainer.callbacks", "null", "--data.task.limit", "2", "--trainer.enable_progress_bar", "true"]
    assert run("predict", "-c", "test.yaml", *options) == 0
    printed = capsys.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    assert "Predicting" in printed.err
    assert len(answers) == 2
    assert all(len(answer["depths"]) == len(answer["tokens"]) <= 4 for answer in answers)


@pytest.mark.slow
def test_cache_fills_the_store_and_trains_nothing(run: Run, place: Path) -> None:
    assert run("cache", "-c", "fit.yaml") == 0
    assert len(list((place / "store").glob("*/shard-*"))) == 1
    assert not (place / "heads").exists()


@pytest.mark.slow
def test_print_config_is_whole_and_comes_back(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("test", "-c", "test.yaml", "--print_config") == 0
    printed = capsys.readouterr().out
    (place / "printed.yaml").write_text(printed)
    assert run("test", "-c", "printed.yaml", "--print_config") == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("command", ["fit", "cache", "generate"])
def test_help_of_a_command(run: Run, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "--config" in shown
    assert f"usage: dynamax {command} " in shown
