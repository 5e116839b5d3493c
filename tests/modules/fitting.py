"""Heads to train in tests, on a tiny backbone and stored states that are made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from dynamax.backbones.sources import Folder
from dynamax.data.batch import HiddenBatch
from dynamax.heads import Exit, LinearGate, MambaGate, TunedLens
from dynamax.modules.heads import HeadsModule
from dynamax.modules.phases import Phase
from dynamax.objectives import GateObjective, LensDistillation
from tests.objectives.batches import made

WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning 2.6 beside torch 2.13
]
DEPTHS = (2, 4)


def lenses(**options) -> dict[str, Phase]:
    return {"lenses": Phase(LensDistillation(candidates=16), **({"epochs": 2} | options))}


def gates(**options) -> dict[str, Phase]:
    return {"gates": Phase(GateObjective(), **options)}


def module(folder: Path, **options) -> HeadsModule:
    """Tuned lenses, linear gates, and a Mamba gate at the deeper exit; the same weights every time."""
    linear = [LinearGate]
    exits = {
        2: Exit(TunedLens, linear),
        4: Exit(TunedLens, [*linear, lambda site: MambaGate(site, width=16, headdim=8)]),
    }
    built = HeadsModule(Folder(str(folder)), **({"exits": exits, "phases": {**lenses(), **gates()}} | options))
    seed_everything(0, verbose=False)
    built.configure_model()
    return built


def batches(heads: HeadsModule, number: int = 3, first: int = 0) -> list[HiddenBatch]:
    sites = {depth: heads._top[0].site(depth) for depth in DEPTHS}
    return [made(sites, seed=first + i, first=3 * (first + i), lengths=(9, 8, 6)) for i in range(number)]


def loader(heads: HeadsModule, number: int = 3, first: int = 0) -> DataLoader:
    return DataLoader(batches(heads, number, first), batch_size=None)


class Resumable:
    """Batches in one order; a run that goes on in the middle of an epoch goes on with the next of them."""

    def __init__(self, given: list[HiddenBatch]) -> None:
        self.batches, self.drawn = given, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[HiddenBatch]:
        for place in range(self.drawn % len(self), len(self)):
            self.drawn += 1
            yield self.batches[place]

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def trainer(tmp_path: Path, *callbacks: Callback, epochs: int = 4, **options) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"accelerator": "cpu"} | options),
    )


def weights(heads: HeadsModule) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in heads.bank.state_dict().items()}


class Watch(Callback):
    """Notes the weights and the modes at the end of each epoch, and the scores."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.training: list[dict[str, bool]] = []
        self.scores: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append(weights(pl_module))
        self.training.append({name: head.training for name, head in pl_module.bank.named_modules()})

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.scores.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> tuple[bool, bool]:
    """Whether all lenses moved, and all gates; fails where only some did."""
    kinds = []
    for kind in ("lens.", "gates."):
        changed = {not torch.equal(before[name], after[name]) for name in before if f".{kind}" in name}
        assert len(changed) == 1, f"some {kind} moved, and some did not"
        kinds.append(changed.pop())
    return kinds[0], kinds[1]
