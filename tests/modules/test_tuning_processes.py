"""Two processes tune what one process tunes: the same losses, one adapter, written once, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from dynamax.backbones.sources import Folder
from dynamax.modules.adapter import LowRank
from dynamax.modules.tuning import TuningModule
from dynamax.objectives.tuning import ExitTuning
from tests.folders import model_folder
from tests.modules.languages import WARNINGS, trainer
from tests.modules.processes import STEPS, STRATEGIES, both, text, tune

pytestmark = [*WARNINGS, pytest.mark.slow]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """One process has tuned, and then two have, in every way."""
    folder = tmp_path_factory.mktemp("processes")
    model_folder(folder / "base", depth=4)
    text(folder).write_all()
    one = tune(folder, "one")
    torch.save({"losses": [float(loss) for loss in one.record.losses], "tokens": one.record.tokens}, folder / "one.pt")
    assert both(folder) == [0, 0]
    return folder


@pytest.mark.parametrize("run", [f"{name}{how}" for name in STRATEGIES for how in ("", "-resumed")])
def test_two_processes_tune_what_one_tunes(place: Path, run: str) -> None:
    one, (first, second) = torch.load(place / "one.pt"), (torch.load(place / f"{run}-{rank}.pt") for rank in range(2))
    assert len(one["losses"]) == STEPS
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert {name: first[name] for name in ("losses", "tokens", "scores")} == {
        name: second[name] for name in ("losses", "tokens", "scores")
    }
    assert first["tokens"] == one["tokens"]
    written, wanted = (load_file(place / name / "model" / "adapter_model.safetensors") for name in (run, "one"))
    assert written.keys() == wanted.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=5e-3, atol=1e-4)
    report, alone = (json.loads((place / name / "model" / "tuning.json").read_text()) for name in (run, "one"))
    assert report["measured"] == alone["measured"] == "these files"
    assert report["after"]["1"]["loss"] == pytest.approx(alone["after"]["1"]["loss"], rel=1e-3)


STRANGE = {
    "no strategy": ({}, "auto", "DDPStrategy, which does not suit"),
    "ddp": ({}, "ddp", "ddp_find_unused_parameters_true"),
    "every weight in shards": ({"adapter": None}, STRATEGIES["fsdp"](), "Give an adapter and no heads"),
    "heads in shards": ({"heads": "heads"}, STRATEGIES["fsdp"](), "Give an adapter and no heads"),
    "tensors in parallel": ({}, ModelParallelStrategy(1, 2), "checkpoints that one process can read"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_processes_could_not_do_together_is_refused(case: str, tmp_path: Path) -> None:
    options, strategy, told = STRANGE[case]
    given = {"adapter": LowRank(2, 4.0), "loss": ExitTuning()} | options
    module = TuningModule(Folder("nowhere"), [1], **given)
    with pytest.raises(ValueError, match=told):
        module.check(trainer(tmp_path, strategy=strategy, devices=2))


def test_blocks_are_sharded_under_fsdp_and_whole_under_ddp(place: Path) -> None:
    shares = {name: [torch.load(place / f"{name}-{rank}.pt")["share"] for rank in range(2)] for name in STRATEGIES}
    assert shares["ddp"] == [1, 1]
    assert shares["fsdp"] == pytest.approx([0.5, 0.5], abs=0.05)
