"""What ``test`` and ``predict`` refuse before anything is loaded."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer

from dynamax.backbones.sources import Folder
from dynamax.data.tasks import TaskData
from dynamax.errors import UserError
from dynamax.heads.bank import Exit
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.policies.confidence import MaxProb
from dynamax.policies.schedule import Never
from dynamax.tasks import Questions


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "exactly one of the two"),
        ({"heads": "a", "exits": {2: Exit()}}, "exactly one of the two"),
        ({"exits": {2: Exit()}, "policies": [Sweep(Never()), Sweep(Never())]}, "Two policies go by the name Never,"),
        ({"exits": {2: Exit()}, "policies": [Sweep(MaxProb(0.1), [0.5, 0.5])]}, "by the name MaxProb@0.5,"),
        ({"exits": {2: Exit()}, "timed": -1}, "DecodingModule was given timed=-1; wanted 0 or more"),
    ],
)
def test_bad_arguments_are_refused(options: dict, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        DecodingModule(Folder("not looked at"), **{"policies": [Sweep(Never())], **options})


def test_predict_without_a_policy_is_refused() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module = DecodingModule(Folder("not looked at"), [], exits={2: Exit()})
    with pytest.raises(UserError, match="the first of model.policies, but none was given. Give one"):
        trainer.predict(module, datamodule=TaskData(Questions(limit=1)))
