from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from dynamax.backbones.sources import Folder
from dynamax.heads import Exit, LastBlockLens, LinearGate, LogitLens, MambaGate, TunedLens
from dynamax.modules.heads import HeadsModule
from dynamax.modules.phases import resting, share
from dynamax.modules.schedule import warm_cosine
from dynamax.objectives import GateObjective, LensDistillation, Objective
from tests.objectives.batches import made, toy_sites
from tests.tiny import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning 2.6 beside torch 2.13
]
DEPTHS = (2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama", dtype=torch.float32).save_pretrained(path)
    return path


def module(folder: Path, **options) -> HeadsModule:
    """Tuned lenses, linear gates, and a Mamba gate at the deeper exit; the same weights every time."""
    gates = [LinearGate]
    exits = {2: Exit(TunedLens, gates), 4: Exit(TunedLens, [*gates, lambda site: MambaGate(site, width=16, headdim=8)])}
    given = {"lens_objective": LensDistillation(candidates=16), "gate_objective": GateObjective(), "lens_epochs": 2}
    built = HeadsModule(Folder(str(folder)), **({"exits": exits} | given | options))
    seed_everything(0, verbose=False)
    built.configure_model()
    return built


def loader(heads: HeadsModule, batches: int = 3, first: int = 0) -> DataLoader:
    sites = {depth: heads._top[0].site(depth) for depth in DEPTHS}
    made_up = [made(sites, seed=first + i, first=3 * (first + i), lengths=(9, 8, 6)) for i in range(batches)]
    return DataLoader(made_up, batch_size=None)


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


def test_saved_heads_are_taken_up(folder, tmp_path):
    heads = module(folder)
    trainer(tmp_path, epochs=3).fit(heads, loader(heads))
    heads.bank.save(tmp_path / "heads", heads.spec)
    again = module(folder, heads=str(tmp_path / "heads"))
    assert again.bank.state_dict().keys() == heads.bank.state_dict().keys()
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in weights(heads).items())
    trainer(tmp_path, epochs=3).fit(again, loader(again))
    assert moved(weights(heads), weights(again)) == (True, True)


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


def test_learning_rates_rise_and_fall_in_their_phase():
    factor = warm_cosine(10, 30, 0.1)
    assert [factor(step) for step in (0, 9, 30, 99)] == [0.0] * 4
    assert [factor(step) for step in (10, 11, 12)] == [0.5, 1.0, 1.0]
    assert factor(21) == pytest.approx(0.5)
    assert 0 < factor(29) < 0.01
