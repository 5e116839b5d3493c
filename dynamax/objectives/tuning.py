"""What a pretrained model is tuned towards so that it can be read early. Knows no optimiser and no adapter.

Sources: LayerSkip (https://arxiv.org/abs/2404.16710) for the exits in rotation and the blocks left out;
self-distillation by depth (Zhang et al. 2019, https://arxiv.org/abs/1905.08094), where the top teaches the exits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.backbones.base import Backbone
from dynamax.data.batch import AnswerBatch
from dynamax.errors import UserError, at_least
from dynamax.heads.base import Lens
from dynamax.objectives.early_exit import left_out
from dynamax.types import Span

Teacher = Literal["original", "top"]


def counted_logits(backbone: Backbone, h_BTD: Tensor, counted_BT: Tensor, lens: Lens | None = None) -> Tensor:
    """``logits_NV`` of the counted positions, through the final norm and the output matrix, or through a lens."""
    h_1ND = h_BTD[counted_BT][None]
    if lens is None:
        return backbone.unembed(h_1ND)[0]
    site = backbone.site(1)  # its norm and its output matrix are those of every depth
    return lens.project(lens.translate(h_1ND, site), site)[0]


class TuningLoss(ABC):
    """A loss over a model that is tuned, beside the model that it was."""

    @abstractmethod
    def loss(
        self,
        tuned: Backbone,
        original: Backbone,
        batch: AnswerBatch,
        exits: Sequence[int],
        step: int,
        lenses: Mapping[int, Lens] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, and what it is made of.

        Args:
            tuned: The model that learns.
            original: The same model before tuning; nothing of it has a gradient.
            batch: Documents, with at least one counted position.
            exits: Depths at which the model is to be read, ascending.
            step: Number of the step, counted from 0. Chance depends on it and on nothing else, so that a resumed
                run goes on as it would have.
            lenses: What exits are read through, by depth; the logit lens where there is none.

        Returns:
            The loss, a scalar with a gradient, and detached scalars by name: ``cross_entropy/top`` and others.
        """


@final
class ExitTuning(TuningLoss):
    """Exits learn what the top says, the top stays what it was; deeper blocks are left out at random.

    Exits are read through the lenses that are given, else by the logit lens: the final norm and the output matrix. The
    parts are means over the counted
    positions, in nats, and means over the exits that a step reads:

    - ``distil`` x KL(teacher || exit), which is self-distillation by depth;
    - ``hold`` x KL(original's top || top);
    - ``text`` x (cross-entropy at the exit + cross-entropy at the top), which is LayerSkip's loss.

    Args:
        distil: Weight of what exits learn from the teacher.
        hold: Weight of what holds the top to the original.
        text: Weight of the cross-entropy of the text's next tokens.
        teacher: Who teaches the exits: the ``original``'s top, or the tuned model's own ``top``, which then has no
            gradient from it. In a step that leaves out blocks the own top lacks them, too.
        exits_at_once: Exits that a step reads, in rotation; each costs an output matrix.
        dropout: How often the last block is left out, in [0, 1); the others less often, as in ``LayerSkip``.
        seed: Of the blocks that are left out.

    Raises:
        UserError: If an option is out of range, or no weight teaches the exits.
    """

    def __init__(
        self,
        *,
        distil: float = 1.0,
        hold: float = 1.0,
        text: float = 0.0,
        teacher: Teacher = "original",
        exits_at_once: int = 1,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        at_least(self, 1, exits_at_once=exits_at_once)
        if not all(0 <= each < math.inf for each in (distil, hold, text)) or not (distil or text):
            raise UserError(
                f"ExitTuning was given the weights distil {distil}, hold {hold} and text {text}; none may be negative "
                f"or infinite, and distil or text must be positive, or the exits would learn nothing."
            )
        if not 0 <= dropout < 1:
            raise UserError(f"ExitTuning was given dropout {dropout}; it must lie in [0, 1).")
        if teacher not in ("original", "top"):
            raise UserError(f"ExitTuning was given teacher {teacher!r}; wanted: original or top.")
        self.distil, self.hold, self.text = distil, hold, text
        self.teacher: Teacher = teacher
        self.exits_at_once, self.dropout, self.seed = exits_at_once, dropout, seed

    def loss(
        self,
        tuned: Backbone,
        original: Backbone,
        batch: AnswerBatch,
        exits: Sequence[int],
        step: int,
        lenses: Mapping[int, Lens] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``TuningLoss.loss``."""
        top, read = tuned.spec.depth, min(self.exits_at_once, len(exits))
        turn = sorted(exits[(step * read + place) % len(exits)] for place in range(read))
        logp: dict[int, Tensor] = {}
        absent = left_out(top, step, dropout=self.dropout, seed=self.seed)
        for depth, h_BTD in tuned.walk(tuned.embed(batch.tokens_BT), [*turn, top], leave_out=absent):
            lens = (lenses or {}).get(depth)
            logp[depth] = counted_logits(tuned, h_BTD, batch.counted_BT, lens).log_softmax(-1)
        parts: dict[str, Tensor] = {}
        taught_NV = logp[top].detach()
        if self.hold or (self.distil and self.teacher == "original"):
            with torch.no_grad():
                h_BTD = original.run(original.embed(batch.tokens_BT), Span(0, top))
                original_NV = counted_logits(original, h_BTD, batch.counted_BT).log_softmax(-1)
            parts["hold"] = divergence(original_NV, logp[top])
            taught_NV = original_NV if self.teacher == "original" else taught_NV
        entropy = {depth: F.nll_loss(logp_NV, batch.next_N) for depth, logp_NV in logp.items()}
        seen = {f"cross_entropy/{'top' if depth == top else depth}": loss for depth, loss in entropy.items()}
        if self.distil:
            distilled = {depth: divergence(taught_NV, logp[depth]) for depth in turn}
            parts["distil"] = torch.stack(list(distilled.values())).mean()
            seen |= {f"distil/{depth}": loss for depth, loss in distilled.items()}
        if self.text:
            parts["text"] = entropy[top] + torch.stack([entropy[depth] for depth in turn]).mean()
        total = torch.stack([getattr(self, name) * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in {**seen, **parts}.items()}


def divergence(wanted_NV: Tensor, given_NV: Tensor) -> Tensor:
    """Mean KL(wanted || given) of log-probabilities, in nats a position."""
    return F.kl_div(given_NV, wanted_NV, log_target=True, reduction="batchmean")
