"""What training of heads refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch

from dynamax.heads import Exit, LinearGate, LogitLens, TunedLens
from dynamax.objectives import GateObjective, LensDistillation
from tests.modules.fitting import WARNINGS, loader, module, trainer
from tests.tiny import tiny

pytestmark = WARNINGS


def test_heads_of_another_backbone_are_refused(folder, tmp_path):
    heads = module(folder)
    run = trainer(tmp_path, epochs=3)
    run.fit(heads, loader(heads))
    run.save_checkpoint(tmp_path / "last.ckpt")
    tiny("llama", dtype=torch.float32, seed=1).save_pretrained(tmp_path / "other")
    other = module(tmp_path / "other")
    with pytest.raises(ValueError, match=heads.spec.fingerprint) as caught:
        trainer(tmp_path).validate(other, loader(other), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert other.spec.fingerprint in str(caught.value)


def test_saved_heads_that_are_not_those_asked_for_are_refused(folder, tmp_path):
    heads = module(folder)
    heads.bank.save(tmp_path / "heads", heads.spec)
    exits = {2: Exit(TunedLens, [LinearGate]), 4: Exit(TunedLens, [LinearGate])}
    with pytest.raises(ValueError, match="not those of the exits"):
        module(folder, heads=str(tmp_path / "heads"), exits=exits)
    tiny("llama", dtype=torch.float32, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"another backbone"):
        module(tmp_path / "other", heads=str(tmp_path / "heads"))


def test_several_devices_are_refused(folder, tmp_path):
    heads = module(folder)
    heads.trainer = trainer(tmp_path, devices=2)
    with pytest.raises(ValueError, match="2 devices; it runs on one"):
        heads.setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lens_objective": None}, "lenses to train, but no lens_objective"),
        ({"gate_objective": None}, "gates to train, but no gate_objective"),
        ({"exits": {2: Exit(LogitLens, [LinearGate])}}, "set lens_objective to null"),
        ({"exits": {2: Exit(TunedLens)}}, "set gate_objective to null"),
        ({"exits": {6: Exit(TunedLens)}}, "6 blocks"),
        ({"gate_objective": LensDistillation()}, "given as gate_objective, but it trains lenses. Give it as lens_obj"),
        ({"lens_objective": GateObjective()}, "given as lens_objective, but it trains gates. Give it as gate_obj"),
        ({"lens_epochs": 0}, "lens_epochs must be at least 1"),
        ({"warmup": 1.0}, r"warmup in \[0, 1\)"),
        ({"gate_share": 1.0}, r"gate_share must lie in \(0, 1\)"),
        ({"gate_learning_rate": 0.0}, "rates must be positive"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        module(folder, **options)


def test_epochs_must_be_left_for_the_gates(folder, tmp_path):
    heads = module(folder)
    with pytest.raises(ValueError, match="no epoch is left for the gates"):
        trainer(tmp_path, epochs=2).fit(heads, loader(heads))
    with pytest.raises(ValueError, match=r"Set trainer\.max_epochs"):
        trainer(tmp_path, epochs=-1).fit(heads, loader(heads))
    trainer(tmp_path, fast_dev_run=True).fit(heads, loader(heads), loader(heads, first=50))


def test_a_store_without_an_exit_is_refused(folder, tmp_path):
    heads = module(folder, exits={2: Exit(TunedLens), 3: Exit(TunedLens)}, gate_objective=None)
    with pytest.raises(ValueError, match=r"depths \[2, 4\], but exits are to be trained at \[2, 3\]"):
        trainer(tmp_path).fit(heads, loader(heads))
