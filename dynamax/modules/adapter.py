"""A low-rank adapter around a frozen model, made and written by PEFT. Knows no loss and no trainer."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast, final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.tuned import PREFIX, WEIGHTS
from dynamax.errors import UserError
from dynamax.modules.checks import all_finite
from dynamax.types import Span


@final
@dataclass(frozen=True)
class LowRank:
    """A low-rank adapter: W + alpha / rank x B A, of which A and B are trained.

    Source: LoRA, https://arxiv.org/abs/2106.09685.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Scale of what is added, times the rank.
        modules: Names of the linear layers that get one, such as ``q_proj``; left out, all linear layers of the blocks.
    """

    rank: int = 16
    alpha: float = 32.0
    modules: list[str] | None = None

    def config(self, backbone: HFBackbone) -> Any:  # noqa: ANN401 - PEFT's
        """PEFT's description of the adapter around a model.

        Raises:
            UserError: If the model has no such layers, or PEFT is not installed.
        """
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise UserError(
                f"A low-rank adapter needs PEFT, which is not installed ({error}). Install it: pip install "
                f"'dynamax-exits[tune]'; or train every weight, with model.adapter: null."
            ) from error
        inside = blocks_of(backbone).named_modules()
        linear = {name.rpartition(".")[2]: each for name, each in inside if isinstance(each, nn.Linear | Conv1D)}
        named = sorted(linear) if self.modules is None else self.modules
        if unknown := sorted(set(named) - set(linear)):
            raise UserError(
                f"The adapter names the modules {unknown}; the linear layers of this model's blocks are "
                f"{', '.join(sorted(linear))}. Name some of these."
            )
        if not named:
            raise UserError("The adapter names no modules. Name some, or leave modules out, for all linear layers.")
        return LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha),
            target_modules=named,
            fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in named),
            task_type="CAUSAL_LM",
        )

    def around(self, original: HFBackbone, seed: int) -> HFBackbone:
        """The model with an adapter that changes nothing yet; all else are the very tensors of the original.

        Args:
            original: The frozen model, which stays as it is.
            seed: Of the first weights.

        Raises:
            UserError: If some module's adapter is never asked.
        """
        from peft import inject_adapter_in_model

        kept = {id(each): each for each in chain(original.model.parameters(), original.model.buffers())}
        model = copy.deepcopy(original.model, kept)  # other modules around the same tensors
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(self.config(original), model.base_model.get_submodule(original.row.blocks))
        tuned = HFBackbone(model, fingerprint=original.spec.fingerprint)
        for name, parameter in tuned.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        tokens_BT = torch.arange(8, device=tuned.output_matrix.device)[None] % tuned.spec.vocab
        tuned.run(tuned.embed(tokens_BT), Span(0, tuned.spec.depth)).square().sum().backward()
        silent = [name for name, each in tuned.named_parameters() if ".lora_B." in name and each.grad is None]
        if silent:
            raise UserError(
                f"An adapter at {silent[0].split('.lora_B.')[0]} would change nothing, since this model takes that "
                f"layer's weights without calling it. Name other layers in model.adapter.modules."
            )
        tuned.zero_grad()
        return tuned

    def tensors(self, tuned: HFBackbone) -> dict[str, Tensor]:
        """The adapter's matrices in float16, by PEFT's names; each process asks, if the blocks are sharded.

        Args:
            tuned: The model in training.
        """
        blocks = blocks_of(tuned)
        inside = next(name for name, each in tuned.model.named_modules() if each is blocks)
        held = {name.replace(".default.", "."): each for name, each in blocks.named_parameters() if ".lora_" in name}
        return {
            f"{PREFIX}{inside}.{name}": (each.full_tensor() if isinstance(each, DTensor) else each)
            .detach()
            .half()
            .cpu()
            for name, each in held.items()
        }

    def write(
        self, folder: Path, tensors: Mapping[str, Tensor], original: HFBackbone, recipe: Mapping[str, Any]
    ) -> str:
        """Write the adapter in PEFT's files.

        Args:
            folder: Where to.
            tensors: The adapter; see ``tensors``.
            original: The model before.
            recipe: Where the original comes from.

        Returns:
            SHA-256 of the weights' file.

        Raises:
            UserError: If a weight is not finite in float16.
        """
        if not all_finite(tensors.values()):
            raise UserError(
                "The adapter was not written: a weight is too large for float16, or not a number. Lower "
                "model.learning_rate, or set trainer.gradient_clip_val: 1, and tune anew."
            )
        save_file(dict(tensors), folder / WEIGHTS, {"format": "pt"})
        config = self.config(original)
        config.base_model_name_or_path, config.inference_mode = json.dumps(recipe), True
        config.save_pretrained(folder)
        return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def blocks_of(backbone: HFBackbone) -> nn.ModuleList:
    """The blocks of a model."""
    blocks: Any = backbone.model.base_model.get_submodule(backbone.row.blocks)
    return blocks
