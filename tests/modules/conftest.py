"""A backbone to train heads on; a text to train a language model on, and one trained on it and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from dynamax.modules.pretraining import PretrainingModule
from tests.modules.languages import data, module, trainer
from tests.tiny import tiny


@pytest.fixture(scope="package")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("backbone")
    tiny("llama", dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="package")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    data(folder).prepare_data()
    return folder


@pytest.fixture(scope="package")
def trained(text: Path, tmp_path_factory) -> tuple[PretrainingModule, Trainer, Path]:
    """Trained for a while, and exported."""
    place = tmp_path_factory.mktemp("trained")
    built = module(export=str(place / "model"), prompts=["Question: what"])
    fitter = trainer(place, steps=60, val_check_interval=30)
    fitter.fit(built, datamodule=data(text))
    return built, fitter, place / "model"
