"""Heads are trained in two phases, scored, resumed, and taken up again."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from dynamax.heads import Exit, LastBlockLens, LinearGate, LogitLens, TunedLens
from dynamax.modules.phases import resting, share
from dynamax.objectives import GateObjective, LensDistillation, Objective
from tests.modules.fitting import DEPTHS, WARNINGS, Watch, loader, module, moved, trainer, weights
from tests.objectives.batches import made, toy_sites

pytestmark = WARNINGS


def test_lenses_train_first_and_then_the_gates(folder, tmp_path):
    heads, watch = module(folder), Watch()
    start = weights(heads)
    trainer(tmp_path, watch).fit(heads, loader(heads), loader(heads, first=50))
    assert [moved(a, b) for a, b in zip([start, *watch.weights], watch.weights, strict=False)] == [
        (True, False),
        (True, False),
        (False, True),
        (False, True),
    ]
    for epoch, modes in enumerate(watch.training):
        assert modes["exits.2.lens"] is (epoch < 2)
        assert modes["exits.4.gates.MambaGate"] is (epoch >= 2)


def test_validation_tells_agreement_and_then_auroc(folder, tmp_path):
    heads, watch = module(folder), Watch()
    trainer(tmp_path, watch).fit(heads, loader(heads), loader(heads, first=50))
    lens_epoch, gate_epoch = watch.scores[1], watch.scores[3]
    assert {"val/agreement/2", "val/agreement/4", "val/loss/lenses"} <= set(lens_epoch)
    assert not any("auroc" in name for name in lens_epoch)
    gates = {"val/auroc/2/LinearGate", "val/auroc/4/LinearGate", "val/auroc/4/MambaGate"}
    assert gates | {"val/positive/2", "val/positive/4", "val/loss/gates"} <= set(gate_epoch)
    assert gate_epoch["val/agreement/4"] == lens_epoch["val/agreement/4"]
    assert gate_epoch["val/positive/4"] == pytest.approx(gate_epoch["val/agreement/4"])
    assert {name for name in gate_epoch if name.startswith("train/")} >= {"train/loss", "train/bce/4/MambaGate"}


def test_validation_on_its_own_says_the_same(folder, tmp_path):
    heads, watch = module(folder, lens_epochs=8, lens_learning_rate=0.02), Watch()
    run = trainer(tmp_path, watch, epochs=10)
    run.fit(heads, loader(heads), loader(heads))
    fitted = watch.scores[-1]
    alone = trainer(tmp_path).validate(heads, loader(heads), verbose=False)[0]
    kinds = {"agreement", "auroc", "bce", "cross_entropy", "loss", "positive"}
    assert {name.split("/")[1] for name in alone} == kinds
    assert alone == pytest.approx({name: fitted[name] for name in alone})


def test_training_improves_agreement(folder, tmp_path):
    heads, watch = module(folder, lens_epochs=8, lens_learning_rate=0.02), Watch()
    data = loader(heads, 4)
    trainer(tmp_path, watch, epochs=9).fit(heads, data, data)
    assert watch.scores[-1]["val/agreement/4"] > watch.scores[0]["val/agreement/4"] + 0.2


def test_a_checkpoint_holds_heads_and_no_backbone(folder, tmp_path):
    heads = module(folder)
    run = trainer(tmp_path, epochs=3)
    run.fit(heads, loader(heads))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"bank.{name}" for name in heads.bank.state_dict()}
    assert saved["backbone"] == heads.spec.fingerprint
    assert "hyper_parameters" not in saved
    assert not heads._top[0].training
    assert not any(parameter.requires_grad for parameter in heads._top[0].parameters())


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_run_ends_as_an_uninterrupted_one(folder, tmp_path, epoch):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == epoch - 1:
                trainer.save_checkpoint(tmp_path / "part.ckpt")

    whole = module(folder)
    trainer(tmp_path, Save()).fit(whole, loader(whole), loader(whole, first=50))
    resumed = module(folder)
    trainer(tmp_path).fit(
        resumed, loader(resumed), loader(resumed, first=50), ckpt_path=tmp_path / "part.ckpt", weights_only=True
    )
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=0)


def test_saved_heads_are_taken_up(folder, tmp_path):
    heads = module(folder)
    trainer(tmp_path, epochs=3).fit(heads, loader(heads))
    heads.bank.save(tmp_path / "heads", heads.spec)
    again = module(folder, heads=str(tmp_path / "heads"))
    assert again.bank.state_dict().keys() == heads.bank.state_dict().keys()
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in weights(heads).items())
    trainer(tmp_path, epochs=3).fit(again, loader(again))
    assert moved(weights(heads), weights(again)) == (True, True)


def test_half_precision_trains_the_same_heads(folder, tmp_path):
    heads = module(folder)
    trainer(tmp_path, epochs=3, precision="bf16-mixed").fit(heads, loader(heads), loader(heads, first=50))
    assert {tensor.dtype for tensor in weights(heads).values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights(heads).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(folder, tmp_path):
    heads, watch = module(folder), Watch()
    trainer(tmp_path, watch, accelerator="gpu", devices=1).fit(heads, loader(heads), loader(heads, first=50))
    assert "val/auroc/4/MambaGate" in watch.scores[-1]


def test_lenses_alone_and_gates_alone(folder, tmp_path):
    lenses = module(folder, exits=dict.fromkeys(DEPTHS, Exit(TunedLens)), gate_objective=None)
    gates = module(folder, exits=dict.fromkeys(DEPTHS, Exit(LogitLens, [LinearGate])), lens_objective=None)
    for heads in (lenses, gates):
        before = weights(heads)
        trainer(tmp_path, epochs=1).fit(heads, loader(heads))
        assert all(not torch.equal(before[name], tensor) for name, tensor in weights(heads).items())


def test_labels_may_be_read_through_the_last_block(folder, tmp_path):
    heads = module(folder, exits=dict.fromkeys(DEPTHS, Exit(LastBlockLens, [LinearGate])), lens_objective=None)
    trainer(tmp_path, epochs=1).fit(heads, loader(heads), loader(heads, first=50))


def test_gradients_are_clipped_by_head(folder, tmp_path):
    norms: list[dict[str, float]] = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            lenses = {d: [p.grad for p in pl_module.bank.lens(d).parameters() if p.grad is not None] for d in DEPTHS}
            norms.append({d: math.hypot(*(g.norm().item() for g in grads)) for d, grads in lenses.items() if grads})

    heads = module(folder)
    trainer(tmp_path, Norms(), epochs=3, gradient_clip_val=1e-3).fit(heads, loader(heads, 1))
    assert norms[0] == pytest.approx({2: 1e-3, 4: 1e-3}, rel=1e-2)


def test_lenses_never_see_what_gates_learn_from(folder, tmp_path):
    seen: dict[str, set[int]] = {"lenses": set(), "gates": set()}

    class Spy(Objective):
        def __init__(self, inner, phase):
            self.inner, self.phase = inner, phase

        def loss(self, bank, batch, sites):
            seen[self.phase] |= set(batch.documents_B[batch.answer_BT.any(1)].tolist())
            return self.inner.loss(bank, batch, sites)

    objectives = {"lens_objective": Spy(LensDistillation(), "lenses"), "gate_objective": Spy(GateObjective(), "gates")}
    heads = module(folder, **objectives)
    data = loader(heads, 6)
    trainer(tmp_path, epochs=3).fit(heads, data)
    assert seen["lenses"] | seen["gates"] == set(range(18))
    assert not seen["lenses"] & seen["gates"]
    assert len(seen["gates"]) == 5


@pytest.mark.parametrize("phase", ["lenses", "gates"])
def test_a_share_keeps_prompts_together(phase):
    sites = toy_sites([4], vocab=23)
    batch = made(sites, lengths=(9, 4, 6, 5))
    batch = replace(batch, origins_B=torch.tensor([-1, 3, 3, -1]))
    mine = share(batch, phase, 0.25)
    rows, longest = ([1, 2], 6) if phase == "gates" else ([0, 3], 9)
    assert mine.documents_B.tolist() == rows
    assert mine.hidden[4].shape == (2, longest, 8)
    for row, old in enumerate(rows):
        assert torch.equal(mine.hidden[4][row], batch.hidden[4][old, :longest])
        assert torch.equal(mine.answer_BT[row], batch.answer_BT[old, :longest])
    other = share(batch.rows(torch.tensor(rows)), resting(phase), 0.25)
    assert len(other) == 1
    assert not other.answer_BT.any()
