"""Language models to train in tests: tiny, on sentences that are easy to learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from dynamax.data.language import LanguageData, Portion
from dynamax.data.text import Corpus, Text
from dynamax.modules.pretraining import PretrainingModule
from dynamax.objectives.early_exit import LayerSkip
from tests.modules import fitting

WARNINGS = [*fitting.WARNINGS, pytest.mark.filterwarnings("ignore:Found .* in eval mode")]
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


class Sums(Corpus):
    """Sentences that are easy to learn."""

    def identity(self) -> dict[str, Any]:
        return {"source": "Sums"}

    def texts(self) -> Iterator[Text]:
        for number in range(300):
            yield Text(f"Question: what comes after {number}? Answer: {number + 1}.", str(number))


def data(folder: Path, **options) -> LanguageData:
    given = {"vocab": 300, "length": 16, "validation_blocks": 8} | options
    return LanguageData([Portion(Sums(), 4)], folder=str(folder), **given)


def module(**options) -> PretrainingModule:
    seed_everything(0, verbose=False)
    config = CONFIG | options.pop("config", {})
    given = {"exits": [1, 2], "objective": LayerSkip(), "warmup": 4} | options
    return PretrainingModule(config, **given)


def trainer(place: Path, *callbacks: Callback, steps: int = 12, **options) -> Trainer:
    given = {
        "max_steps": steps,
        "val_check_interval": 6,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": place,
        "callbacks": list(callbacks),
    }
    return Trainer(**(given | options))


def weights(trained: LightningModule) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trained.state_dict().items()}


class Start(Callback):
    """The weights that training began with."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.weights = weights(pl_module)


class Stop(Exception):
    """The power went."""


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            raise Stop
