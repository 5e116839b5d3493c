"""A language model in training, whatever it is trained towards: optimiser, scores by depth, checkpoints, export.

Knows no loss, and not where the model's first weights are from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import perf_counter
from typing import Any, ClassVar, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dynamax.backbones.hf import HFBackbone
from dynamax.data.language import LanguageData
from dynamax.errors import UserError
from dynamax.metrics.language import DepthScores
from dynamax.modules.card import command
from dynamax.modules.checks import all_finite, one_device
from dynamax.modules.compiling import check_compiler, compile_blocks
from dynamax.modules.export import check_target, write_model
from dynamax.modules.schedule import OneRate
from dynamax.modules.training_log import TrainingLog, read_depths


class Scores(Protocol):
    """Adds up what every depth says of a text."""

    def update(self, logits: Sequence[Tensor], tokens_BT: Tensor) -> None:
        """Count one batch: ``logits_BTV`` at each depth."""

    def compute(self) -> dict[int, Any]:
        """Named figures by depth."""
        ...


class LanguageModule(LightningModule, ABC):
    """Trains a causal language model on ``LanguageData`` and writes it as transformers would.

    Checkpoints hold model and optimiser; ``ckpt_path`` goes on with an interrupted run, on the text it would have
    seen.

    Args:
        exits: Depths at which validation reads the model beside the top, ascending.
        optimiser: How it learns.
        compile: Compile the blocks for training.
        export: Folder to write the trained model to, or None.
        prompts: What the model is made to continue, for the samples on its card.

    Attributes:
        backbone: The model; there once ``configure_model`` has run.
        record: What it has seen.
    """

    notes: ClassVar[str]
    """Where checkpoints hold what a resumed run needs."""
    backbone: HFBackbone

    def __init__(
        self, exits: list[int], optimiser: OneRate, *, compile: bool, export: str | None, prompts: list[str] | None
    ) -> None:
        super().__init__()
        if not all(prompt.strip() for prompt in prompts or []):
            raise UserError(f"prompts {prompts} hold an empty one. Write what the model is to continue, or drop it.")
        self.exits = exits
        optimiser.check(type(self).__name__)
        self.optimiser = optimiser
        self.compile_blocks, self.export, self.prompts = compile, export, prompts or []
        self.record = TrainingLog()
        self._scores: list[Scores] = []
        self._built = False

    # -- what a way of training gives -----------------------------------------------------------------

    @abstractmethod
    def build(self) -> HFBackbone:
        """The model as it begins, its weights with gradients where they train; the data is there."""

    @abstractmethod
    def batch_loss(self, tokens_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, and detached scalars by name, ``cross_entropy/top`` among them."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """What is trained, from what, towards what, as JSON values: for card and report."""

    @abstractmethod
    def context(self) -> int:
        """Longest sequence the model reads; known once ``check`` has run."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on with it, but for the text."""

    def scores(self, depths: Sequence[int]) -> list[Scores]:
        """What validation counts at these depths."""
        return [DepthScores(depths)]

    # -- the model ------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the model, once the data's tokenizer is there."""
        if self._built:
            return
        self.backbone = self.build()
        context, tokenizer = self.backbone.spec.context, self.data.streams.tokenizer
        for prompt in self.prompts:
            if len(tokenizer(prompt)["input_ids"]) >= context:
                raise UserError(f"A prompt leaves no room in a context of {context} tokens: {prompt!r}. Shorten it.")
        if self.compile_blocks:
            compile_blocks(getattr(self.backbone.model.base_model, self.backbone.row.blocks))
        self._built = True

    @property
    def data(self) -> LanguageData:
        """The text; ``check_data`` has looked at it."""
        return cast(Any, self.trainer).datamodule

    # -- optimisation -------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See ``OneRate``."""
        trained = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        return self.optimiser.over(trained, int(self.trainer.estimated_stepping_batches))

    # -- steps --------------------------------------------------------------------------------------

    def check(self, trainer: Trainer) -> None:
        """Refuse what could not end well, before any time is spent.

        Raises:
            UserError: If training has no end or no step, gradients are to be accumulated, the export's place holds
                something else, there are several devices, or blocks cannot be compiled.
        """
        one_device(trainer, self)
        name = type(self).__name__
        if trainer.max_steps < 0 and trainer.max_epochs in (None, -1):
            raise UserError(f"{name} needs to know when training ends. Set trainer.max_steps.")
        if 0 in (trainer.max_steps, trainer.max_epochs, trainer.limit_train_batches):
            raise UserError(f"{name} was given no step to train. Raise trainer.max_steps or limit_train_batches.")
        if trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"{name} was given accumulate_grad_batches {trainer.accumulate_grad_batches}; it counts a batch as a "
                f"step. Raise the rows of data.portions instead."
            )
        if self.compile_blocks and trainer.strategy.root_device.type == "cpu":
            check_compiler()
        if self.export is not None:
            check_target(self.export)

    def check_data(self, data: object) -> None:
        """Refuse text that the model could not read, before it is written.

        Raises:
            UserError: If it is of another class, or its blocks are longer than the context.
        """
        if not isinstance(data, LanguageData):
            raise UserError(f"{type(self).__name__} was given data of {type(data).__name__}; give it LanguageData.")
        if data.length > self.context():
            raise UserError(
                f"Blocks of {data.length} tokens were given to a model whose context holds {self.context()}. Lower "
                f"data.length, or raise the context in model.config."
            )

    def setup(self, stage: str) -> None:
        """The same, for those who come without the command line."""
        if stage == "fit":
            self.check(self.trainer)
            self.check_data(self.data)

    def on_train_start(self) -> None:
        """The clock starts."""
        self._began = perf_counter()

    def training_step(self, tokens_BT: Tensor, batch_idx: int) -> Tensor:
        """The loss."""
        loss, seen = self.batch_loss(tokens_BT)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(tokens_BT))
        self.log_dict({f"train/{name}": value for name, value in seen.items()}, batch_size=len(tokens_BT))
        self.record.add(seen["cross_entropy/top"], tokens_BT.numel())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:  # noqa: ANN401 - Lightning's
        """Time goes to the record, for it travels with checkpoints."""
        now = perf_counter()
        self.record.seconds += now - self._began
        self._began = now

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self._scores = self.scores([*self.exits, self.backbone.spec.depth])

    def validation_step(self, tokens_BT: Tensor, batch_idx: int) -> None:
        """Read every depth, in the weights' own precision: half-precision logits tie."""
        with torch.compiler.set_stance("force_eager"), torch.autocast(self.device.type, enabled=False):
            logits = read_depths(self.backbone, tokens_BT, [*self.exits, self.backbone.spec.depth])
            for scores in self._scores:
                scores.update(logits, tokens_BT)

    def on_validation_epoch_end(self) -> None:
        """Log what was counted at every depth; the top is the deepest."""
        found: dict[int, dict[str, float]] = {}
        for scores in self._scores:
            for depth, score in scores.compute().items():
                found[depth] = {**found.get(depth, {}), **score._asdict()}
        for depth, score in found.items():
            self.log_dict({f"val/{name}/{depth}": value for name, value in score.items()})
        if not self.trainer.sanity_checking:
            self.record.check()
            self.record.scores[self.global_step] = found

    def on_fit_end(self) -> None:
        """Write the model, if a folder was given; also where a finished run is taken up once more.

        Raises:
            UserError: If the newest loss or a weight is not finite.
        """
        self._check_finite()
        if self.export is None or cast(Any, self.trainer).fast_dev_run:
            return
        self.to(self.trainer.strategy.root_device)  # Lightning has taken it off already
        report = write_model(self.export, self.backbone, self.data, self.exits, self.prompts, self._facts())
        told = ", ".join(f"{row['perplexity']:.1f} at {depth}" for depth, row in report["depths"].items())
        print(f"Wrote the model to {self.export}. Perplexity on held-out text by depth: {told}")
        print(f"Next: {command(report['depths'], self.export)}")

    def _facts(self) -> dict[str, Any]:
        return {
            **self.origin(),
            "optimiser": self.optimiser._asdict(),
            "gradient_clip": self.trainer.gradient_clip_val,
            "precision": str(self.trainer.precision),
            "steps": self.global_step,
            "tokens": self.record.tokens,
            "seconds": round(self.record.seconds, 1),
            "curve": self.record.curve(),
            "validation": self.record.scores,
        }

    # -- checkpoints --------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what was built and on which text.

        Raises:
            UserError: If the newest loss or a weight is not finite: no checkpoint is replaced by such a model.
        """
        self._check_finite()
        checkpoint[self.notes] = {"identity": self._identity(), "record": self.record.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the record.

        Raises:
            UserError: If the checkpoint is of another command, or of another model, objective or text.
        """
        if self.notes not in checkpoint:
            raise UserError(f"The checkpoint is not one of {type(self).__name__}. Give one that it saved.")
        noted, here = checkpoint[self.notes]["identity"], self._identity()
        changed = [name for name in here if noted.get(name) != here[name]]
        if changed:
            raise UserError(
                f"The checkpoint was made with another {' and '.join(changed)}: "
                f"{[noted.get(name) for name in changed]}; "
                f"here: {[here[name] for name in changed]}. Give what it was made with, or train anew, without "
                f"ckpt_path."
            )
        self.record.load(checkpoint[self.notes]["record"])

    def _check_finite(self) -> None:
        self.record.check()
        if not all_finite(self.backbone.parameters()):
            raise UserError(
                f"A weight of the model is infinite or not a number after step {self.global_step}. Nothing was "
                f"written. Lower model.learning_rate, or set trainer.gradient_clip_val: 1, and train anew."
            )

    def _identity(self) -> dict[str, Any]:
        text = {"streams": self.data.streams.fingerprint, **self.data.order}
        return {**self.identity(), "exits": self.exits, "optimiser": self.optimiser._asdict(), "text": text}


def described(part: object) -> dict[str, Any]:
    """A part of a run, by its class and its options."""
    return {"name": type(part).__name__, **vars(part)}
