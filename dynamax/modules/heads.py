"""``fit``: trains the heads of all exits on stored hidden states. Never loads the backbone below its last block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Self

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from dynamax.backbones.base import Backbone
from dynamax.backbones.sources import Source
from dynamax.data.batch import HiddenBatch
from dynamax.errors import UserError
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.base import ExitHead
from dynamax.modules.assembly import assembled, check_phases, check_taught, trained
from dynamax.modules.checks import epochs_for_gates, one_device
from dynamax.modules.phases import resting, share
from dynamax.modules.schedule import TrainedGroup, adamw
from dynamax.modules.scores import GateAUROCs
from dynamax.objectives.base import Objective, Phase, counted
from dynamax.objectives.readout import ExitReader, in_top_k
from dynamax.paths import InputPath
from dynamax.types import Site, Spec


class HeadsModule(LightningModule):
    """Trains lenses first, then gates, of all exits in one run.

    In that order, because a gate learns whether its exit's lens is right: while the lens still changes, so do the
    gate's labels. A frozen lens lets each document be labelled once. And from documents that the lens never saw,
    because it is right more often on those it learned from, and a gate that believes this is too sure.

    Exits share no parameters, so their losses are summed, and gradients are clipped by head
    (``trainer.gradient_clip_val``).

    Checkpoints hold heads and optimiser, not the backbone; ``ckpt_path`` goes on with an interrupted run.

    Args:
        backbone: Where the model comes from; its last block, final norm and output matrix are loaded.
        exits: What stands at each depth, in blocks completed.
        heads: Folder of saved heads to begin with, or to validate; they must be those of ``exits``. Left out, heads
            begin anew.
        lens_objective: What lenses are trained towards; None where no lens has anything to learn.
        gate_objective: What gates are trained towards; None where there are no gates.
        lens_epochs: Epochs for the lenses; the gates get the rest of ``trainer.max_epochs``.
        gate_share: Part of the prompts, in (0, 1), whose documents are kept from the lenses and train the gates alone.
            Where only lenses or only gates train, they get all documents.
        lens_learning_rate: Peak learning rate of the lenses.
        gate_learning_rate: Peak learning rate of the gates.
        weight_decay: Of AdamW.
        warmup: Part of each phase, in [0, 1), over which the learning rate rises; then it falls as a cosine.

    Attributes:
        bank: The heads; there once ``configure_model`` has run.

    Raises:
        UserError: If an option is out of range; while configuring, if an objective has nothing to train or heads
            have no objective, or saved heads are not those of the exits; when fitting, if no epoch is left for the
            gates; if there are several devices.
    """

    bank: ExitBank

    def __init__(
        self,
        backbone: Source,
        exits: dict[int, Exit],
        *,
        heads: InputPath | None = None,
        lens_objective: Objective | None = None,
        gate_objective: Objective | None = None,
        lens_epochs: int = 4,
        gate_share: float = 0.25,
        lens_learning_rate: float = 2e-3,
        gate_learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        rates: dict[Phase, float] = {"lenses": lens_learning_rate, "gates": gate_learning_rate}
        if lens_epochs < 1 or not 0 < gate_share < 1 or not 0 <= warmup < 1 or min(rates.values()) <= 0:
            raise UserError(
                f"HeadsModule was given lens_epochs {lens_epochs}, gate_share {gate_share}, warmup {warmup} and the "
                f"learning rates {rates}; lens_epochs must be at least 1, gate_share must lie in (0, 1), warmup in "
                f"[0, 1), rates must be positive."
            )
        self.backbone = backbone
        self.exits = exits
        self.saved = heads
        self.objectives: dict[Phase, Objective | None] = {"lenses": lens_objective, "gates": gate_objective}
        check_phases(self.objectives)
        self.lens_epochs = lens_epochs if lens_objective is not None else 0
        self.gate_share = gate_share
        self.rates = rates
        self.weight_decay = weight_decay
        self.warmup = warmup
        self._top: tuple[Backbone, ...] = ()  # in a tuple, so that it is no submodule and in no checkpoint
        self._reader = ExitReader("lens", in_top_k(1))
        self._entered: Phase | None = None

    # -- what is trained ----------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the backbone's top and build the heads, once."""
        if self._top:
            return
        top = self.backbone.output_stage().eval().requires_grad_(False)
        self._top = (top,)
        self.bank = assembled(self.exits, self.saved, top)
        self.sites: dict[int, Site] = {depth: top.site(depth) for depth in self.bank.depths}
        self.aurocs = GateAUROCs(self.bank)
        check_taught(self.bank, self.objectives)

    @property
    def spec(self) -> Spec:
        """The backbone the heads belong to."""
        return self._top[0].spec

    def heads(self, phase: Phase) -> Iterator[ExitHead]:
        """The heads that one phase trains."""
        return trained(self.bank, phase)

    def setup(self, stage: str) -> None:
        """Refuse a trainer that cannot do what was asked."""
        one_device(self.trainer, self)
        if stage == "fit":
            self.check_epochs(self.trainer)

    def check_epochs(self, trainer: Trainer) -> None:
        """Refuse a trainer that ends before the gates' turn.

        Raises:
            UserError: If no epoch is left for them.
        """
        if self.objectives["gates"] is not None:
            epochs_for_gates(trainer, self.lens_epochs)

    # -- phases -------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """What the current epoch trains."""
        only_lenses = self.objectives["gates"] is None
        return "lenses" if only_lenses or self.current_epoch < self.lens_epochs else "gates"

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the heads in training; the others stay in eval mode, since frozen is not eval."""
        super().train(mode)
        if self._entered is not None:
            for head in self.heads(resting(self._entered)):
                head.eval()
        return self

    def on_fit_start(self) -> None:
        """Whatever an earlier fit left is not trusted."""
        self._entered = None

    def on_train_start(self) -> None:
        """Bring the backbone's top to the heads."""
        self._top[0].to(self.device)

    def on_validation_start(self) -> None:
        """The same, for validation on its own."""
        self._top[0].to(self.device)

    def on_train_epoch_start(self) -> None:
        """Enter the epoch's phase if it is a new one: freeze the heads that rest, forget what was read of them."""
        phase = self.phase
        if phase == self._entered:
            return
        self._entered = phase
        for head in self.heads(resting(phase)):
            head.requires_grad_(False)
        for head in self.heads(phase):
            head.requires_grad_(True)
        self.train()
        self.objective(phase).begin()
        self._reader.forget()

    def objective(self, phase: Phase) -> Objective:
        """The objective of a phase that trains something."""
        objective = self.objectives[phase]
        assert objective is not None, f"a phase of {phase} has an objective"
        return objective

    # -- optimisation -------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One AdamW over all heads; each phase has its own warm-up and cosine. Resting heads have no gradient."""
        middle, end = self._steps()
        spans: tuple[tuple[Phase, int, int], ...] = (("lenses", 0, middle), ("gates", middle, end))
        parts = [
            TrainedGroup(
                phase, [p for head in self.heads(phase) for p in head.parameters()], self.rates[phase], start, stop
            )
            for phase, start, stop in spans
        ]
        return adamw(parts, weight_decay=self.weight_decay, warmup=self.warmup)

    def _steps(self) -> tuple[int, int]:
        """Optimiser steps until the lenses are done, and in all."""
        total = self.trainer.estimated_stepping_batches
        if total == math.inf or self.trainer.max_epochs is None:
            raise UserError("HeadsModule needs to know when training ends. Set trainer.max_epochs.")
        if self.objectives["gates"] is None:
            return int(total), int(total)
        batches = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        return batches * self.lens_epochs, int(total)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each head on its own, so that no exit's gradient shrinks another's."""
        if not gradient_clip_val:
            return
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        for head in self.heads(self.phase):
            clip(head.parameters(), gradient_clip_val)

    # -- steps --------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: HiddenBatch, dataloader_idx: int) -> HiddenBatch:
        """Refuse a store that lacks an exit.

        Raises:
            UserError: Naming the depths there are and those wanted.
        """
        if not set(self.bank.depths) <= set(batch.hidden):
            raise UserError(
                f"The store keeps hidden states at the depths {sorted(batch.hidden)}, but exits are to be trained at "
                f"{list(self.bank.depths)}. Give the data module the same depths as the model's exits."
            )
        return batch

    def training_step(self, batch: HiddenBatch, batch_idx: int) -> Tensor:
        """The loss of the phase, on the documents that are its own."""
        if None not in self.objectives.values():
            batch = share(batch, self.phase, self.gate_share)
        loss, seen = self.objective(self.phase).loss(self.bank, batch, self.sites)
        size = max(1, int(counted(batch).sum()))
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in seen.items()}, batch_size=size)
        return loss

    def validation_step(self, batch: HiddenBatch, batch_idx: int) -> None:
        """Agreement of each lens and loss of the phase; AUROC of each gate once they train, or on its own."""
        if not (size := int(counted(batch).sum())):
            return
        alone = self.trainer.state.fn != TrainerFn.FITTING
        phases: list[Phase] = ["lenses", "gates"] if alone else [self.phase]
        agreed = {depth: self._reader(self.bank, batch, site) for depth, site in self.sites.items()}
        for depth, agreed_N in agreed.items():
            self.log(f"val/agreement/{depth}", agreed_N.float().mean(), batch_size=size)
        for phase in phases:
            if (objective := self.objectives[phase]) is None:
                continue
            loss, seen = objective.loss(self.bank, batch, self.sites)
            self.log(f"val/loss/{phase}", loss, batch_size=size)
            self.log_dict({f"val/{name}": value for name, value in seen.items()}, batch_size=size)
        if "gates" in phases:
            for name, auroc in self.aurocs.update(self.bank, batch, self.sites, agreed):
                self.log(f"val/auroc/{name}", auroc, batch_size=size)

    # -- checkpoints --------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which backbone the heads belong to."""
        checkpoint["backbone"] = self.spec.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse heads of another backbone.

        Raises:
            UserError: Naming both fingerprints.
        """
        if checkpoint["backbone"] != self.spec.fingerprint:
            raise UserError(
                f"The checkpoint was trained on the backbone {checkpoint['backbone']}, but the backbone here is "
                f"{self.spec.fingerprint}. Give the backbone it was trained on, or train anew without ckpt_path."
            )
