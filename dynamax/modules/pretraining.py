"""``train``: a small language model from the start, with exits built in. Knows no corpora and no exit heads."""

from __future__ import annotations

from typing import Any, ClassVar, final

from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynamax.backbones.families import family
from dynamax.backbones.hf import HFBackbone, context_of
from dynamax.modules.configuration import check_depths, check_runs, check_trained, configuration
from dynamax.modules.language import LanguageModule, described
from dynamax.modules.schedule import OneRate
from dynamax.objectives.early_exit import LanguageObjective


@final
class PretrainingModule(LanguageModule):
    """Trains a causal language model whose every weight starts at random, and writes it as transformers would.

    Checkpoints hold model and optimiser; ``ckpt_path`` goes on with an interrupted run, on the text it would have
    seen. Needs ``LanguageData``, whose tokenizer gives the vocabulary.

    Args:
        config: ``model_type`` and the entries of that type's configuration in transformers, such as ``hidden_size``;
            entries that are left out have transformers' defaults. Vocabulary and token ids come from the tokenizer,
            and there is no dropout, whatever transformers' defaults.
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
        UserError: If an option is out of range, or the configuration is not one of a known family.
    """

    notes: ClassVar[str] = "pretraining"

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
        optimiser = OneRate(learning_rate, warmup, flat, weight_decay)
        check_trained(config)
        depth = configuration(config).num_hidden_layers
        super().__init__(check_depths(exits, depth), optimiser, compile=compile, export=export, prompts=prompts)
        self.config = dict(config)
        self.objective = objective
        self._runs = False

    def check(self, trainer: Trainer) -> None:
        """Run a model of this configuration too: mistakes in it show before texts are read.

        Raises:
            UserError: If training could not end well, or transformers cannot run such a model.
        """
        super().check(trainer)
        if not self._runs:
            check_runs(configuration(self.config), self.config)
            self._runs = True

    def context(self) -> int:
        """The configuration's."""
        return context_of(configuration(self.config))

    def build(self) -> HFBackbone:
        """A random model with the vocabulary of the data."""
        tokenizer = self.data.streams.tokenizer
        end = tokenizer.eos_token_id
        ids = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        config = configuration({**self.config, **ids})
        attention = family(config.model_type).attention
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        backbone = HFBackbone(model)
        return backbone.requires_grad_(True)

    def batch_loss(self, tokens_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's loss."""
        return self.objective.loss(self.backbone, tokens_BT, self.exits, self.global_step)

    def origin(self) -> dict[str, Any]:
        """Configuration and objective."""
        return self.identity()

    def identity(self) -> dict[str, Any]:
        """The same."""
        return {"config": self.config, "objective": described(self.objective)}
