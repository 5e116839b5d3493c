"""The sizes of a model, from its configuration: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dynamax.backbones.experts import matrices_of
from dynamax.backbones.families import family
from dynamax.backbones.hf import context_of
from dynamax.backbones.loading import read_config


@dataclass(frozen=True)
class Outline:
    """Sizes of a model.

    Attributes:
        family: Model type of transformers.
        depth: Blocks.
        width: Size of a hidden state.
        context: Most tokens of prompt and answer together.
        weights: All numbers, those of tied matrices once.
        linears: Shapes ``(out, in)`` of the matrices that a position is multiplied with: all linear layers, the output
            matrix among them, and as many experts as it takes.
    """

    family: str
    depth: int
    width: int
    context: int
    weights: int
    linears: tuple[tuple[int, int], ...]


def outline(folder: Path) -> Outline:
    """The sizes of the model in a folder.

    Raises:
        UserError: If there is no model that can be read.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [(each.out_features, each.in_features) for each in model.modules() if isinstance(each, nn.Linear)]
    for module in model.modules():
        for weight_EOI in matrices_of(module).values():
            experts, rows, columns = weight_EOI.shape
            linears += [(rows, columns)] * round(experts * family(config.model_type).expert_share(config))
    return Outline(
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        context_of(config),
        sum(weight.numel() for weight in model.parameters()),
        tuple(linears),
    )
