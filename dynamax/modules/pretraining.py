"""``train``: a small language model from the start, with exits built in. Knows no corpora and no exit heads."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, final

import torch
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dynamax.backbones.families import family
from dynamax.backbones.hf import HFBackbone, context_of
from dynamax.errors import UserError
from dynamax.modules.language import LanguageModule, described
from dynamax.modules.schedule import Optimiser
from dynamax.objectives.early_exit import LanguageObjective

TOKENIZED = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Entries of a configuration that the data decides."""


@final
class PretrainingModule(LanguageModule):
    """Trains a causal language model whose every weight starts at random, and writes it as transformers would.

    Checkpoints hold model and optimiser; ``ckpt_path`` resumes an interrupted run, with the text that comes next.
    Needs ``LanguageData``, whose tokenizer gives the vocabulary.

    Args:
        config: ``model_type`` and the entries of that type's configuration in transformers, such as ``hidden_size``;
            entries that are left out have transformers' defaults. Vocabulary and token ids come from the tokenizer,
            and there is no dropout, whatever transformers' defaults.
        exits: Depths at which validation reads the model, and the objective may: blocks completed.
        objective: What is trained towards; NextToken is training without exits.
        learning_rate: Peak.
        warmup: Steps over which the learning rate rises.
        flat: Part of all steps, in [0, 1], after which it falls in a straight line to 0.
        weight_decay: Of AdamW, on matrices; vectors have none.
        compile: Compile the blocks for training, with ``torch.compile``: faster after the first minute. Needs a C++
            compiler.
        export: Folder to write the trained model to; none is written if left out.
        prompts: What the model is made to continue, for the samples on its card.

    Attributes:
        backbone: The model; there once ``configure_model`` has run.

    Raises:
        UserError: If an option is out of range, or the configuration is not one of a known family, names what comes
            from the text (vocabulary, token ids), or has dropout.
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
        if named := sorted(TOKENIZED & set(config)):
            raise UserError(
                f"config names {', '.join(named)}, which come from the tokenizer. Drop them; see data.vocab."
            )
        if dropped := {name: value for name, value in config.items() if "drop" in name and value}:
            raise UserError(f"config names {dropped}, but models are trained without dropout. Drop it.")
        optimiser = Optimiser(learning_rate, warmup, flat, weight_decay)
        configured = configuration(config)
        exits = check_exits(exits, configured.num_hidden_layers)
        super().__init__(exits, optimiser, compile=compile, export=export, prompts=prompts)
        self.context = context_of(configured)
        self.config = dict(config)
        self.objective = objective
        self._runs = False

    def check(self, trainer: Trainer) -> None:
        """Also run a model of this configuration with a few tokens: transformers finds some mistakes only then.

        Raises:
            UserError: If training could not end well, or transformers cannot run such a model.
        """
        super().check(trainer)
        if self._runs:
            return
        small = copy.deepcopy(configuration(self.config))
        small.vocab_size = 8
        small.bos_token_id = small.eos_token_id = small.pad_token_id = 0
        try:
            with torch.no_grad():
                AutoModelForCausalLM.from_config(small)(torch.tensor([[1, 2, 3]]))
        except Exception as error:
            raise _refused(small.model_type, self.config, error) from error
        self._runs = True

    def build(self) -> HFBackbone:
        """A random model with the vocabulary of the data."""
        tokenizer = self.data.streams.tokenizer
        end = tokenizer.eos_token_id
        ids = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        config = configuration({**self.config, **ids})
        model = AutoModelForCausalLM.from_config(config, attn_implementation=family(config.model_type).attention)
        return HFBackbone(model).requires_grad_(True)

    def batch_loss(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's loss."""
        return self.objective.loss(self.backbone, batch, self.exits, self.global_step)

    def identity(self) -> dict[str, Any]:
        """Configuration and objective."""
        return {"config": self.config, "objective": described(self.objective)}


def check_exits(exits: list[int], depth: int) -> list[int]:
    """The exits, ascending; a UserError if one does not lie below the top, or is given twice."""
    if depth < 2:
        raise UserError(f"A model of {depth} blocks has no place for exits. Give it two or more.")
    if not exits or len(set(exits)) < len(exits) or not all(1 <= each < depth for each in exits):
        raise UserError(
            f"exits {exits} were given to a model of {depth} blocks; wanted different depths in 1 to {depth - 1}."
        )
    return sorted(exits)


def configuration(entries: dict[str, Any]) -> PretrainedConfig:
    """The configuration in transformers that entries of a YAML file describe.

    Raises:
        UserError: If the model type is not in the family table, or an entry is unknown or refused.
    """
    given = dict(entries)
    model_type = given.pop("model_type", None)
    if model_type is None:
        raise UserError(f"config has no model_type: {entries}. Name one, such as llama.")
    family(model_type)
    known = AutoConfig.for_model(model_type).to_dict()
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UserError(
            f"A {model_type} configuration has no {', '.join(unknown)}. It has: {', '.join(sorted(known))}."
        )
    try:
        return AutoConfig.for_model(model_type, **given)
    except (TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        raise _refused(model_type, given, error) from error


def _refused(model_type: str, given: dict[str, Any], error: Exception) -> UserError:
    *_, last = ["", *str(error).strip().splitlines()]
    last = last.strip().rstrip(".") or type(error).__name__
    return UserError(f"The {model_type} configuration {given} was refused: {last}. Change it.")
