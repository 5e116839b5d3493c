"""Test runs of ``DecodingModule`` on a tiny random model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from dynamax.backbones.sources import Folder
from dynamax.data.tasks import TaskData
from dynamax.heads.bank import Exit
from dynamax.heads.gates import LinearGate, MambaGate
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.policies.confidence import MaxProb
from dynamax.tasks import Questions
from dynamax.tasks.base import ChoiceExample, ChoiceTask, Task

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class TwoWays(ChoiceTask):
    """One question with two continuations."""

    headline = "first"

    def examples(self) -> list[ChoiceExample]:
        return [ChoiceExample("a", "Q: one or two?", (" one", " two"), {"mc1": {0: True, 1: False}})]

    def score_choices(self, example: Any, loglikelihoods: Any) -> dict[str, float]:  # noqa: ANN401
        return {"first": loglikelihoods[0], "second": loglikelihoods[1]}


def questions() -> Questions:
    return Questions(limit=3, max_new_tokens=12)


def module(source: Folder, *sweeps: Sweep, **options: Any) -> DecodingModule:
    exit_ = Exit(gates=[LinearGate, MambaGate])
    return DecodingModule(
        source, list(sweeps or (Sweep(MaxProb(0.5), [0.01, 0.9]),)), exits={2: exit_, 4: exit_}, **options
    )


def ran(built: DecodingModule, task: Task, *callbacks: Any, **options: Any) -> DecodingModule:
    Trainer(callbacks=list(callbacks), **{**QUIET, **options}).test(built, datamodule=TaskData(task), verbose=False)
    return built
