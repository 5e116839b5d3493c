"""Heads that were saved decode as those that were trained; the best are told from the newest."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from callbacks import ExitAccuracy, HeadsCheckpoint
from callbacks.checkpoint import held
from dynamax.backbones.sources import Folder
from dynamax.errors import UserError
from dynamax.heads import ExitBank
from dynamax.modules.heads import HeadsModule
from dynamax.modules.phases import Phase
from dynamax.objectives import GateObjective, LensDistillation
from tests.callbacks.conftest import QUIET, evaluated, trained
from tests.folders import model_folder


def test_the_newest_heads_come_back_as_they_were(tiny_source: Folder, tmp_path: Path) -> None:
    _, module = trained(tiny_source, tmp_path, [HeadsCheckpoint(str(tmp_path / "heads"))])
    bank = ExitBank.load(tmp_path / "heads" / "last", tiny_source.load().site)
    saved, own = bank.state_dict(), module.bank.state_dict()
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name].cpu()) for name in own)
    record = json.loads((tmp_path / "heads" / "heads.json").read_text())
    assert record["fingerprint"] == module.spec.fingerprint
    assert not any("backbone" in name or "norm" in name for name in saved)


class Snapshots(Callback):
    """The heads after each validation, with a monitored figure."""

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.taken: list[tuple[float, dict[str, torch.Tensor]]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and self.monitor in trainer.callback_metrics:
            weights = {name: tensor.clone() for name, tensor in pl_module.bank.state_dict().items()}  # type: ignore[union-attr]
            self.taken.append((float(trainer.callback_metrics[self.monitor]), weights))


@pytest.mark.parametrize(("monitor", "mode"), [("val/loss/gates", "min"), ("val/loss/gates", "max")])
def test_the_best_are_those_of_the_best_monitored_figure(
    tiny_source: Folder, tmp_path: Path, monitor: str, mode: Any
) -> None:
    checkpoint = HeadsCheckpoint(str(tmp_path / "heads"), monitor=monitor, mode=mode)
    watch = Snapshots(monitor)
    trained(tiny_source, tmp_path, [checkpoint, watch], [CSVLogger(tmp_path)])
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        logged = [float(row[monitor]) for row in csv.DictReader(file) if row[monitor]]
    choose = min if mode == "min" else max
    best, heads = choose(watch.taken, key=lambda taken: taken[0])
    assert checkpoint.best == best == pytest.approx(choose(logged))
    saved = ExitBank.load(tmp_path / "heads", tiny_source.load().site).state_dict()
    assert all(torch.equal(saved[name], heads[name]) for name in heads)
    others = [weights for figure, weights in watch.taken if figure != best]
    assert others
    assert not any(all(torch.equal(saved[name], weights[name]) for name in weights) for weights in others)


def test_a_resumed_run_remembers_the_best(tiny_source: Folder, tmp_path: Path) -> None:
    first = HeadsCheckpoint(str(tmp_path / "heads"))
    trainer, _ = trained(tiny_source, tmp_path, [first])
    first.best = -1.0  # no loss is below
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    best, last = (tmp_path / "heads" / name / "heads.safetensors" for name in ("", "last"))
    before = best.read_bytes(), last.read_bytes()
    second = HeadsCheckpoint(str(tmp_path / "heads"))
    trained(tiny_source, tmp_path, [second], ckpt_path=tmp_path / "part.ckpt", max_epochs=4)
    assert second.best == -1.0
    assert best.read_bytes() == before[0]
    assert last.read_bytes() != before[1]


@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_run_stopped_in_an_epoch_goes_on_with_the_documents_that_come_next(
    tiny_source: Folder, tmp_path: Path, step: int
) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "part.ckpt")

    run, whole = trained(tiny_source, tmp_path, [Save()], batch_size=6)
    assert run.num_training_batches == 4
    _, resumed = trained(tiny_source, tmp_path, [], batch_size=6, ckpt_path=tmp_path / "part.ckpt")
    for name, tensor in whole.bank.state_dict().items():
        torch.testing.assert_close(resumed.bank.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("phases", "alternate", "figure"),
    [
        ({"a": Phase(LensDistillation()), "b": Phase(GateObjective())}, None, "val/loss/b"),
        ({"b": Phase(GateObjective(), steps=2), "a": Phase(LensDistillation(), steps=2)}, ["b", "a"], "val/loss/b"),
        ({"a": Phase(LensDistillation(), epochs=1), "c": Phase(LensDistillation())}, None, "val/loss/c"),
    ],
)
def test_the_figure_that_is_monitored_unless_told(
    tiny_source: Folder, phases: Any, alternate: list[str] | None, figure: str
) -> None:
    checkpoint = HeadsCheckpoint("nowhere")
    checkpoint.setup(Trainer(logger=False, **QUIET), HeadsModule(tiny_source, {}, phases, alternate=alternate), "fit")
    assert checkpoint.monitor == figure


def test_a_trial_run_saves_nothing_and_complains_of_nothing(tiny_source: Folder, tmp_path: Path) -> None:
    trained(tiny_source, tmp_path, [HeadsCheckpoint(str(tmp_path / "heads"))], fast_dev_run=True)
    assert not (tmp_path / "heads").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_heads_of_another_backbone_are_replaced_only_if_asked(tiny_source: Folder, tmp_path: Path) -> None:
    other = Folder(str(model_folder(tmp_path / "other", seed=1)))
    heads = tmp_path / "heads"
    trained(tiny_source, tmp_path, [HeadsCheckpoint(str(heads))])
    trained(
        tiny_source, tmp_path, [HeadsCheckpoint(str(heads))], max_epochs=2
    )  # a second run of the same is no surprise
    before = contents(heads)
    trained(other, tmp_path, [HeadsCheckpoint(str(heads))], fast_dev_run=True)
    theirs, own = (source.load().spec.fingerprint for source in (tiny_source, other))
    told = rf"another backbone, llama of 6 blocks, fingerprint {theirs}; .* fingerprint {own}.*overwrite: true"
    with pytest.raises(UserError, match=told):
        trained(other, tmp_path, [HeadsCheckpoint(str(heads))])
    assert contents(heads) == before
    trained(other, tmp_path, [HeadsCheckpoint(str(heads), overwrite=True)])
    assert json.loads((heads / "heads.json").read_text())["fingerprint"] == own


@pytest.mark.slow
def test_heads_of_other_exits_are_replaced_only_if_asked(tiny_source: Folder, tmp_path: Path) -> None:
    heads = tmp_path / "heads"
    trained(tiny_source, tmp_path, [HeadsCheckpoint(str(heads))])
    before = contents(heads)
    with pytest.raises(UserError, match=r"are of other exits.*LowRankLens.*overwrite: true"):
        trained(tiny_source, tmp_path, [HeadsCheckpoint(str(heads))], gates=False)
    assert contents(heads) == before
    trained(tiny_source, tmp_path, [HeadsCheckpoint(str(heads), overwrite=True)], gates=False)
    assert contents(heads) != before


@pytest.mark.parametrize("name", ["", "last"])
@pytest.mark.parametrize("content", [b"", b"{", b"weights of something else" * 9])
def test_weights_that_cannot_be_read_are_not_replaced(
    tiny_source: Folder, tmp_path: Path, name: str, content: bytes
) -> None:
    assert held(tmp_path) is None
    (tmp_path / "heads" / name).mkdir(parents=True)
    (tmp_path / "heads" / name / "heads.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="it cannot be told what it is"):
        trained(tiny_source, tmp_path, [HeadsCheckpoint(str(tmp_path / "heads"))])


def test_it_is_told_before_the_data_is_prepared(tiny_source: Folder, tmp_path: Path) -> None:
    _, module = trained(tiny_source, tmp_path, [HeadsCheckpoint(str(tmp_path / "heads"))])
    for callback, message in (
        (HeadsCheckpoint(str(tmp_path / "heads"), monitor="val/loss/nothing"), "val/loss/lenses, val/loss/gates"),
        (HeadsCheckpoint(str(tmp_path / "empty")), "limit_val_batches is 0"),
    ):
        limit = 0 if "limit" in message else 1.0
        trainer = Trainer(max_epochs=3, callbacks=[callback], limit_val_batches=limit, logger=False, **QUIET)
        with pytest.raises(UserError, match=message):
            module.check(trainer)


class SpoilWeights(Callback):
    """Puts a value into a weight that is not a number, once a validation of so many has passed."""

    def __init__(self, validations: int) -> None:
        self.left = validations

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.left -= not trainer.sanity_checking
        if self.left == 0:
            with torch.no_grad():
                next(pl_module.parameters()).view(-1)[0] = torch.nan


@pytest.mark.slow
@pytest.mark.parametrize("validations", [2, 3])
def test_heads_that_are_not_finite_are_never_saved(
    tiny_source: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], validations: int
) -> None:
    """Whether the run goes on after that, or was at its end."""
    heads = tmp_path / "heads"
    watch = Snapshots("val/loss/gates")
    checkpoint = HeadsCheckpoint(str(heads))
    with pytest.raises(UserError, match="infinite or not a number"):
        trained(tiny_source, tmp_path, [checkpoint, watch, SpoilWeights(validations)])
    for name in ("", "last"):
        bank = ExitBank.load(heads / name, tiny_source.load().site)
        assert all(tensor.isfinite().all() for tensor in bank.state_dict().values())
    saved, (_, first) = ExitBank.load(heads, tiny_source.load().site).state_dict(), watch.taken[0]
    assert validations > 2 or all(torch.equal(saved[name], first[name]) for name in first)
    assert (
        f"Kept: the heads with the best val/loss/gates, {checkpoint.best:.4g}, in {heads}." in capsys.readouterr().err
    )


class Figures:
    """A trainer, as far as HeadsCheckpoint looks at it."""

    sanity_checking = False
    is_global_zero = False
    fast_dev_run = False
    state: Any = type("State", (), {"fn": "fit"})()

    def __init__(self) -> None:
        self.callback_metrics: dict[str, torch.Tensor] = {}


@pytest.mark.parametrize(("mode", "best"), [("min", [5.0, 3.0, 3.0, 2.0]), ("max", [5.0, 5.0, 6.0, 6.0])])
def test_least_and_greatest(monkeypatch: pytest.MonkeyPatch, mode: Any, best: list[float]) -> None:
    monkeypatch.setattr(HeadsCheckpoint, "_save", lambda *_: None)
    checkpoint, trainer = HeadsCheckpoint("nowhere", monitor="m", mode=mode), Figures()
    for figure in (math.nan, math.inf, -math.inf):
        trainer.callback_metrics["m"] = torch.tensor(figure)
        checkpoint.on_validation_end(trainer, None)  # type: ignore[arg-type]
        assert checkpoint.best is None
    trainer.callback_metrics.clear()
    checkpoint.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert checkpoint.best is None
    for figure, expected in zip([5.0, 3.0, 6.0, 2.0], best, strict=True):
        trainer.callback_metrics["m"] = torch.tensor(figure)
        checkpoint.on_validation_end(trainer, None)  # type: ignore[arg-type]
        assert checkpoint.best == expected
        trainer.callback_metrics["m"] = torch.tensor(math.nan)
        checkpoint.on_validation_end(trainer, None)  # type: ignore[arg-type]
        assert checkpoint.best == expected


def test_a_figure_that_is_never_logged_is_told_with_those_that_are(tiny_source: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor val/nothing, which was never logged.*val/loss/gates"):
        trained(tiny_source, tmp_path, [HeadsCheckpoint(str(tmp_path / "heads"), monitor="val/nothing")])
    assert (tmp_path / "heads" / "last" / "heads.safetensors").is_file()


@pytest.mark.slow
def test_lenses_alone(tiny_source: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = HeadsCheckpoint(str(tmp_path / "heads"), monitor="val/agreement/2", mode="max")
    trained(tiny_source, tmp_path, [checkpoint, ExitAccuracy()], gates=False)
    shown = capsys.readouterr().out
    assert "Exits over held-out documents" in shown
    assert "AUROC" not in shown


def test_accuracies_shown_are_those_logged(
    tiny_source: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = trained(tiny_source, tmp_path, [ExitAccuracy()])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("exit 4"))
    figures = trainer.callback_metrics
    wanted = [f"{float(figures['val/agreement/4']):.1%}"]
    wanted += [f"{float(figures[f'val/auroc/4/{gate}']):.3f}" for gate in ("LinearGate", "MambaGate")]
    assert line.split()[2:] == wanted


@pytest.mark.slow
def test_a_decoding_module_has_no_heads_to_save(tiny_source: Folder, tmp_path: Path) -> None:
    _, module = evaluated(tiny_source, tmp_path, [])
    with pytest.raises(ValueError, match="watches the training of heads, but the model is DecodingModule"):
        HeadsCheckpoint("nowhere").setup(None, module, "fit")  # type: ignore[arg-type]
