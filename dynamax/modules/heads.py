"""``fit``: trains the heads of all exits on stored hidden states. Never loads the backbone below its last block."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any, Self, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from dynamax.backbones.base import Backbone
from dynamax.backbones.loading import on_cpu
from dynamax.backbones.sources import Source
from dynamax.data.batch import HiddenBatch
from dynamax.data.hidden import HiddenStates
from dynamax.errors import UserError
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.lenses import TunedLens
from dynamax.metrics.exits import GateAUROC
from dynamax.modules.checks import ChecksBeforeFit, check_depths, check_finite, one_device
from dynamax.modules.phases import Phase, PhaseSchedule, check_length, check_trained, completed, heads_of, share
from dynamax.objectives.base import KINDS, ExitReader, Kind, counted, in_top_k
from dynamax.objectives.ridge import RidgeLens
from dynamax.paths import InputPath
from dynamax.types import Site, Spec


class HeadsModule(LightningModule):
    """Trains lenses and gates of all exits in one run, in phases.

    Usually lenses train first, then gates: a gate learns whether its exit's lens is right, so its labels change while
    the lens does; when the lens rests, each document need be labelled only once. And gates train on
    documents that the lenses never saw, since a lens is right more often on those it learned from. Here lenses train
    for two epochs; then gates and lenses take turns of 200 steps::

        phases:
          warmup: {objective: LensDistillation, epochs: 2}
          gates: {objective: GateObjective, steps: 200}
          lenses: {objective: LensDistillation, steps: 200, learning_rate: 1e-3}
        alternate: [gates, lenses]

    One AdamW trains all heads; the learning rate of a phase rises and falls once, over all steps of its turns. Exits
    share no parameters, so their losses are summed, and gradients are clipped by head
    (``trainer.gradient_clip_val``). A loss or a weight that is not finite ends the run.

    Checkpoints hold heads and optimiser, not the backbone; ``ckpt_path`` resumes an interrupted run.

    Args:
        backbone: Where the model comes from; its final norm, its output matrix and as many of its last blocks as the
            lenses run are loaded.
        exits: The heads at each depth, in blocks completed.
        phases: What is trained, by a name of your choice, in this order; see ``dynamax.modules.phases.Phase``.
        alternate: Names of the phases that take turns; all others come before them.
        heads: Folder of saved heads to begin with, or to validate; they must be those of ``exits``, which may have more
            gates. Their lenses may rest in all phases. Left out, heads begin anew.
        ridge: Begin each TunedLens in closed form, by ridge regression of the top's normed state on the exit's over the
            documents of the first phase that trains lenses, with this penalty (see ``RidgeLens``); the store keeps the
            states at the top too. Left out, lenses begin as the logit lens.
        weight_decay: Of AdamW.
        warmup: Part of each phase, in [0, 1), over which the learning rate rises; then it falls as a cosine.

    Attributes:
        bank: The heads; there once ``configure_model`` has run.
        phases: In the order of their first turns, with what was left out filled in.

    Raises:
        UserError: If an option is out of range; while configuring, if a phase has nothing to train, heads have no
            phase, or saved heads are not those of the exits; when fitting, if the phases do not fit into the
            training, there are several devices, or a loss or a weight is not finite.
    """

    bank: ExitBank

    def __init__(
        self,
        backbone: Source,
        exits: dict[int, Exit],
        phases: dict[str, Phase] | None = None,
        *,
        alternate: list[str] | None = None,
        heads: InputPath | None = None,
        ridge: float | None = None,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1 or not 0 <= weight_decay < math.inf:
            raise UserError(
                f"HeadsModule was given warmup {warmup} and weight_decay {weight_decay}; warmup must lie in [0, 1), "
                f"weight_decay must be a number of at least 0."
            )
        if ridge is not None and (heads is not None or not 0 < ridge < math.inf):
            raise UserError(
                f"HeadsModule was given ridge {ridge} and heads {heads}; ridge is a penalty greater than 0, and sets "
                f"lenses anew. Leave one of them out."
            )
        self.backbone = backbone
        self.exits = exits
        self.ridge = ridge
        self.saved = None if heads is None else str(heads)
        self.alternate = tuple(alternate or ())
        self.phases = completed(phases or {}, self.alternate)
        self.weight_decay = weight_decay
        self.warmup = warmup
        self._top: tuple[Backbone, ...] = ()  # in a tuple, so that it is no submodule and in no checkpoint
        self._stage: tuple[Backbone, ...] = ()
        self._reader = ExitReader("lens", in_top_k(1))
        self._schedule: PhaseSchedule | None = None
        self._entered: Phase | None = None

    # -- the heads ----------------------------------------------------------------------------------

    @on_cpu
    def configure_model(self) -> None:
        """Load the backbone's top and build the heads, once; see the class for what is refused."""
        if self._top:
            return
        top = self._output_stage()
        bank = ExitBank(self.exits, top.site)
        if bank.depths[-1] == top.spec.depth:
            raise UserError(
                f"HeadsModule was given an exit at depth {top.spec.depth}, the top, where there is nothing to train. "
                f"Leave it out here; give it where the model is decoded (exits: {{{top.spec.depth}: {{}}}})."
            )
        blocks = max(bank.lens(depth).last_blocks for depth in bank.depths)
        if blocks > 1:
            top = self.backbone.output_stage(blocks=blocks).eval().requires_grad_(False)
            bank = ExitBank(self.exits, top.site)
        if self.saved is not None:
            self._take_up(bank, ExitBank.load(self.saved, top.site), top.spec)
        self._top, self.bank = (top,), bank
        self.sites: dict[int, Site] = {depth: top.site(depth) for depth in bank.depths}
        gates = [f"{depth}/{name}" for depth in bank.depths for name in bank.gates(depth)]
        self.aurocs = nn.ModuleDict({name: GateAUROC() for name in gates})
        check_trained(bank, self.phases, may_rest=["lenses"] if self.saved is not None else [])
        tuned = [depth for depth in bank.depths if isinstance(bank.lens(depth), TunedLens)]
        if self.ridge is not None and not tuned:
            raise UserError("HeadsModule was given ridge, but no exit has a TunedLens. Give one, or leave ridge out.")

    def _output_stage(self) -> Backbone:
        """The backbone's last block, final norm and output matrix, loaded once."""
        if not self._stage:
            rank_zero_info(f"Loading the output stage of {self.backbone}")
            self._stage = (self.backbone.output_stage().eval().requires_grad_(False),)
        return self._stage[0]

    def stored_depths(self) -> list[int]:
        """Depths at which a store must keep states: those of the exits, and the top if lenses begin by ridge."""
        top = [] if self.ridge is None else [self._output_stage().spec.depth]
        return sorted({*self.exits, *top})

    def _take_up(self, bank: ExitBank, begun: ExitBank, spec: Spec) -> None:
        """Copy saved heads into the bank; only gates may be new."""
        asked, found = (each.record(spec)["exits"] for each in (bank, begun))
        same = set(asked) == set(found) and all(
            asked[depth]["lens"] == found[depth]["lens"]
            and all(gate in asked[depth]["gates"] for gate in found[depth]["gates"])
            for depth in asked
        )
        if not same:
            raise UserError(
                f"The heads in {self.saved} are not those of the exits. Saved: {json.dumps(found)}. Exits: "
                f"{json.dumps(asked)}. Give the exits they were trained with, and new gates if you like; or leave "
                f"heads out and train anew."
            )
        bank.load_state_dict(begun.state_dict(), strict=False)

    @property
    def spec(self) -> Spec:
        """The backbone the heads belong to."""
        return self._top[0].spec

    def check(self, trainer: Trainer, data: object = None) -> None:
        """Refuse a run that cannot end well, as far as can be known before data is prepared.

        Args:
            trainer: Its callbacks are asked too, once the heads are built.
            data: See ``check_data``.

        Raises:
            UserError: If there are several devices, the phases do not fit into the training, the clipping is out of
                range, the store will not hold what training reads, or a callback refuses.
        """
        one_device(trainer, self)
        clip = trainer.gradient_clip_val
        if clip is not None and not clip >= 0:
            raise UserError(f"trainer.gradient_clip_val is {clip}; wanted a number of at least 0. Change it.")
        check_length(self.phases, self.alternate, trainer)
        self.check_data(data)
        for callback in cast(Any, trainer).callbacks if self._top else ():
            if isinstance(callback, ChecksBeforeFit):
                callback.check_before_fit(trainer, self)

    def check_data(self, data: object) -> None:
        """Refuse ``HiddenStates`` that keep too few tokens of a position or lack the depth of an exit (UserError)."""
        if not isinstance(data, HiddenStates):
            return
        for name, phase in self.phases.items():
            if phase.objective.tokens > data.k:
                raise UserError(
                    f"The objective of the phase {name}, {type(phase.objective).__name__}, reads "
                    f"{phase.objective.tokens} tokens of a position, but the store keeps {data.k}. Raise data.k, which "
                    f"fills another store, or lower top or k of the objective."
                )
        check_depths(self.stored_depths(), data.exits)

    def setup(self, stage: str) -> None:
        """Check, for runs without the command line; nothing of an earlier fit is used."""
        one_device(self.trainer, self)
        if stage == "fit":
            self.check(self.trainer, cast(Any, self.trainer).datamodule)
            self._entered = self._schedule = None

    # -- phases -------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        """One AdamW over all heads; those at rest have no gradient, so it passes them over."""
        trained = {kind: [p for head in heads_of(self.bank, [kind]) for p in head.parameters()] for kind in KINDS}
        groups = [{"params": found, "lr": 0.0, "name": kind} for kind, found in trained.items() if found]
        return AdamW(groups, weight_decay=self.weight_decay)

    def _phase(self, step: int) -> str:
        """The name of the phase of an optimiser step; the first one before training has begun."""
        return self._schedule.at(step)[0] if self._schedule else next(iter(self.phases))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the heads in training; the others stay in eval mode, since frozen is not eval."""
        super().train(mode)
        if self._entered is not None:
            for head in heads_of(self.bank, set(KINDS) - self._entered.trains):
                head.eval()
        return self

    def on_train_start(self) -> None:
        """Bring the backbone's top to the heads; lay out the phases, now that the length of an epoch is known."""
        self._top[0].to(self.device)
        trainer = self.trainer
        total = trainer.estimated_stepping_batches
        if math.inf in (total, trainer.num_training_batches):
            raise UserError("HeadsModule needs data of a known length. Give a data module whose loaders have one.")
        epoch_steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        check_length(self.phases, self.alternate, trainer, epoch_steps)
        self._schedule = PhaseSchedule(self.phases, self.alternate, epoch_steps=epoch_steps, total=int(total))
        if self.ridge is not None and self.global_step == 0:
            self._regress(self.ridge)

    @torch.no_grad()
    def _regress(self, penalty: float) -> None:
        """Set each TunedLens by ridge regression, over the counted positions of all training documents."""
        depths = [depth for depth in self.bank.depths if isinstance(self.bank.lens(depth), TunedLens)]
        found = {depth: RidgeLens(self.spec.width, penalty, self.device) for depth in depths}
        phase = next(phase for phase in self.phases.values() if "lenses" in phase.trains)
        for batch in cast(Any, self.trainer).train_dataloader:
            part = share(batch, phase.prompts or (0.0, 1.0))
            check_depths(self.stored_depths(), part.hidden)
            live_BT, site = counted(part), self.sites[depths[0]]
            top_ND = site.normalize(part.hidden[self.spec.depth][live_BT].to(self.device))
            for depth, lens in found.items():
                lens.add(site.normalize(part.hidden[depth][live_BT].to(self.device)), top_ND)
        for depth, lens in found.items():
            a_DD, b_D = lens.solve()
            shift = cast(TunedLens, self.bank.lens(depth)).shift
            shift.weight.copy_(a_DD.T)
            shift.bias.copy_(b_D)

    def on_validation_start(self) -> None:
        """Bring the backbone's top to the heads; validation on its own may have other heads and other documents."""
        self._top[0].to(self.device)
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._forget(None)

    def on_train_batch_start(self, batch: HiddenBatch, batch_idx: int) -> None:
        """Set the learning rates (a scheduler would have to know the length of an epoch too early).

        Where a phase begins, freeze the other heads and forget what was read of heads that change.
        """
        assert self._schedule is not None, "on_train_start comes first"
        for group in cast(Optimizer, self.optimizers()).param_groups:
            group["lr"] = self._schedule.rate(group["name"], self.warmup, self.global_step)
        phase, left = self.phases[self._phase(self.global_step)], self._entered
        if phase is left:
            return
        self._entered = phase
        for kind in KINDS:
            for head in heads_of(self.bank, [kind]):
                head.requires_grad_(kind in phase.trains)
        self.train()
        self._forget(None if left is None else left.trains | phase.trains)

    def _forget(self, changed: Collection[Kind] | None) -> None:
        """Forget what was read of heads of these kinds; everything if None."""
        for reader in (self._reader, *(phase.objective for phase in self.phases.values())):
            reader.forget(changed)

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
        for head in heads_of(self.bank, self.phases[self._phase(self.global_step)].trains):
            clip(head.parameters(), gradient_clip_val)

    # -- steps --------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: HiddenBatch, dataloader_idx: int) -> HiddenBatch:
        """Refuse a store that lacks the depth of an exit (UserError)."""
        check_depths(self.exits, batch.hidden)
        return batch

    def training_step(self, batch: HiddenBatch, batch_idx: int) -> Tensor:
        """The loss of the phase, on the documents that are its own; a UserError if it is not finite."""
        name = self._phase(self.global_step)
        phase = self.phases[name]
        batch = share(batch, phase.prompts or (0.0, 1.0))
        loss, seen = phase.objective.loss(self.bank, batch, self.sites)
        check_finite("The loss", [loss], step=self.global_step + 1, phase=name, rate=phase.rate)
        size = max(1, int(counted(batch).sum()))
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in seen.items()}, batch_size=size)
        return loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - Lightning's
        """Step; a weight that is not finite is a UserError, before anything can save it."""
        step, name = self.global_step, self._phase(self.global_step)
        super().optimizer_step(*args, **options)
        phase = self.phases[name]
        parameters = (p for head in heads_of(self.bank, phase.trains) for p in head.parameters())
        check_finite("A weight", parameters, step=step + 1, phase=name, rate=phase.rate)

    def validation_step(self, batch: HiddenBatch, batch_idx: int) -> None:
        """Log agreement of each lens, loss of the phase or of those that take turns, AUROC of each gate that trains.

        Without training it logs all of these. A loss that is not finite while fitting is a UserError.
        """
        if not (size := int(counted(batch).sum())):
            return
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        names = tuple(self.phases)
        if fitting:
            now = self._phase(max(0, self.global_step - 1))
            names = self.alternate if now in self.alternate else (now,)
        agreed = {depth: self._reader(self.bank, batch, site) for depth, site in self.sites.items()}
        figures: dict[str, Tensor] = {f"agreement/{d}": agreed_N.float().mean() for d, agreed_N in agreed.items()}
        for name in names:
            phase = self.phases[name]
            loss, seen = phase.objective.loss(self.bank, batch, self.sites)
            if fitting:
                check_finite("The validation loss", [loss], step=self.global_step, phase=name, rate=phase.rate)
            figures |= {f"loss/{name}": loss, **seen}
        self.log_dict({f"val/{name}": value for name, value in figures.items()}, batch_size=size)
        if fitting and not any("gates" in self.phases[name].trains for name in names):
            return
        for depth, evidence in self.bank.known_texts(batch.hidden, self.sites, counted(batch), batch.text).items():
            for name in self.bank.gates(depth):
                auroc = cast(GateAUROC, self.aurocs[f"{depth}/{name}"])
                auroc.update(evidence.score(name), agreed[depth])
                self.log(f"val/auroc/{depth}/{name}", auroc, batch_size=size)

    # -- checkpoints --------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which backbone the heads belong to."""
        checkpoint["backbone"] = self.spec.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse heads of another backbone (UserError)."""
        if checkpoint["backbone"] != self.spec.fingerprint:
            raise UserError(
                f"The checkpoint was trained on the backbone {checkpoint['backbone']}, but the backbone here is "
                f"{self.spec.fingerprint}. Give the backbone it was trained on, or train anew without ckpt_path."
            )
