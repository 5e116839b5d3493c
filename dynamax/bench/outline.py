"""The sizes of a model, from its configuration: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dynamax.backbones.experts import matrices_of
from dynamax.backbones.loading import outline as backbone_outline


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
    bare = backbone_outline(folder)
    model, spec = bare.model, bare.spec
    linears = [(each.out_features, each.in_features) for each in model.modules() if isinstance(each, nn.Linear)]
    for module in model.modules():
        for weight_EOI in matrices_of(module).values():
            experts, rows, columns = weight_EOI.shape
            linears += [(rows, columns)] * round(experts * bare.row.expert_share(model.config))
    return Outline(
        spec.family,
        spec.depth,
        spec.width,
        spec.context,
        sum(weight.numel() for weight in model.parameters()),
        tuple(linears),
    )
