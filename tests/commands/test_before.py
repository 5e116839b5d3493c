"""All that can be known before the work is refused before the work; a null, a number or a folder that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]
FIT = ("fit", "-c", "fit.yaml")
TEST = ("test", "-c", "test.yaml", "--model.heads=null", "--model.exits={2: {}}")
SWEEP = "--model.policies=[{policy: {class_path: MaxProb, init_args: {threshold: 0.5}}, thresholds: []}]"

NUMBERS = {
    "trainer.accumulate_grad_batches=0": "at least 1",
    "trainer.check_val_every_n_epoch=0": "at least 1",
    "trainer.num_nodes=0": "at least 1",
    "trainer.max_epochs=-5": "at least -1",
    "trainer.max_epochs=999999999999999999999": "at most 1000000000",
    "trainer.max_steps=-7": "at least -1",
    "trainer.log_every_n_steps=-1": "at least 0",
    "trainer.num_sanity_val_steps=-2": "at least -1",
    "trainer.val_check_interval=0": "more than 0",
    "trainer.val_check_interval=-3.5": "more than 0",
    "trainer.val_check_interval=words": "val_check_interval",
    "trainer.limit_train_batches=-1": "limit_train_batches",
    "trainer.limit_val_batches=-3.5": "limit_val_batches",
    "trainer.overfit_batches=-1": "overfit_batches",
    "trainer.max_time=words": "DD:HH:MM:SS",
    "trainer.devices=0": "devices",
    "trainer.devices=words": "devices",
    "trainer.accelerator=gpuu": "accelerator",
    "trainer.strategy=fast": "strategy",
    "trainer.profiler=quick": "profiler",
    "trainer.fast_dev_run=-1": "fast_dev_run",
    "seed_everything=-1": "from 0 to",
    "seed_everything=5000000000": "from 0 to",
    "model.weight_decay=-1": "weight_decay",
    "model.weight_decay=.nan": "a number",
    "model.warmup=.inf": "warmup",
    "model.phases.lenses.learning_rate=.nan": "a number",
    "model.phases.lenses.learning_rate=1e30": "learning_rate",
    "data.validation=-1": "between 0 and 1",
    "data.batch_size=null": "data.batch_size was given null; wanted: a whole number",
    "data.validation=null": "data.validation was given null; wanted: a number",
    "data.k=null": "data.k was given null; wanted: a whole number",
    "data.folder=null": "data.folder was given null; wanted: text",
    "model.weight_decay=null": "model.weight_decay was given null; wanted: a number",
    "model.weight_decay=": "weight_decay was given ''; wanted: a number",
}


@pytest.mark.parametrize("option", NUMBERS)
def test_a_number_that_cannot_be(refused: Refused, place: Path, option: str) -> None:
    refused([*FIT, f"--{option}"], [NUMBERS[option]])
    assert not (place / "store").exists()


def test_a_gpu_that_is_not_there(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused([*FIT, "--trainer.accelerator=cuda"], ["CUDA", "trainer"])


OBSTACLES = {
    "a file": lambda path: path.write_text("mine"),
    "a link to nowhere": lambda path: path.symlink_to("/nowhere/at/all"),
    "a device": lambda path: path.symlink_to("/dev/full"),
}
WRITES = {
    "store": (FIT, "data.folder"),
    "heads": (FIT, "HeadsCheckpoint"),
    "logs": (FIT, "trainer.logger"),
    "report": ((*TEST, SWEEP), "ExitFrontier"),
}


@pytest.mark.slow
@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("folder", WRITES)
def test_what_lies_where_a_folder_should_be(refused: Refused, place: Path, folder: str, obstacle: str) -> None:
    OBSTACLES[obstacle](place / folder)
    arguments, told = WRITES[folder]
    refused(arguments, [told, folder, "move away what lies there"])
    if obstacle == "a file":
        assert (place / folder).read_text() == "mine"
    assert folder == "store" or not (place / "store").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heads.json", "heads.safetensors", "last"])
def test_what_lies_where_heads_should_be(refused: Refused, place: Path, name: str) -> None:
    way = place / "heads" / name
    if name == "last":
        way.parent.mkdir()
        way.write_text("mine")
    else:
        way.mkdir(parents=True)
    refused(FIT, ["HeadsCheckpoint", name])
    assert not (place / "store").exists()


@pytest.mark.parametrize("name", ["report.json", "frontier.png"])
def test_what_lies_where_a_report_should_be(refused: Refused, place: Path, name: str) -> None:
    (place / "report" / name).mkdir(parents=True)
    refused([*TEST, SWEEP], [name, "is a folder"])


@pytest.mark.parametrize("obstacle", ["a file", "a link to nowhere"])
def test_what_lies_where_the_cache_should_be(
    refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    OBSTACLES[obstacle](place / "cache")
    monkeypatch.setenv("DYNAMAX_CACHE", str(place / "cache"))
    (place / "model.gguf").write_bytes(b"GGUF")
    refused([*FIT, "--model.backbone=model.gguf"], ["DYNAMAX_CACHE"])


@pytest.mark.parametrize("content", [b"", b"trainer: {}", b"PK\x03\x04 cut", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint(refused: Refused, place: Path, content: bytes) -> None:
    (place / "odd.ckpt").write_bytes(content)
    refused([*FIT, "--ckpt_path", "odd.ckpt"], ["odd.ckpt is no checkpoint of the trainer", "model.heads"])


def test_weights_alone_are_no_checkpoint(refused: Refused, place: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, place / "odd.ckpt")
    refused(["validate", *FIT[1:], "--ckpt_path", "odd.ckpt"], ["is no checkpoint of the trainer"])


def test_data_left_out(refused: Refused) -> None:
    refused([*FIT, "--data=null"], ["no data"])


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_whose_package_is_missing(refused: Refused) -> None:
    refused([*FIT, "--trainer.logger=WandbLogger"], ["wandb", "not installed"])


# -- a backbone by its path -------------------------------------------------------------------------


@pytest.fixture
def beside(place: Path, tiny_folder: Path) -> Path:
    (place / "models").mkdir()
    (place / "models" / "tiny").symlink_to(tiny_folder)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("given", ["models/tiny", "./models/tiny", "models/tiny/"])
def test_a_backbone_is_named_by_its_folder(run: Run, beside: Path, given: str) -> None:
    assert run("cache", *FIT[1:], "--model.backbone", given) == 0
    more = ["--exits", "{2: {}}", "--policy", "MaxProb", "--policy.threshold", "0.5", "--max_new_tokens", "2"]
    assert run("generate", "Hi", "--backbone", given, *more) == 0


@pytest.mark.slow
def test_in_a_file_a_backbone_s_folder_counts_from_that_file(run: Run, beside: Path) -> None:
    (beside / "parts" / "by_path.yaml").write_text("model: {init_args: {backbone: ../models/tiny}}\n")
    assert run("cache", *FIT[1:], "-c", "parts/by_path.yaml") == 0


def test_a_name_with_a_slash_and_no_such_folder_is_of_the_hub(
    refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    refused([*FIT, "--model.backbone", "someone/some-model"], ["someone/some-model", "no folder of that name"])


def test_a_gguf_file_is_named_by_its_path(refused: Refused, place: Path) -> None:
    refused([*FIT, "--model.backbone", "no.gguf"], ["no.gguf is not a file"])
