"""What a language model that starts from nothing is trained towards, with exits in mind or without.

Knows a backbone and tokens; no optimiser. LayerSkip: https://arxiv.org/abs/2404.16710.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.backbones.base import Backbone
from dynamax.data.text import derived_seed
from dynamax.errors import UserError
from dynamax.types import Span


class LanguageObjective(ABC):
    """A loss over a whole backbone, whose weights have gradients."""

    @abstractmethod
    def loss(
        self, backbone: Backbone, tokens_BT: Tensor, exits: Sequence[int], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, and the cross-entropies it is made of.

        Args:
            backbone: The model.
            tokens_BT: Token ids; each position predicts the next one of its row.
            exits: Depths at which the model is to be read, ascending.
            step: Number of the step, counted from 0. Chance depends on it and on nothing else, so that a
                resumed run goes on as it would have.

        Returns:
            The loss, a scalar with a gradient, and detached scalars by name: ``cross_entropy/top`` and others.
        """


@final
class NextToken(LanguageObjective):
    """Cross-entropy at the top alone: the usual way to train, and the control."""

    def loss(
        self, backbone: Backbone, tokens_BT: Tensor, exits: Sequence[int], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``LanguageObjective.loss``."""
        h_BTD = backbone.run(backbone.embed(tokens_BT), Span(0, backbone.spec.depth))
        top = cross_entropy(backbone, h_BTD, tokens_BT)
        return top, {"cross_entropy/top": top.detach()}


@final
class LayerSkip(LanguageObjective):
    """After LayerSkip: cross-entropy at the top and at one exit, in rotation; deeper blocks are left out at random.

    All depths share the final norm and the output matrix. Simpler than the paper in three ways: a block is left out
    for the whole batch and not by sample, as if it were not there; it is as often at the first step as at the last
    (theirs rises over training from the start); and every exit has the same weight (theirs grows with depth).

    Args:
        weight: Of the exit's cross-entropy; the top's has weight 1.
        dropout: How often the last block is left out, in [0, 1); block ``l`` of L is with
            ``dropout * (2^(l / (L - 1)) - 1)``, which is 0 for the first.
        seed: Of the blocks that are left out.
    """

    def __init__(self, *, weight: float = 1.0, dropout: float = 0.1, seed: int = 0) -> None:
        if not 0 < weight < math.inf or not 0 <= dropout < 1:
            raise UserError(
                f"LayerSkip was given weight {weight} and dropout {dropout}; weight must be positive and dropout must "
                f"lie in [0, 1). To train without exits, use NextToken."
            )
        self.weight, self.dropout, self.seed = weight, dropout, seed

    def loss(
        self, backbone: Backbone, tokens_BT: Tensor, exits: Sequence[int], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``LanguageObjective.loss``."""
        exit_depth, top = exits[step % len(exits)], backbone.spec.depth
        seen: dict[str, Tensor] = {}
        total = torch.zeros((), device=tokens_BT.device)
        absent = left_out(top, step, dropout=self.dropout, seed=self.seed)
        for depth, h_BTD in backbone.walk(backbone.embed(tokens_BT), [exit_depth, top], leave_out=absent):
            name, weight = ("top", 1.0) if depth == top else (str(depth), self.weight)
            loss = cross_entropy(backbone, h_BTD, tokens_BT)
            seen[f"cross_entropy/{name}"] = loss.detach()
            total = total + weight * loss
        return total, seen


def left_out(depth: int, step: int, *, dropout: float, seed: int) -> set[int]:
    """The blocks, of ``depth``, that one step leaves out; see ``chances``."""
    generator = torch.Generator().manual_seed(derived_seed(seed, step))
    out_L = torch.rand(depth, generator=generator) < chances(depth, dropout)
    return set(out_L.nonzero()[:, 0].tolist())


def chances(depth: int, dropout: float) -> Tensor:
    """How often each block is left out (LayerSkip, section 4.1, the same at every step).

    >>> [round(chance, 4) for chance in chances(3, 0.1).tolist()]
    [0.0, 0.0414, 0.1]
    """
    blocks_L = torch.arange(depth) / max(1, depth - 1)
    return dropout * (2**blocks_L - 1)


def cross_entropy(backbone: Backbone, h_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
    """Mean cross-entropy of each row's next tokens, through the final norm and the output matrix.

    The last position has no next token; it is left out before the output matrix, since copying logits is slow.
    """
    logits_BTV = backbone.unembed(h_BTD[:, :-1])
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
