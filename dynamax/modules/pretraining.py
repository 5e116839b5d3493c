"""``train``: a small language model from the start, with exits built in. Knows no corpora and no exit heads."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from dynamax.backbones.families import family
from dynamax.backbones.hf import HFBackbone
from dynamax.data.language import LanguageData
from dynamax.metrics.language import DepthScores
from dynamax.modules.configuration import check_depths, configuration
from dynamax.modules.export import check_target, write_model
from dynamax.modules.limits import one_device
from dynamax.modules.record import TrainingRecord, read_depths
from dynamax.modules.schedule import warm_flat_linear
from dynamax.objectives.early_exit import LanguageObjective


class PretrainingModule(LightningModule):
    """Trains a causal language model whose every weight starts at random, and writes it as transformers would.

    Checkpoints hold model and optimiser; ``ckpt_path`` goes on with an interrupted run, on the text it would have
    seen. Needs ``LanguageData``, whose tokenizer gives the vocabulary.

    Args:
        config: ``model_type`` and the entries of that type's configuration in transformers, such as ``hidden_size``;
            entries that are left out have transformers' defaults, and token ids come from the tokenizer.
        exits: Depths at which validation reads the model, and the objective may: blocks completed.
        objective: What is trained towards; NextToken is training without exits.
        learning_rate: Peak.
        warmup: Steps over which the learning rate rises.
        flat: Part of all steps, in [0, 1], after which it falls in a straight line to 0.
        weight_decay: Of AdamW, on matrices; vectors are spared.
        compile: Compile the blocks for training, with ``torch.compile``: faster after the first minute. Needs a C++
            compiler.
        export: Folder to write the trained model to; none is written if left out.
        prompts: What the model is made to continue, for the samples on its card.

    Attributes:
        backbone: The model; there once ``configure_model`` has run.

    Raises:
        ValueError: If an option is out of range, or the configuration is not one of a known family.
    """

    backbone: HFBackbone

    def __init__(
        self,
        config: dict[str, Any],
        exits: list[int],
        objective: LanguageObjective,
        *,
        learning_rate: float = 2.5e-3,
        warmup: int = 50,
        flat: float = 0.3,
        weight_decay: float = 0.1,
        compile: bool = False,
        export: str | None = None,
        prompts: list[str] | None = None,
    ) -> None:
        super().__init__()
        if learning_rate <= 0 or warmup < 1 or not 0 <= flat <= 1 or weight_decay < 0:
            raise ValueError(
                f"PretrainingModule was given learning_rate {learning_rate}, warmup {warmup}, flat {flat} and "
                f"weight_decay {weight_decay}; learning_rate must be positive, warmup at least 1, flat in [0, 1], "
                f"weight_decay at least 0."
            )
        self.config = dict(config)
        self.exits = check_depths(exits, configuration(self.config).num_hidden_layers)
        self.objective = objective
        self.learning_rate, self.warmup, self.flat, self.weight_decay = learning_rate, warmup, flat, weight_decay
        self.compile_blocks, self.export, self.prompts = compile, export, prompts or []
        self.record = TrainingRecord()
        self._scores = DepthScores([])
        self._built = False

    # -- the model ------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the model, once the data's tokenizer is there."""
        if self._built:
            return
        tokenizer = self.data.streams.tokenizer
        end = tokenizer.eos_token_id
        ids = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        config = configuration({**self.config, **ids})
        attention = family(config.model_type).attention
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        self.backbone = HFBackbone(model)
        if self.data.length > self.backbone.spec.context:
            raise ValueError(
                f"Blocks of {self.data.length} tokens were given to a model whose context holds "
                f"{self.backbone.spec.context}. Lower data.length, or raise the context in model.config."
            )
        self.backbone.requires_grad_(True)
        if self.compile_blocks:
            compile_blocks(getattr(model.base_model, self.backbone.row.blocks))
        self._built = True

    @property
    def data(self) -> LanguageData:
        """The text.

        Raises:
            ValueError: If it is of another class.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, LanguageData):
            raise ValueError(f"PretrainingModule was given data of {type(data).__name__}; give it LanguageData.")
        return data

    # -- optimisation -------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with betas .9 and .95; warm-up, plateau, straight line to 0."""
        total = self.trainer.estimated_stepping_batches
        parameters = list(self.backbone.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        schedule = LambdaLR(optimizer, warm_flat_linear(int(total), warmup=self.warmup, flat=self.flat))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- steps --------------------------------------------------------------------------------------

    def check(self, trainer: Trainer) -> None:
        """Refuse what could not end well, before any time is spent.

        Raises:
            ValueError: If training has no end, the export's place holds something else, or there are several devices.
        """
        one_device(trainer, self)
        if trainer.max_steps < 0 and trainer.max_epochs in (None, -1):
            raise ValueError("PretrainingModule needs to know when training ends. Set trainer.max_steps.")
        if self.export is not None:
            check_target(self.export)

    def setup(self, stage: str) -> None:
        """The same, for those who come without the command line."""
        if stage == "fit":
            self.check(self.trainer)

    def on_train_start(self) -> None:
        """The clock starts."""
        self._began = perf_counter()

    def training_step(self, tokens_BT: Tensor, batch_idx: int) -> Tensor:
        """The objective's loss."""
        loss, seen = self.objective.loss(self.backbone, tokens_BT, self.exits, self.global_step)
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
        self._scores = DepthScores([*self.exits, self.backbone.spec.depth])

    def validation_step(self, tokens_BT: Tensor, batch_idx: int) -> None:
        """Read every depth, in the weights' own precision: half-precision logits tie."""
        with torch.compiler.set_stance("force_eager"), torch.autocast(self.device.type, enabled=False):
            self._scores.update(read_depths(self.backbone, tokens_BT, self._scores.depths), tokens_BT)

    def on_validation_epoch_end(self) -> None:
        """Log perplexity, accuracy and agreement of every depth; the top is the deepest."""
        found = {depth: score._asdict() for depth, score in self._scores.compute().items()}
        for depth, score in found.items():
            self.log_dict({f"val/{name}/{depth}": value for name, value in score.items()})
        if not self.trainer.sanity_checking:
            self.record.scores[self.global_step] = found

    def on_train_end(self) -> None:
        """Write the model, if a folder was given."""
        if self.export is not None and self.trainer.is_global_zero:
            write_model(self.export, self.backbone, self.data, self.exits, self.prompts, self._facts())
            print(f"Wrote the model to {self.export}")

    def _facts(self) -> dict[str, Any]:
        names = ("learning_rate", "warmup", "flat", "weight_decay")
        return {
            "config": self.config,
            "objective": self._objective,
            "optimiser": {name: getattr(self, name) for name in names},
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
        """Note what was built and on which text."""
        checkpoint["pretraining"] = {"identity": self._identity(), "record": self.record.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the record.

        Raises:
            ValueError: If the checkpoint is of another model, another objective or another text.
        """
        noted, here = checkpoint["pretraining"]["identity"], self._identity()
        changed = [name for name in here if noted[name] != here[name]]
        if changed:
            raise ValueError(
                f"The checkpoint was made with another {' and '.join(changed)}: {[noted[name] for name in changed]}; "
                f"here: {[here[name] for name in changed]}. Give what it was made with, or train anew, without "
                f"ckpt_path."
            )
        self.record.load(checkpoint["pretraining"]["record"])

    def _identity(self) -> dict[str, Any]:
        text = {"streams": self.data.streams.fingerprint, **self.data.order}
        return {"config": self.config, "objective": self._objective, "text": text}

    @property
    def _objective(self) -> dict[str, Any]:
        return {"name": type(self.objective).__name__, **vars(self.objective)}


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block in place. One with a mixer of ours is a graph of its own, and PyTorch would stop at eight."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(blocks) + 1)
    for block in blocks:
        block.compile()
