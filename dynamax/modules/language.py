"""A language model in training: optimiser, scores by depth, checkpoints, export.

Knows no loss, and not where the model's first weights come from.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.loading import on_cpu
from dynamax.data.language import LanguageData
from dynamax.errors import UserError
from dynamax.metrics.language import DepthScores
from dynamax.modules.checks import all_finite, one_device
from dynamax.modules.export import REPORT, check_target, command, write_model
from dynamax.modules.schedule import Optimiser

POINTS = 40
"""Points of a loss curve, at most."""


@dataclass
class TrainingLog:
    """What a run has seen, and how its loss fell. Saved in checkpoints.

    Attributes:
        tokens: Tokens seen.
        seconds: Of training, validation between steps included.
        losses: Cross-entropy of the top, by step; on its device until it is asked for.
        scores: What validation found, by steps done and depth.
    """

    tokens: int = 0
    seconds: float = 0.0
    losses: list[Tensor | float] = field(default_factory=list)
    scores: dict[int, dict[int, dict[str, float]]] = field(default_factory=dict)

    def add(self, loss: Tensor, tokens: int) -> None:
        """Add one step."""
        self.losses.append(loss.detach())
        self.tokens += tokens

    def check(self) -> None:
        """Raise a UserError if the newest loss is infinite or not a number."""
        if self.losses and not math.isfinite(float(self.losses[-1])):
            raise UserError(
                f"The loss of step {len(self.losses)} is {float(self.losses[-1])}. Lower model.learning_rate, or train "
                f"in another precision (trainer.precision: bf16-mixed or 32-true), and train anew."
            )

    def curve(self) -> list[tuple[int, float]]:
        """Up to 40 points: steps done, and the mean loss of the steps since the point before."""
        losses = [float(loss) for loss in self.losses]
        size = max(1, -(-len(losses) // POINTS))
        parts = [losses[start : start + size] for start in range(0, len(losses), size)]
        done = itertools.accumulate(map(len, parts))
        return [(steps, sum(part) / len(part)) for steps, part in zip(done, parts, strict=True)]


class LanguageModule(LightningModule, ABC):
    """Trains a causal language model on ``LanguageData`` and writes it as transformers would.

    Args:
        exits: Depths at which validation reads the model beside the top, ascending.
        optimiser: AdamW's options.
        compile: Compile the blocks for training.
        export: Folder to write the trained model to, or None.
        prompts: What the model is made to continue, for the samples on its card.

    Attributes:
        backbone: The model; there once ``configure_model`` has run.
        record: What it has seen.
        context: Longest sequence the model reads; there once ``check`` has run.
        notes: Where checkpoints hold what a resumed run needs.
        report: Name of the report in an exported folder.
    """

    backbone: HFBackbone
    context: int
    notes: ClassVar[str]
    report: ClassVar[str] = REPORT

    def __init__(
        self, exits: list[int], optimiser: Optimiser, *, compile: bool, export: str | None, prompts: list[str] | None
    ) -> None:
        super().__init__()
        if not all(prompt.strip() for prompt in prompts or []):
            raise UserError(f"prompts {prompts} hold an empty one. Write what the model is to continue, or drop it.")
        rate, warmup, flat, decay = optimiser
        known = 0 < rate <= 1 and 0 <= decay < math.inf  # false where one is not a number
        if not known or warmup < 1 or not 0 <= flat <= 1:
            raise UserError(
                f"{type(self).__name__} was given learning_rate {rate}, warmup {warmup}, flat {flat} and weight_decay "
                f"{decay}; learning_rate must lie in (0, 1], warmup be at least 1, flat lie in [0, 1], weight_decay be "
                f"a number of at least 0."
            )
        self.exits, self.optimiser = exits, optimiser
        self.compile_blocks, self.export, self.prompts = compile, export, prompts or []
        self.record = TrainingLog()
        self._scores: DepthScores | None = None
        self._built = False

    # -- what a subclass gives ------------------------------------------------------------------------

    @abstractmethod
    def build(self) -> HFBackbone:
        """The model as it begins, its weights with gradients where they train; the data is there."""

    @abstractmethod
    def batch_loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ANN401
        """The loss of one batch, and detached scalars by name, ``cross_entropy/top`` among them."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must have in common, besides the text."""

    def origin(self) -> dict[str, Any]:
        """What is trained, from what, towards what, as JSON values: for card and report."""
        return self.identity()

    def text_identity(self) -> dict[str, Any]:
        """All that the batches depend on, as JSON values."""
        return {"streams": self.data.streams.fingerprint, **self.data.order}

    def scores(self, depths: Sequence[int]) -> DepthScores:
        """What validation counts at these depths."""
        return DepthScores(depths)

    # -- the model ------------------------------------------------------------------------------------

    @on_cpu
    def configure_model(self) -> None:
        """Build the model, once the data's tokenizer is there."""
        if self._built:
            return
        self.backbone = self.build()
        context = self.backbone.spec.context
        for prompt in self.prompts:
            if len(self.data.streams.tokenizer(prompt)["input_ids"]) >= context:
                raise UserError(f"A prompt leaves no room in a context of {context} tokens: {prompt!r}. Shorten it.")
        if self.compile_blocks:
            blocks: Any = self.backbone.model.base_model.get_submodule(self.backbone.row.blocks)
            config = torch._dynamo.config  # a block with a mixer of ours is a graph of its own; PyTorch stops at eight
            config.recompile_limit = max(config.recompile_limit, len(blocks) + 1)
            for block in blocks:
                block.compile()
        self._built = True

    @property
    def data(self) -> Any:  # noqa: ANN401 - what ``check_data`` accepts
        """The text; ``check_data`` has looked at it."""
        return cast(Any, self.trainer).datamodule

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See ``Optimiser``."""
        return self.optimiser.over(self.backbone.parameters(), int(self.trainer.estimated_stepping_batches))

    # -- checks before a run --------------------------------------------------------------------------

    def check(self, trainer: Trainer) -> None:
        """Refuse a run that cannot end well, before any time is spent.

        Raises:
            UserError: If training has no end or no step, gradients are to be accumulated, the export's place holds
                something else, the devices do not suit, or blocks cannot be compiled.
        """
        self.check_devices(trainer)
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
            compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
            if shutil.which(compiler) is None:
                raise UserError(
                    f"model.compile needs a C++ compiler, and {compiler} is not installed. Install it (apt install "
                    f"g++), or set model.compile to false."
                )
        if self.export is not None:
            check_target(self.export, self.report)

    def check_devices(self, trainer: Trainer) -> None:
        """Raise a UserError for several devices, unless a subclass knows how to share its batches out."""
        one_device(trainer, self)

    def check_data(self, data: object) -> None:
        """Raise a UserError for data of another class, and for blocks longer than the context."""
        if not isinstance(data, LanguageData):
            raise UserError(f"{type(self).__name__} was given data of {type(data).__name__}; give it LanguageData.")
        if data.length > self.context:
            raise UserError(
                f"Blocks of {data.length} tokens were given to a model whose context holds {self.context}. Lower "
                f"data.length, or raise the context in model.config."
            )

    def setup(self, stage: str) -> None:
        """The same, for those who come without the command line."""
        if stage == "fit":
            self.check(self.trainer)
            self.check_data(self.data)

    # -- steps --------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Start the clock."""
        self._began = perf_counter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401 - as the data gives them
        """The loss."""
        loss, seen = self.batch_loss(batch)
        rows, tokens = self.size(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=rows, sync_dist=self.trainer.world_size > 1)
        self.log_dict({f"train/{name}": value for name, value in seen.items()}, batch_size=rows)
        self.record.add(seen["cross_entropy/top"], tokens)
        return loss

    def size(self, batch: Any) -> tuple[int, int]:  # noqa: ANN401
        """Rows of a batch, and the tokens that count as seen."""
        return len(batch), batch.numel()

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:  # noqa: ANN401 - Lightning's
        """Count time in the record, which checkpoints save."""
        now = perf_counter()
        self.record.seconds += now - self._began
        self._began = now

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self._scores = self.scores([*self.exits, self.backbone.spec.depth])

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Read every depth, in the weights' own precision: half-precision logits tie."""
        with torch.compiler.set_stance("force_eager"), torch.autocast(self.device.type, enabled=False):
            assert self._scores is not None, "on_validation_epoch_start comes first"
            self.count(self._scores, self.backbone, batch)

    def count(self, scores: DepthScores, backbone: HFBackbone, batch: Any) -> None:  # noqa: ANN401
        """Read every depth of a backbone over one batch."""
        states = backbone.walk(backbone.embed(batch), scores.depths)
        scores.update([backbone.unembed(h_BTD) for _, h_BTD in states], batch)

    def on_validation_epoch_end(self) -> None:
        """Log what was counted at every depth; the top is the deepest."""
        assert self._scores is not None, "on_validation_epoch_start comes first"
        found = self._scores.compute()
        for depth, score in found.items():
            scores = {f"val/{name}/{depth}": value for name, value in score.items()}
            self.log_dict(scores, sync_dist=self.trainer.world_size > 1)
        if not self.trainer.sanity_checking:
            self.record.check()
            self.record.scores[self.global_step] = found

    def on_fit_end(self) -> None:
        """Write the model if a folder was given, also when a finished run is resumed; see ``on_save_checkpoint``."""
        self._check_finite()
        if self.export is None or cast(Any, self.trainer).fast_dev_run:
            return
        self.to(self.trainer.strategy.root_device)  # Lightning has taken it off already
        self.write(self.export, self.facts())

    def facts(self) -> dict[str, Any]:
        """How the model was trained so far, as JSON values."""
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

    def write(self, folder: str, facts: dict[str, Any]) -> None:
        """Write the trained model.

        Args:
            folder: Where to.
            facts: How it was trained, as JSON values.
        """
        report = write_model(folder, self.backbone, self.data, self.exits, self.prompts, facts)
        figures = ", ".join(f"{row['perplexity']:.1f} at {depth}" for depth, row in report["depths"].items())
        print(f"Wrote the model to {folder}. Perplexity on held-out text by depth: {figures}")
        print(f"Next: {command(report['depths'], folder)}")

    # -- checkpoints --------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what was built and on which text.

        Raises:
            UserError: If the newest loss or a weight is not finite: no checkpoint is replaced by such a model.
        """
        self._check_finite()
        self.record.losses = [float(loss) for loss in self.record.losses]
        checkpoint[self.notes] = {"identity": self._identity(), "record": asdict(self.record)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume the record; a UserError for a checkpoint of another command, model, objective or text."""
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
        self.record = TrainingLog(**checkpoint[self.notes]["record"])

    def _check_finite(self) -> None:
        self.record.check()
        if not all_finite(self.backbone.parameters()):
            raise UserError(
                f"A weight of the model is infinite or not a number after step {self.global_step}. Nothing was "
                f"written. Lower model.learning_rate, or set trainer.gradient_clip_val: 1, and train anew."
            )

    def _identity(self) -> dict[str, Any]:
        return {
            **self.identity(),
            "exits": self.exits,
            "optimiser": self.optimiser._asdict(),
            "text": self.text_identity(),
        }


def described(part: object) -> dict[str, Any]:
    """A part of a run, by its class and its options."""
    return {"name": type(part).__name__, **vars(part)}
