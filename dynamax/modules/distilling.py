"""``distill``: a Mamba-2 student, or a hybrid, of a pretrained Transformer. Knows no corpora and no exit heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, final

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from dynamax.backbones.conversion import student_configuration, student_weights
from dynamax.backbones.families import family
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.sources import Source
from dynamax.data.fill import tokenizer_hash
from dynamax.errors import UserError
from dynamax.metrics.language import DepthScores
from dynamax.modules.language import LanguageModule, described
from dynamax.modules.pretraining import check_exits
from dynamax.modules.schedule import Optimiser
from dynamax.objectives.distillation import DistillationLoss
from dynamax.types import Span

Trained = Literal["mixers", "all"]


@final
class DistillationModule(LanguageModule):
    """Replaces attention by Mamba-2 and trains the outcome to predict what the Transformer predicts.

    The student begins with its teacher's weights (``dynamax.backbones.conversion``) and is written as transformers
    would write it. Source: The Mamba in the Llama, https://arxiv.org/abs/2408.15237.

    Checkpoints hold student and optimiser, not the teacher; ``ckpt_path`` resumes an interrupted run, with the text
    that comes next. Needs ``LanguageData`` with the teacher's tokenizer.

    Args:
        teacher: Where the Transformer comes from; of the layout of Llama.
        keep: Blocks that keep their attention, counted from 0; the others become Mamba-2. A student that keeps none
            decodes here, but in transformers without a cache only: its Granite asks an attention block for positions.
        loss: What is learned from the teacher and the text.
        exits: Depths at which validation reads the student beside the top: blocks completed.
        trained: ``mixers``: the new Mamba-2 blocks' mixers, all else stays the teacher's; ``all``: every weight.
        seed: Of what Mamba-2 has and attention has not.
        teacher_dtype: What the teacher computes in. The student is float32, and begins with weights rounded to this.
        learning_rate: Peak.
        warmup: Steps over which the learning rate rises.
        flat: Part of all steps, in [0, 1], after which it falls in a straight line to 0.
        weight_decay: Of AdamW, on matrices; vectors have none.
        compile: Compile the student's blocks for training, with ``torch.compile``. Needs a C++ compiler.
        export: Folder to write the student to; none is written if left out.
        prompts: What the student is made to continue, for the samples on its card.

    Attributes:
        backbone: The student; there once ``configure_model`` has run.

    Raises:
        UserError: If an option is out of range; when fitting, if the teacher is of another layout, the blocks or
            exits are not its own, or the data has another tokenizer.
    """

    notes: ClassVar[str] = "distillation"

    def __init__(
        self,
        teacher: Source,
        keep: list[int],
        loss: DistillationLoss,
        *,
        exits: list[int] | None = None,
        trained: Trained = "mixers",
        seed: int = 0,
        teacher_dtype: str = "float32",
        learning_rate: float = 5e-4,
        warmup: int = 50,
        flat: float = 0.3,
        weight_decay: float = 0.1,
        compile: bool = False,
        export: str | None = None,
        prompts: list[str] | None = None,
    ) -> None:
        optimiser = Optimiser(learning_rate, warmup, flat, weight_decay)
        super().__init__(sorted(exits or []), optimiser, compile=compile, export=export, prompts=prompts)
        self.teacher, self.teacher_dtype, self.keep, self.objective = teacher, teacher_dtype, sorted(keep), loss
        self.trained: Trained = trained
        self.seed = seed
        self._loaded: tuple[HFBackbone, ...] = ()  # in a tuple, so that it is no submodule and in no checkpoint

    # -- teacher and student --------------------------------------------------------------------------

    def check(self, trainer: Trainer) -> None:
        """Load the teacher too, so that mistakes in what is asked of it show before texts are read.

        Raises:
            UserError: If training has no end, the export's place holds something else, there are several devices, or
                the teacher does not have what is asked of it.
        """
        super().check(trainer)
        self._load(trainer)
        self.configuration()

    def _load(self, trainer: Trainer) -> None:
        if self._loaded:
            return
        loaded = self.teacher.load(dtype=self.teacher_dtype, device=str(trainer.strategy.root_device))
        if not isinstance(loaded, HFBackbone):
            raise UserError(
                f"The teacher is a {type(loaded).__name__}, whose weights cannot be converted. Give a model of "
                f"transformers."
            )
        self._loaded, self.context = (loaded,), loaded.spec.context

    def configuration(self) -> PretrainedConfig:
        """The student's; a UserError if the teacher does not have what is asked of it."""
        config = student_configuration(self._teacher.model.config, self.keep)
        if len(self.keep) == config.num_hidden_layers:
            raise UserError(f"keep names all {len(self.keep)} blocks, so none is left to learn. Name fewer.")
        if self.exits:
            check_exits(self.exits, config.num_hidden_layers)
        return config

    @property
    def _teacher(self) -> HFBackbone:
        return self._loaded[0]

    def build(self) -> HFBackbone:
        """The teacher with its attention converted, in float32."""
        tokenizer = tokenizer_hash(self.teacher.tokenizer())
        if self.data.streams.inputs.get("tokenizer") != tokenizer:
            raise UserError(
                "The text was encoded with another tokenizer than the teacher's. Set data.tokenizer to what "
                "model.teacher is."
            )
        self._load(self.trainer)
        config = self.configuration()
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=family(config.model_type).attention, dtype=torch.float32
        )
        generator = torch.Generator().manual_seed(self.seed)
        state = {name: tensor.float().cpu() for name, tensor in self._teacher.model.state_dict().items()}
        model.load_state_dict(student_weights(config, state, generator=generator))
        student = HFBackbone(model)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(self.trained == "all" or ".mamba." in name)
        return student

    def batch_loss(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss between student and teacher."""
        return self.objective.loss(self.backbone, self._teacher, batch)

    def scores(self, depths: Sequence[int]) -> DepthScores:
        """What validation counts, and how far each depth is from the teacher."""
        teacher = self._teacher
        whole = Span(0, teacher.spec.depth)
        return DepthScores(depths, lambda tokens_BT: teacher.unembed(teacher.run(teacher.embed(tokens_BT), whole)))

    def origin(self) -> dict[str, Any]:
        """Student, teacher and loss."""
        spec, config = self._teacher.spec, self._teacher.model.config
        entries = {"model_type": self.backbone.spec.family, "num_hidden_layers": spec.depth, "hidden_size": spec.width}
        named = {name: value for name, value in described(self.teacher).items() if value is not None}
        return {
            "config": {**entries, "keep": self.keep},
            "teacher": {**named, "model_type": config.model_type, "fingerprint": spec.fingerprint},
            "objective": described(self.objective),
            "trained": self.trained,
            "seed": self.seed,
            "teacher_dtype": self.teacher_dtype,
        }

    def identity(self) -> dict[str, Any]:
        """Teacher, kept blocks, what trains, and the loss."""
        return {
            "teacher": self._teacher.spec.fingerprint,
            "keep": self.keep,
            "trained": self.trained,
            "objective": described(self.objective),
        }
