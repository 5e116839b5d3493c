"""Runs on a tiny random model, watched by every observer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from dynamax.backbones.sources import Folder
from dynamax.data.corpora import LocalText
from dynamax.data.hidden import HiddenStates
from dynamax.data.tasks import TaskData
from dynamax.heads import Exit, LinearGate, LowRankLens, MambaGate
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.modules.heads import HeadsModule
from dynamax.modules.phases import Phase
from dynamax.objectives.gate import GateObjective
from dynamax.objectives.lens import LensDistillation
from dynamax.policies import MaxProb, Never
from dynamax.tasks import Questions
from tests.folders import model_folder

QUIET = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(str(model_folder(tmp_path_factory.mktemp("tiny"))))


def exits() -> dict[int, Exit]:
    exit_ = Exit(lens=lambda site: LowRankLens(site, rank=4), gates=[LinearGate, MambaGate])
    return {2: exit_, 4: exit_}


def evaluated(
    source: Folder, folder: Path, callbacks: Sequence[Callback], loggers: Sequence[Logger] = ()
) -> tuple[Trainer, DecodingModule]:
    """A sweep over three questions."""
    module = DecodingModule(source, [Sweep(MaxProb(0.5), [0.01, 0.9]), Sweep(Never())], exits=exits(), timed=3)
    trainer = Trainer(logger=list(loggers), callbacks=list(callbacks), default_root_dir=folder, **QUIET)
    trainer.test(module, datamodule=TaskData(Questions(limit=3, max_new_tokens=8)), verbose=False)
    return trainer, module


def trained(
    source: Folder,
    folder: Path,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger] = (),
    *,
    gates: bool = True,
    batch_size: int = 8,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[Trainer, HeadsModule]:
    """Three epochs on a few lines of text: one for the lenses, two for the gates."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Line {number} is about the number {number * number}." for number in range(24)))
    standing = exits() if gates else {2: Exit(lens=lambda site: LowRankLens(site, rank=4))}
    module = HeadsModule(
        source,
        standing,
        {"lenses": Phase(LensDistillation(candidates=None), epochs=1 if gates else None)}
        | ({"gates": Phase(GateObjective())} if gates else {}),
    )
    data = HiddenStates(
        source,
        LocalText(str(text), length=48),
        list(standing),
        folder=str(folder / "store"),
        validation=0.25,
        batch_size=batch_size,
    )
    trainer = Trainer(
        logger=list(loggers),
        callbacks=list(callbacks),
        default_root_dir=folder,
        log_every_n_steps=1,
        **QUIET,
        **{"max_epochs": 3, **options},
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module
