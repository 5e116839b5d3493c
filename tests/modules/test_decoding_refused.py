"""What ``test`` and ``predict`` refuse before anything is loaded."""

from __future__ import annotations

import pytest

from dynamax.backbones.sources import Folder
from dynamax.heads.bank import Exit
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.policies.confidence import MaxProb
from dynamax.policies.schedule import Never


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "exactly one of the two"),
        ({"heads": "a", "exits": {2: Exit()}}, "exactly one of the two"),
        ({"exits": {2: Exit()}, "policies": [Sweep(Never()), Sweep(Never())]}, "Two policies go by the name Never,"),
        ({"exits": {2: Exit()}, "policies": [Sweep(MaxProb(0.1), [0.5, 0.5])]}, "by the name MaxProb@0.5,"),
    ],
)
def test_bad_arguments_are_refused(options: dict, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        DecodingModule(Folder("not looked at"), **{"policies": [Sweep(Never())], **options})
