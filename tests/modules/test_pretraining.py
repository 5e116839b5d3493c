"""A tiny sibling from the start: it learns, and goes on where it was stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from dynamax.backbones.sources import Folder
from dynamax.modules.pretraining import PretrainingModule
from dynamax.objectives.early_exit import LayerSkip, NextToken
from tests.devices import ACCELERATOR, missing
from tests.modules.languages import WARNINGS, Start, Stop, StopAt, data, module, trainer, weights

pytestmark = WARNINGS


def test_it_learns_at_every_depth(trained) -> None:
    _, fitter, _ = trained
    found = {name: float(value) for name, value in fitter.callback_metrics.items()}
    for depth in (1, 2, 4):
        assert found[f"val/perplexity/{depth}"] < 60 < 300
        assert 0.1 < found[f"val/accuracy/{depth}"] <= 1
    assert 0.2 < found["val/agreement/1"] <= 1
    assert found["val/agreement/4"] == 1


def test_validation_is_what_transformers_says(trained, text: Path) -> None:
    built, fitter, _ = trained
    batches = list(built.data.val_dataloader())
    lost = [built.backbone.model(batch, labels=batch).loss.item() * batch[:, 1:].numel() for batch in batches]
    count = sum(batch[:, 1:].numel() for batch in batches)
    assert float(fitter.callback_metrics["val/perplexity/4"]) == pytest.approx(math.exp(sum(lost) / count), rel=1e-4)


def test_every_weight_moves(text: Path, tmp_path: Path) -> None:
    built, start = module(), Start()
    trainer(tmp_path, start, steps=6).fit(built, datamodule=data(text))
    assert not [name for name, tensor in weights(built).items() if torch.equal(tensor, start.weights[name])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("stop", [5, 10])
def test_a_resumed_run_ends_as_an_uninterrupted_one(text: Path, tmp_path: Path, stop: int) -> None:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_last=True)

    objective = {"objective": LayerSkip(dropout=0.5)}
    whole = module(**objective)
    trainer(tmp_path).fit(whole, datamodule=data(text))
    with pytest.raises(Stop):
        trainer(tmp_path, saving(), StopAt(stop)).fit(module(**objective), datamodule=data(text))
    seed_everything(99, verbose=False)
    resumed = module(**objective)
    trainer(tmp_path, saving()).fit(resumed, datamodule=data(text), ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.global_step == whole.global_step == 12
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, resumed.state_dict()[name], rtol=0, atol=0)
    assert resumed.record.tokens == whole.record.tokens == 12 * 4 * 16
    assert resumed.record.curve() == whole.record.curve()
    assert list(resumed.record.scores) == list(whole.record.scores)


@pytest.mark.parametrize(
    ("options", "other", "told"),
    [
        ({"config": {"hidden_size": 64}}, {}, "another config"),
        ({"learning_rate": 1e-4}, {}, "another optimiser"),
        ({"exits": [1]}, {}, "another exits"),
        ({"objective": NextToken()}, {}, "another objective"),
        ({}, {"length": 8}, "another text"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    text: Path, tmp_path: Path, options: dict, other: dict, told: str
) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_last=True)
    trainer(tmp_path, saving, steps=2).fit(module(), datamodule=data(text))
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path).fit(module(**options), datamodule=data(text, **other), ckpt_path=str(tmp_path / "last.ckpt"))


RECURRENT: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "shared_intermediate_size": 32,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECURRENT)
def test_mamba_and_hybrid_train_and_are_written(text: Path, tmp_path: Path, kind: str) -> None:
    sizes = {"model_type": kind, "num_hidden_layers": 4, "hidden_size": 32, "tie_word_embeddings": True}
    seed_everything(0, verbose=False)
    config = {**sizes, "initializer_range": 0.02, **RECURRENT[kind]}
    built = PretrainingModule(
        config, [1, 2], LayerSkip(), warmup=4, export=str(tmp_path / "model"), prompts=["Question"]
    )
    trainer(tmp_path, steps=40, val_check_interval=20).fit(built, datamodule=data(text))
    curve = built.record.curve()
    assert curve[-1][1] < curve[0][1] - 1
    report = json.loads((tmp_path / "model" / "training.json").read_text())
    found = report["validation"]["40"]["4"]["perplexity"]
    assert report["depths"]["4"]["perplexity"] == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"exits": [0]}, "different depths in 1 to 3"),
        ({"exits": [4]}, "different depths in 1 to 3"),
        ({"exits": [2, 2]}, "different depths"),
        ({"exits": []}, "different depths"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"flat": 1.5}, "flat 1.5"),
        ({"config": {"model_type": "lama"}}, "lama"),
        ({"config": {"hidden_sise": 3}}, "no hidden_sise"),
        ({"config": {"num_attention_heads": 5}}, "was refused"),
        ({"config": {"num_hidden_layers": 1}}, "no place for exits"),
        ({"config": {"attention_dropout": 0.5}}, "without dropout"),
        ({"config": {"vocab_size": 1000}}, "come from the tokenizer"),
        ({"prompts": ["Question", " "]}, "hold an empty one"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        module(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 0}, "no step to train"),
        ({"limit_train_batches": 0}, "no step to train"),
        ({"accumulate_grad_batches": 2}, "counts a batch as a step"),
    ],
)
def test_a_run_that_could_not_end_well_is_refused(text: Path, tmp_path: Path, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, **options).fit(module(), datamodule=data(text))


@pytest.mark.parametrize("wrong", [{"hidden_act": "nope"}, {"num_attention_heads": 4, "num_key_value_heads": 3}])
def test_a_model_that_cannot_run_is_refused_before_texts_are_read(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match="was refused"):
        module(config=wrong).check(trainer(tmp_path))


def test_a_compiler_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="no-such-compiler is not installed"):
        module(compile=True).check(trainer(tmp_path))


def test_a_loss_that_is_no_number_ends_the_run(text: Path, tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_) -> None:
            next(pl_module.parameters()).data.fill_(float("nan"))

    with pytest.raises(ValueError, match="Lower model.learning_rate"):
        trainer(tmp_path, Poison()).fit(module(export=str(tmp_path / "model")), datamodule=data(text))
    assert not (tmp_path / "model").exists()


def test_a_configuration_needs_its_type() -> None:
    with pytest.raises(ValueError, match="no model_type"):
        PretrainingModule({"hidden_size": 3}, [1], NextToken())


def test_blocks_must_fit_the_context_and_training_must_end(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="context holds 8"):
        trainer(tmp_path).fit(module(config={"max_position_embeddings": 8}), datamodule=data(text))
    with pytest.raises(ValueError, match=r"Set trainer.max_steps"):
        trainer(tmp_path, steps=-1, max_epochs=-1).fit(module(), datamodule=data(text))


def test_blocks_are_compiled_if_asked(text: Path, tmp_path: Path, monkeypatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    built = module(compile=True)
    trainer(tmp_path, steps=1, limit_val_batches=0).fit(built, datamodule=data(text))
    assert compiled == list(built.backbone.model.base_model.layers)


def test_vectors_do_not_decay(text: Path, tmp_path: Path) -> None:
    built = module()
    fitter = trainer(tmp_path, steps=1)
    fitter.fit(built, datamodule=data(text))
    matrices, vectors = fitter.optimizers[0].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(built.parameters()))
    assert matrices["betas"] == (0.9, 0.95)


@pytest.mark.gpu
@missing
def test_on_a_gpu(text: Path, tmp_path: Path) -> None:
    built = module(export=str(tmp_path / "model"), prompts=["Question:"])
    trainer(tmp_path, accelerator=ACCELERATOR, devices=1, precision="bf16-mixed").fit(built, datamodule=data(text))
    assert math.isfinite(built.record.curve()[-1][1])
    assert Folder(str(tmp_path / "model")).load().spec.depth == 4
