"""A trained model is written as transformers reads it, with its recipe and its figures, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamax.backbones.sources import Folder
from dynamax.errors import UserError
from dynamax.modules.export import card
from dynamax.modules.language import TrainingLog
from tests.modules.languages import WARNINGS, Stop, data, module, trainer

pytestmark = WARNINGS


@pytest.mark.slow
def test_transformers_and_our_own_source_load_it(trained, text: Path) -> None:
    built, _, folder = trained
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([tokenizer("Question: what comes after 7?")["input_ids"]])
    ours = Folder(str(folder)).load()
    with torch.no_grad():
        wanted = built.backbone.reference(tokens)
        torch.testing.assert_close(loaded.float()(tokens).logits, wanted, atol=0.02, rtol=0.02)
        torch.testing.assert_close(ours.reference(tokens), wanted, atol=0.02, rtol=0.02)
    assert tokenizer.decode(tokens[0]) == "Question: what comes after 7?"
    assert (folder / "model.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in built.parameters()) + 10_000


@pytest.mark.slow
def test_report_and_card_tell_recipe_and_figures(trained) -> None:
    built, fitter, folder = trained
    report = json.loads((folder / "training.json").read_text())
    assert report["steps"] == 60
    assert report["tokens"] == 60 * 64
    assert report["objective"] == {"name": "LayerSkip", "weight": 1.0, "dropout": 0.1, "seed": 0}
    assert set(report["validation"]) == {"30", "60"}
    perplexity = float(fitter.callback_metrics["val/perplexity/4"])
    assert report["depths"]["4"]["perplexity"] == pytest.approx(perplexity, rel=0.01)
    assert report["curve"][0][1] > report["curve"][-1][1]
    assert [sample["sampling"] for sample in report["samples"]] == ["greedy", "temperature 0.7"]
    text = (folder / "README.md").read_text()
    assert text == card("model", report)
    assert f"{report['depths']['2']['perplexity']:.1f}" in text
    assert "Sums" in text


class Spoil(Callback):
    """Puts into one weight, after a step, what no model should have."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(pl_module.parameters()).view(-1)[0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_what_is_not_finite_is_not_written_over_what_is(text: Path, tmp_path: Path, value: float) -> None:
    """1e5 is finite, but not in float16."""
    target = tmp_path / "model"
    trainer(tmp_path, steps=1, limit_val_batches=1).fit(module(export=str(target)), datamodule=data(text))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(UserError, match="not a number"):
        trainer(tmp_path, steps=2, limit_val_batches=0, callbacks=[Spoil(2, value)]).fit(
            module(export=str(target)), datamodule=data(text)
        )
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_checkpoint_is_not_replaced_by_one_that_is_not_finite(text: Path, tmp_path: Path) -> None:
    saving = Callback()
    saving.on_train_batch_end = lambda trainer, *_: trainer.save_checkpoint(tmp_path / "one.ckpt")  # type: ignore[method-assign]
    after = [Spoil(2, float("nan")), saving]
    with pytest.raises(UserError, match="after step 2. Nothing was written"):
        trainer(tmp_path, steps=3, limit_val_batches=0, callbacks=after).fit(module(), datamodule=data(text))
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["global_step"] == 1


def test_an_export_is_replaced_and_other_folders_are_not(text: Path, tmp_path: Path) -> None:
    for steps in (1, 2):
        built = module(export=str(tmp_path / "model"))
        trainer(tmp_path, steps=steps, limit_val_batches=1).fit(built, datamodule=data(text))
        assert json.loads((tmp_path / "model" / "training.json").read_text())["steps"] == steps
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="no model of `dynamax train`"):
        trainer(tmp_path).fit(module(export=str(tmp_path / "mine")), datamodule=data(text))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_what_others_wrote_into_an_export_stays(text: Path, tmp_path: Path) -> None:
    """Checkpoints of the run itself among it."""
    folder = tmp_path / "model"
    for steps in (1, 2):
        saving = ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=1)
        built = module(export=str(folder))
        trainer(tmp_path, saving, steps=steps, limit_val_batches=1).fit(built, datamodule=data(text))
        assert list((folder / "checkpoints").iterdir())
        (folder / "notes.txt").write_text("good ones")
    assert (folder / "notes.txt").read_text() == "good ones"
    assert json.loads((folder / "training.json").read_text())["steps"] == 2


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file"):
        module(export=str(tmp_path / "file" / "model")).check(trainer(tmp_path))


def test_a_trial_run_writes_nothing(text: Path, tmp_path: Path) -> None:
    trainer(tmp_path, fast_dev_run=True).fit(module(export=str(tmp_path / "model")), datamodule=data(text))
    assert not (tmp_path / "model").exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_run_stopped_at_its_export_is_exported_when_taken_up(text: Path, tmp_path: Path, monkeypatch) -> None:
    def run(**options: object) -> None:
        saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_last=True)
        built = module(export=str(tmp_path / "model"))
        trainer(tmp_path, saving, steps=2).fit(built, datamodule=data(text), **options)

    def fail(*_: object, **__: object) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr("dynamax.modules.export.measure", fail)
        with pytest.raises(Stop):
            run()
    assert not (tmp_path / "model").exists()
    run(ckpt_path=str(tmp_path / "last.ckpt"))
    assert json.loads((tmp_path / "model" / "training.json").read_text())["steps"] == 2


def test_a_failed_export_leaves_nothing(text: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Stop

    monkeypatch.setattr("dynamax.modules.export.measure", fail)
    with pytest.raises(Stop):
        trainer(tmp_path, steps=1).fit(module(export=str(tmp_path / "model")), datamodule=data(text))
    assert list(tmp_path.iterdir()) == []


def test_a_curve_has_few_points_and_all_steps() -> None:
    record = TrainingLog()
    assert record.curve() == []
    for step in range(101):
        record.add(torch.tensor(float(step)), 2)
    curve = record.curve()
    assert len(curve) <= 40
    assert curve[0] == (3, 1.0)
    assert curve[-1] == (101, 99.5)
    assert record.tokens == 202
