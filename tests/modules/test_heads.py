"""Heads are trained in two phases, scored, resumed, and taken up again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from dynamax.heads import Exit, LastBlockLens, LinearGate, LogitLens, TunedLens
from dynamax.modules.phases import Phase, share
from dynamax.objectives import GateObjective, LensDistillation, Objective
from tests.devices import ACCELERATOR, missing
from tests.modules.fitting import (
    DEPTHS,
    WARNINGS,
    Resumable,
    Watch,
    batches,
    gates,
    lenses,
    loader,
    module,
    moved,
    trainer,
    weights,
)
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
    heads, watch = module(folder, phases={**lenses(epochs=8, learning_rate=0.02), **gates()}), Watch()
    run = trainer(tmp_path, watch, epochs=10)
    run.fit(heads, loader(heads), loader(heads))
    fitted = watch.scores[-1]
    alone = trainer(tmp_path).validate(heads, loader(heads), verbose=False)[0]
    kinds = {"agreement", "auroc", "bce", "cross_entropy", "loss", "positive"}
    assert {name.split("/")[1] for name in alone} == kinds
    assert alone == pytest.approx({name: fitted[name] for name in alone})


def test_validation_on_its_own_reads_the_documents_it_is_given(folder, tmp_path):
    """Documents of other data may have the same numbers."""
    heads = module(folder, phases={**lenses(epochs=8, learning_rate=0.02), **gates()})
    data = batches(heads, 2)
    trainer(tmp_path, epochs=9).fit(heads, DataLoader(data, batch_size=None), DataLoader(data, batch_size=None))
    other = [replace(batch, hidden={d: -h_BTD for d, h_BTD in batch.hidden.items()}) for batch in data]
    found = trainer(tmp_path).validate(heads, DataLoader(other, batch_size=None), verbose=False)[0]
    wanted = torch.stack([torch.stack(each) for each in _agreement(heads, other)]).mean(0)
    assert [found["val/agreement/2"], found["val/agreement/4"]] == pytest.approx(wanted.tolist(), abs=1e-6)


def test_training_improves_agreement(folder, tmp_path):
    heads, watch = module(folder, phases={**lenses(epochs=8, learning_rate=0.02), **gates()}), Watch()
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


TURNS = {
    "warmup": lenses(epochs=1)["lenses"],
    "gates": Phase(GateObjective(), steps=2),
    "lenses": Phase(LensDistillation(candidates=16), steps=3, learning_rate=5e-3),
}
"""Of four steps an epoch: four of warm-up, then gates and lenses in turn."""


class Steps(Callback):
    """Notes the learning rates of each step and the weights after it.

    Args:
        save: Step after which a checkpoint is written, and where.
    """

    def __init__(self, save: tuple[int, Path] | None = None) -> None:
        self.save = save
        self.weights: list[dict[str, torch.Tensor]] = []
        self.rates: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})
        self.weights.append(weights(pl_module))
        if self.save and trainer.global_step == self.save[0]:
            trainer.save_checkpoint(self.save[1])


def test_phases_take_turns_in_steps(folder, tmp_path):
    heads, watch = module(folder, phases=TURNS, alternate=["gates", "lenses"]), Steps()
    start = weights(heads)
    trainer(tmp_path, watch, epochs=4).fit(heads, loader(heads, 4))
    steps = [moved(a, b) for a, b in zip([start, *watch.weights], watch.weights, strict=False)]
    lens_step, gate_step = (True, False), (False, True)
    cycle = [gate_step] * 2 + [lens_step] * 3
    assert steps == [lens_step] * 4 + (cycle * 3)[:12]
    gates_rates = [rates["gates"] for rates in watch.rates]
    lens_rates = [rates["lenses"] for rates in watch.rates]
    assert [rate > 0 for rate in gates_rates] == [step == gate_step for step in steps]
    assert [rate > 0 for rate in lens_rates] == [step == lens_step for step in steps]
    own = [rate for rate in gates_rates if rate]  # one rise and one fall over all turns, six steps
    assert own == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * max(0, n - 1) / 5)) for n in range(6)])
    assert max(lens_rates[4:]) == 5e-3
    assert max(lens_rates[:4]) == 2e-3


def test_labels_are_those_of_the_lenses_as_they_are_in_every_turn(folder, tmp_path):
    compared = []

    class Fresh(Objective):
        trains = frozenset(["gates"])

        def __init__(self):
            self.remembering = GateObjective()

        def forget(self, changed):
            self.remembering.forget(changed)

        def loss(self, bank, batch, sites):
            known, fresh = (each.labels(bank, batch, sites) for each in (self.remembering, GateObjective()))
            compared.append([torch.equal(known[depth], fresh[depth]) for depth in fresh])
            return self.remembering.loss(bank, batch, sites)

    phases = {
        "lenses": Phase(LensDistillation(candidates=16), steps=2, learning_rate=0.5, prompts=(0.0, 1.0)),
        "gates": Phase(Fresh(), steps=2, prompts=(0.0, 1.0)),
    }
    heads, watch = module(folder, phases=phases, alternate=["lenses", "gates"]), Watch()
    data = loader(heads, 2)
    trainer(tmp_path, watch, epochs=8).fit(heads, data, data)
    assert compared
    assert all(all(each) for each in compared)
    agreement = torch.stack([torch.stack(list(each)) for each in _agreement(heads, data)]).float().mean(0)
    assert watch.scores[-1]["val/agreement/2"] == pytest.approx(agreement[0].item(), abs=1e-6)
    assert len({scores["val/agreement/4"] for scores in watch.scores}) > 1, "the lenses changed"
    assert {"val/loss/lenses", "val/loss/gates"} <= set(watch.scores[0]), "both are told, whoever's turn it is"


def _agreement(heads, data):
    for batch in data:
        live_BT = batch.live_BT & batch.answer_BT
        found = []
        for depth, site in heads.sites.items():
            logits_BTV = site.project(heads.bank.lens(depth).translate(batch.hidden[depth], site))
            found.append((logits_BTV.argmax(-1) == batch.top_tokens_BTK[..., 0])[live_BT].float().mean())
        yield found


class Together(Objective):
    """Lenses and gates in one loss; the gates' labels follow the lenses."""

    trains = frozenset(["lenses", "gates"])

    def __init__(self) -> None:
        self.lenses, self.gates = LensDistillation(candidates=16), GateObjective()

    def loss(self, bank, batch, sites):
        lens, gate = self.lenses.loss(bank, batch, sites), self.gates.loss(bank, batch, sites)
        return lens[0] + gate[0], {**lens[1], **gate[1]}


def test_lenses_and_gates_train_together_in_one_phase(folder, tmp_path):
    heads, watch, steps = module(folder, phases={"both": Phase(Together())}), Watch(), Steps()
    start = weights(heads)
    trainer(tmp_path, watch, steps, epochs=2).fit(heads, loader(heads, 4), loader(heads, first=50))
    assert [moved(a, b) for a, b in zip([start, *steps.weights], steps.weights, strict=False)] == [(True, True)] * 8
    assert {"val/loss/both", "val/auroc/4/MambaGate", "val/bce/4/LinearGate"} <= set(watch.scores[0])


@pytest.mark.parametrize(
    ("phases", "alternate", "step"),
    [
        *((None, None, step) for step in (3, 8, 9, 14)),
        *((TURNS, ["gates", "lenses"], step) for step in (2, 5, 6, 7, 8, 9, 13)),
        ({"both": Phase(Together())}, None, 5),
    ],
)
def test_a_run_stopped_at_any_step_goes_on_as_if_it_had_not_been(folder, tmp_path, phases, alternate, step):
    options = {} if phases is None else {"phases": phases, "alternate": alternate}
    whole, saving = module(folder, **options), Steps((step, tmp_path / "part.ckpt"))
    trainer(tmp_path, saving).fit(whole, Resumable(batches(whole, 4)), loader(whole, first=50))
    resumed, steps = module(folder, **options), Steps()
    trainer(tmp_path, steps).fit(
        resumed,
        Resumable(batches(resumed, 4)),
        loader(resumed, first=50),
        ckpt_path=tmp_path / "part.ckpt",
        weights_only=True,
    )
    assert len(steps.weights) == len(saving.weights) - step == 16 - step
    assert saving.rates[step:] == steps.rates
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


def test_saved_lenses_get_new_gates_and_rest(folder, tmp_path):
    begun = module(folder, exits=dict.fromkeys(DEPTHS, Exit(TunedLens)), phases=lenses(epochs=None))
    trainer(tmp_path, epochs=1).fit(begun, loader(begun))
    begun.bank.save(tmp_path / "heads", begun.spec)
    exits = dict.fromkeys(DEPTHS, Exit(TunedLens, [LinearGate]))
    heads = module(folder, exits=exits, phases=gates(), heads=str(tmp_path / "heads"))
    known = weights(begun)
    assert all(torch.equal(weights(heads)[name], tensor) for name, tensor in known.items())
    before = weights(heads)
    trainer(tmp_path, epochs=1).fit(heads, loader(heads))
    assert all(torch.equal(weights(heads)[name], tensor) == (name in known) for name, tensor in before.items())


def test_half_precision_trains_the_same_heads(folder, tmp_path):
    heads = module(folder)
    trainer(tmp_path, epochs=3, precision="bf16-mixed").fit(heads, loader(heads), loader(heads, first=50))
    assert {tensor.dtype for tensor in weights(heads).values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights(heads).values())


@pytest.mark.gpu
@missing
def test_on_a_gpu(folder, tmp_path):
    heads, watch = module(folder), Watch()
    trainer(tmp_path, watch, accelerator=ACCELERATOR, devices=1).fit(heads, loader(heads), loader(heads, first=50))
    assert "val/auroc/4/MambaGate" in watch.scores[-1]


def test_heads_are_made_on_the_cpu_whatever_torchs_default_device_is(folder):
    heads = module(folder)
    with torch.device("meta"):  # as Lightning's is the GPU
        heads.configure_model()
    assert {tensor.device.type for tensor in [*heads.parameters(), *heads._top[0].parameters()]} == {"cpu"}


def test_lenses_alone_and_gates_alone(folder, tmp_path):
    only_lenses = module(folder, exits=dict.fromkeys(DEPTHS, Exit(TunedLens)), phases=lenses(epochs=None))
    only_gates = module(folder, exits=dict.fromkeys(DEPTHS, Exit(LogitLens, [LinearGate])), phases=gates())
    for heads in (only_lenses, only_gates):
        before = weights(heads)
        trainer(tmp_path, epochs=1).fit(heads, loader(heads))
        assert all(not torch.equal(before[name], tensor) for name, tensor in weights(heads).items())


def test_labels_may_be_read_through_the_last_block(folder, tmp_path):
    heads = module(folder, exits=dict.fromkeys(DEPTHS, Exit(LastBlockLens, [LinearGate])), phases=gates())
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
        def __init__(self, inner):
            self.inner, self.trains = inner, inner.trains

        def loss(self, bank, batch, sites):
            (kind,) = self.trains
            seen[kind] |= set(batch.documents_B[batch.answer_BT.any(1)].tolist())
            return self.inner.loss(bank, batch, sites)

    phases = {"first": Phase(Spy(LensDistillation()), epochs=2), "then": Phase(Spy(GateObjective()))}
    heads = module(folder, phases=phases)
    data = loader(heads, 6)
    trainer(tmp_path, epochs=3).fit(heads, data)
    assert seen["lenses"] | seen["gates"] == set(range(18))
    assert not seen["lenses"] & seen["gates"]
    assert len(seen["gates"]) == 5


@pytest.mark.parametrize("low", [True, False])
def test_a_share_keeps_prompts_together(low):
    prompts, others = ((0.0, 0.25), (0.25, 1.0)) if low else ((0.25, 1.0), (0.0, 0.25))
    sites = toy_sites([4], vocab=23)
    batch = made(sites, lengths=(9, 4, 6, 5))
    batch = replace(batch, origins_B=torch.tensor([-1, 3, 3, -1]))
    mine = share(batch, prompts)
    rows, longest = ([1, 2], 6) if low else ([0, 3], 9)
    assert mine.documents_B.tolist() == rows
    assert mine.hidden[4].shape == (2, longest, 8)
    for row, old in enumerate(rows):
        assert torch.equal(mine.hidden[4][row], batch.hidden[4][old, :longest])
        assert torch.equal(mine.answer_BT[row], batch.answer_BT[old, :longest])
    other = share(batch.rows(torch.tensor(rows)), others)
    assert len(other) == 1
    assert not other.answer_BT.any()
