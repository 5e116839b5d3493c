"""A tiny student of a tiny teacher: it comes closer, goes on where it was stopped, and transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dynamax.backbones.sources import Folder
from dynamax.data.language import LanguageData
from dynamax.modules.distilling import DistillationModule
from dynamax.modules.export import card
from dynamax.objectives.distillation import LogitDistillation
from tests.devices import ACCELERATOR, DEVICE, missing
from tests.folders import model_folder
from tests.modules.languages import WARNINGS, Start, Stop, StopAt, data, trainer, weights

pytestmark = WARNINGS
DEPTH = 3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Folder:
    return Folder(str(model_folder(tmp_path_factory.mktemp("teacher"), depth=DEPTH)))


@pytest.fixture(scope="module")
def folder(teacher: Folder, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("text")
    text(place, teacher).prepare_data()
    return place


def text(place: Path, teacher: Folder, **options) -> LanguageData:
    return data(place, **({"vocab": None, "tokenizer": teacher} | options))


def module(teacher: Folder, **options) -> DistillationModule:
    seed_everything(0, verbose=False)
    given = {"keep": [1], "loss": LogitDistillation(), "warmup": 4, "learning_rate": 5e-3} | options
    return DistillationModule(teacher, **given)


@pytest.fixture(scope="module")
def distilled(teacher: Folder, folder: Path, tmp_path_factory):
    """Distilled for a while, and exported."""
    place = tmp_path_factory.mktemp("distilled")
    built = module(teacher, exits=[2], export=str(place / "model"), prompts=["Question: what"])
    fitter = trainer(place, steps=40, val_check_interval=20, num_sanity_val_steps=0)
    fitter.validate(built, datamodule=text(folder, teacher), verbose=False)
    before = {name: float(value) for name, value in fitter.callback_metrics.items()}
    fitter.fit(built, datamodule=text(folder, teacher))
    return built, before, fitter, place / "model"


@pytest.mark.slow
def test_it_comes_closer_to_its_teacher_on_held_out_text(distilled) -> None:
    _, before, fitter, _ = distilled
    after = {name: float(value) for name, value in fitter.callback_metrics.items()}
    assert after["val/divergence/3"] < 0.75 * before["val/divergence/3"]
    assert after["val/fidelity/3"] > before["val/fidelity/3"]
    assert {"val/divergence/2", "val/perplexity/2", "val/agreement/3", "train/divergence"} <= set(after)


@pytest.mark.slow
def test_validation_is_the_divergence_by_hand(distilled, teacher: Folder) -> None:
    built, _, fitter, _ = distilled
    theirs, lost, count = teacher.load(), 0.0, 0
    for tokens_BT in built.data.val_dataloader():
        logp, wanted = (each.reference(tokens_BT).log_softmax(-1) for each in (built.backbone, theirs))
        lost += F.kl_div(logp, wanted, log_target=True, reduction="sum").item()
        count += tokens_BT.numel()
    assert float(fitter.callback_metrics["val/divergence/3"]) == pytest.approx(lost / count, rel=1e-4)


def test_only_mixers_move_and_the_teacher_is_in_no_checkpoint(distilled, teacher: Folder) -> None:
    built, _, _, _ = distilled
    theirs = teacher.load().model.state_dict()
    mine = {name.removeprefix("backbone.model."): tensor for name, tensor in weights(built).items()}
    assert not any("_loaded" in name for name in mine)
    same = [name for name in mine if name in theirs]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"} <= set(same)
    assert all(torch.equal(mine[name], theirs[name]) for name in same)
    moved = mine["model.layers.0.mamba.in_proj.weight"][3 * 32 : 4 * 32]
    assert not torch.equal(moved, theirs["model.layers.0.self_attn.q_proj.weight"])


def test_a_student_begins_with_its_teachers_weights_as_the_teacher_holds_them(
    teacher: Folder, folder: Path, tmp_path: Path
) -> None:
    built, start = module(teacher, teacher_dtype="bfloat16"), Start()
    trainer(tmp_path, start, steps=1, limit_val_batches=0).fit(built, datamodule=text(folder, teacher))
    name = "model.layers.1.self_attn.q_proj.weight"  # a block that keeps its attention
    wanted = teacher.load().model.state_dict()[name].bfloat16().float()
    assert start.weights[f"backbone.model.{name}"].equal(wanted)


def test_every_weight_moves_if_asked(teacher: Folder, folder: Path, tmp_path: Path) -> None:
    built, start = module(teacher, trained="all"), Start()
    trainer(tmp_path, start, steps=6, limit_val_batches=0).fit(built, datamodule=text(folder, teacher))
    assert not [name for name, tensor in weights(built).items() if torch.equal(tensor, start.weights[name])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_resumed_run_ends_as_an_uninterrupted_one(teacher: Folder, folder: Path, tmp_path: Path) -> None:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_last=True)

    whole = module(teacher)
    trainer(tmp_path).fit(whole, datamodule=text(folder, teacher))
    with pytest.raises(Stop):
        trainer(tmp_path, saving(), StopAt(5)).fit(module(teacher), datamodule=text(folder, teacher))
    resumed = module(teacher, seed=99)
    trainer(tmp_path, saving()).fit(resumed, datamodule=text(folder, teacher), ckpt_path=str(tmp_path / "last.ckpt"))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, resumed.state_dict()[name], rtol=0, atol=0)
    assert resumed.record.curve() == whole.record.curve()
    other = module(teacher, keep=[0])
    with pytest.raises(ValueError, match="another keep"):
        trainer(tmp_path).fit(other, datamodule=text(folder, teacher), ckpt_path=str(tmp_path / "last.ckpt"))


def test_transformers_and_our_own_source_load_the_student(distilled) -> None:
    built, _, _, folder = distilled
    tokens = next(iter(built.data.val_dataloader()))[:2]
    with torch.no_grad():
        wanted = built.backbone.reference(tokens)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(loaded.float()(tokens).logits, wanted, atol=0.05, rtol=0.05)
    ours = Folder(str(folder)).load()
    assert (ours.spec.family, ours.spec.depth) == ("granitemoehybrid", DEPTH)
    torch.testing.assert_close(ours.reference(tokens), wanted, atol=0.05, rtol=0.05)


def test_report_and_card_tell_teacher_and_distance(distilled, teacher: Folder) -> None:
    _, _, fitter, folder = distilled
    report = json.loads((folder / "training.json").read_text())
    assert report["teacher"]["name"] == "Folder"
    assert report["teacher"]["fingerprint"] == teacher.load().spec.fingerprint
    assert report["config"]["keep"] == [1]
    assert report["trained"] == "mixers"
    distance = report["validation"]["40"]["3"]["divergence"]
    assert distance == pytest.approx(float(fitter.callback_metrics["val/divergence/3"]))
    told = (folder / "README.md").read_text()
    assert told == card("model", report)
    for words in ("distilled by `dynamax distill`", "keeps in 1 of 3 blocks", f"{distance:.4f}", "of 257 tokens"):
        assert words in told
    assert "`dynamax train`" not in told


@pytest.mark.slow
def test_a_student_without_attention_is_written_and_decoded(teacher: Folder, folder: Path, tmp_path: Path) -> None:
    """transformers' own Granite cannot count positions in a cache without attention; ours does not ask it."""
    built = module(teacher, keep=[], export=str(tmp_path / "model"), prompts=["Question:"])
    trainer(tmp_path, steps=2, limit_val_batches=1).fit(built, datamodule=text(folder, teacher))
    loaded = Folder(str(tmp_path / "model")).load()
    assert {loaded.state_kinds(block) for block in range(DEPTH)} == {("recurrent",)}
    report = json.loads((tmp_path / "model" / "training.json").read_text())
    assert all(sample["text"] for sample in report["samples"])


def test_a_checkpoint_of_another_command_is_refused(teacher: Folder) -> None:
    with pytest.raises(ValueError, match="not one of DistillationModule"):
        module(teacher).on_load_checkpoint({"pretraining": {}})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep": [7]}, "3 blocks; wanted different blocks in 0 to 2"),
        ({"keep": [0, 1, 2]}, "none is left to learn"),
        ({"exits": [3]}, "wanted different depths in 1 to 2"),
        ({"learning_rate": 0.0}, "DistillationModule was given learning_rate 0.0"),
        ({"learning_rate": float("nan")}, "DistillationModule was given learning_rate nan"),
        ({"learning_rate": float("inf")}, "DistillationModule was given learning_rate inf"),
        ({"weight_decay": float("nan")}, "weight_decay nan"),
        ({"flat": float("nan")}, "flat nan"),
    ],
)
def test_what_the_teacher_has_not_is_refused(
    teacher: Folder, folder: Path, tmp_path: Path, options: dict, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path).fit(module(teacher, **options), datamodule=text(folder, teacher))


def test_text_in_other_tokens_is_refused(teacher: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Set data.tokenizer to what"):
        trainer(tmp_path).fit(module(teacher), datamodule=text(tmp_path, teacher, tokenizer=None, vocab=300))


@pytest.mark.gpu
@missing
def test_on_a_gpu(teacher: Folder, folder: Path, tmp_path: Path) -> None:
    built = module(teacher, trained="all", teacher_dtype="bfloat16", loss=LogitDistillation(hidden=0.1))
    fitter = trainer(tmp_path, accelerator=ACCELERATOR, devices=1, precision="bf16-mixed")
    fitter.fit(built, datamodule=text(folder, teacher))
    assert built._teacher.output_matrix.device.type == DEVICE
    assert fitter.callback_metrics["val/divergence/3"].isfinite()
