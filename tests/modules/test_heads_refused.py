"""What training of heads refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from dynamax.data.corpora import LocalText
from dynamax.data.hidden import HiddenStates
from dynamax.errors import UserError
from dynamax.heads import Exit, LinearGate, LogitLens, TunedLens
from dynamax.modules.phases import Phase
from dynamax.objectives import GateObjective, LensDistillation, Objective
from tests.modules.fitting import WARNINGS, gates, lenses, loader, module, moved, trainer, weights
from tests.tiny import tiny

pytestmark = WARNINGS
NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = [
    {"epochs": 0},
    {"epochs": 1, "steps": 1},
    {"epochs": None, "steps": 0},
    *({"learning_rate": rate} for rate in (NAN, INF, -1e-3, 0.0, 1e30)),
    *({"prompts": prompts} for prompts in ((0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (NAN, 1.0), (0.0, NAN))),
]


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
        ({"phases": gates()}, "lenses to train, but no phase trains lenses.*LensDistillation"),
        ({"phases": lenses()}, "gates to train, but no phase trains gates.*GateObjective"),
        ({"exits": {2: Exit(LogitLens, [LinearGate])}}, "The phase lenses trains lenses, but no exit has lenses"),
        ({"exits": {2: Exit(TunedLens)}}, "The phase gates trains gates, but no exit has gates"),
        ({"exits": {7: Exit(TunedLens)}}, "6 blocks"),
        ({"exits": {2: Exit(TunedLens), 6: Exit()}}, "the top, where there is nothing to train"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\)"),
        ({"warmup": NAN}, r"warmup must lie in \[0, 1\)"),
        *(({"weight_decay": decay}, "weight_decay must be a number of at least 0") for decay in (NAN, INF, -1.0)),
        *(({"phases": lenses(**option)}, "The phase lenses was given") for option in OUT_OF_RANGE),
        ({"alternate": ["lenses"]}, "Name two or more of these, each once"),
        ({"alternate": ["lenses", "lenses"]}, "Name two or more of these, each once"),
        ({"alternate": ["lenses", "others"]}, "Name two or more of these, each once"),
        ({"alternate": ["lenses", "gates"]}, "gates takes turns with others, but has no length"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        module(folder, **options)


def test_a_run_without_an_end_is_refused_and_a_trial_run_may_leave_phases_out(folder, tmp_path):
    heads = module(folder)
    with pytest.raises(UserError, match=r"Set trainer\.max_epochs"):
        trainer(tmp_path, epochs=-1).fit(heads, loader(heads))
    trainer(tmp_path, fast_dev_run=True).fit(heads, loader(heads), loader(heads, first=50))


@pytest.mark.parametrize(
    ("phases", "limits", "at_once"),
    [
        ({**lenses(epochs=2), **gates()}, {"epochs": 2}, True),
        ({**lenses(epochs=2), **gates(epochs=2)}, {"epochs": 3}, True),
        ({**lenses(epochs=2), **gates(epochs=1)}, {"epochs": 4}, True),
        ({**lenses(epochs=2), **gates(steps=1)}, {"epochs": 2}, True),
        ({**lenses(epochs=2), **gates()}, {"epochs": -1, "max_steps": 2}, True),
        ({**lenses(epochs=None, steps=5), **gates(steps=5)}, {"epochs": -1, "max_steps": 11}, True),
        ({**lenses(epochs=2), **gates()}, {"epochs": -1, "max_steps": 6}, False),
        ({**lenses(epochs=None, steps=12), **gates()}, {"epochs": 4}, False),
        ({**lenses(epochs=2), **gates(steps=7)}, {"epochs": 4}, False),
        ({**lenses(epochs=2), **gates(steps=5)}, {"epochs": 4}, False),
    ],
)
def test_phases_must_fit_into_the_training(folder, tmp_path, phases, limits, at_once):
    """What can be told without the data is told without it; the rest before the first step."""
    heads = module(folder, phases=phases)
    before = weights(heads)
    run = trainer(tmp_path, **limits)
    if at_once:
        with pytest.raises(UserError, match="Training (ends before|goes on when)"):
            heads.check(run)
    else:
        heads.check(run)
    with pytest.raises(UserError, match="Training (ends before|goes on when)"):
        run.fit(heads, loader(heads))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(heads).items())


@pytest.mark.parametrize(
    ("phases", "limits"),
    [
        ({**lenses(epochs=2), **gates(epochs=1)}, {"epochs": 3}),
        ({**lenses(epochs=2), **gates(steps=3)}, {"epochs": 3}),
        ({**lenses(epochs=None, steps=4), **gates(steps=2)}, {"epochs": 2}),
        ({**lenses(epochs=None, steps=4), **gates(steps=1)}, {"epochs": -1, "max_steps": 5}),
        ({**lenses(epochs=None, steps=4), **gates()}, {"epochs": 5, "max_steps": 5}),
    ],
)
def test_phases_that_fit_are_trained(folder, tmp_path, phases, limits):
    heads = module(folder, phases=phases)
    before = weights(heads)
    run = trainer(tmp_path, **limits)
    heads.check(run)
    run.fit(heads, loader(heads))
    assert moved(before, weights(heads)) == (True, True)


def test_without_phases_there_is_nothing_to_train(folder, tmp_path):
    heads = module(folder, exits={2: Exit(LogitLens)}, phases=None)
    with pytest.raises(UserError, match="There is nothing to train"):
        heads.check(trainer(tmp_path))


@pytest.mark.parametrize("clip", [NAN, -1.0])
def test_clipping_out_of_range_is_refused(folder, tmp_path, clip):
    with pytest.raises(UserError, match="gradient_clip_val"):
        module(folder).check(trainer(tmp_path, gradient_clip_val=clip))


@pytest.mark.parametrize(
    ("phases", "k", "depths"),
    [
        ({**lenses(), "gates": Phase(GateObjective(labels="exit-in-oracle", k=5))}, 4, [2, 4]),
        ({"lenses": Phase(LensDistillation(top=3), epochs=2), **gates()}, 2, [2, 4]),
        ({**lenses(), **gates()}, 16, [2, 3]),
    ],
)
def test_a_store_that_would_not_do_is_refused_before_it_is_filled(folder, tmp_path, phases, k, depths):
    heads = module(folder, phases=phases)
    data = HiddenStates(heads.backbone, LocalText("nowhere.txt"), depths, folder=str(tmp_path / "store"), k=k)
    with pytest.raises(UserError, match=r"the store keeps|The store keeps"):
        heads.check(trainer(tmp_path), data)
    enough = HiddenStates(heads.backbone, LocalText("nowhere.txt"), [2, 4], folder=str(tmp_path / "store"), k=5)
    heads.check(trainer(tmp_path), enough)


class Spoilt(Objective):
    """A loss, or gradients, that are no number from a step on."""

    def __init__(self, inner: Objective, step: int, what: str) -> None:
        self.inner, self.trains, self.step, self.what, self.steps = inner, inner.trains, step, what, 0

    def loss(self, bank, batch, sites):
        loss, seen = self.inner.loss(bank, batch, sites)
        if not loss.requires_grad:
            return (loss * NAN if self.what == "validation" else loss), seen
        self.steps += 1
        if self.steps > self.step and self.what == "loss":
            loss = loss * INF
        if self.steps > self.step and self.what == "gradient":
            loss.register_hook(lambda gradient: gradient * NAN)
        return loss, seen


@pytest.mark.parametrize(("what", "step"), [("loss", 9), ("gradient", 9), ("validation", 9)])
def test_what_is_not_finite_stops_the_run_at_that_step(folder, tmp_path, what, step):
    phases = {**lenses(), "late": Phase(Spoilt(GateObjective(), 2, what), learning_rate=3e-3, prompts=(0, 1))}
    heads, done = module(folder, phases=phases), []
    save = Callback()
    save.on_train_batch_end = lambda *_: done.append(weights(heads))  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=rf"step {step}, in the phase late.*phases\.late\.learning_rate, which is 0\.003"
    ):
        trainer(tmp_path, save, num_sanity_val_steps=0).fit(heads, loader(heads), loader(heads, first=50))
    assert len(done) == (9 if what == "validation" else 8)
    assert all(tensor.isfinite().all() for each in done for tensor in each.values()), "nothing that could be saved"


def test_a_store_without_an_exit_is_refused(folder, tmp_path):
    heads = module(folder, exits={2: Exit(TunedLens), 3: Exit(TunedLens)}, phases=lenses(epochs=None))
    with pytest.raises(ValueError, match=r"depths \[2, 4\], but exits are to be trained at \[2, 3\]"):
        trainer(tmp_path).fit(heads, loader(heads))
