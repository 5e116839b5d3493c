"""What a student is trained towards: its teacher's predictions, and its hidden states. Knows no optimiser.

Sources: distillation with a temperature (Hinton et al. 2015, https://arxiv.org/abs/1503.02531); The Mamba in the Llama
(https://arxiv.org/abs/2408.15237), which adds the text's own cross-entropy; hidden states of every block (MOHAWK,
https://arxiv.org/abs/2408.10189).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.backbones.base import Backbone
from dynamax.errors import UserError
from dynamax.kernels import at_least_float32


class DistillationLoss(ABC):
    """A loss over a student, whose weights have gradients, beside its teacher, whose have none."""

    @abstractmethod
    def loss(self, student: Backbone, teacher: Backbone, tokens_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, and what it is made of.

        Args:
            student: The model that learns; as deep and as wide as the teacher, with its vocabulary.
            teacher: The model it learns from.
            tokens_BT: Token ids; each position predicts the next one of its row.

        Returns:
            The loss, a scalar with a gradient, and detached scalars by name: ``cross_entropy/top`` and others.
        """


@final
class LogitDistillation(DistillationLoss):
    """Divergence from the teacher's distribution, with the text's cross-entropy and the hidden states beside it.

    The divergence is KL(teacher || student) in nats a position, both at the temperature, times its square, which
    keeps gradients as large as at temperature 1. The distance of hidden states is the squared difference after a
    block over the teacher's square, the mean of all positions and blocks; without the division a few positions of a
    hundred times the usual length would be all of it.

    Args:
        temperature: Both distributions are softened by it; 1 leaves them.
        divergence: Weight of the divergence.
        cross_entropy: Weight of the cross-entropy of the text's next tokens.
        hidden: Weight of the distance of hidden states; 0 saves computing it.

    Raises:
        UserError: If an option is out of range, or all weights are 0.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        divergence: float = 1.0,
        cross_entropy: float = 0.0,
        hidden: float = 0.0,
    ) -> None:
        weights = (divergence, cross_entropy, hidden)
        if not 0 < temperature < math.inf or not all(0 <= each < math.inf for each in weights) or not any(weights):
            raise UserError(
                f"LogitDistillation was given temperature {temperature} and the weights divergence {divergence}, "
                f"cross_entropy {cross_entropy} and hidden {hidden}; the temperature must be positive, no weight "
                f"negative, one weight positive, and none infinite."
            )
        self.temperature = temperature
        self.divergence, self.cross_entropy, self.hidden = weights

    def loss(self, student: Backbone, teacher: Backbone, tokens_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``DistillationLoss.loss``."""
        with torch.no_grad():
            taught = self._states(teacher, tokens_BT)
            wanted_BTV = teacher.unembed(taught[-1])
        states = self._states(student, tokens_BT)
        logits_BTV = student.unembed(states[-1])
        parts = {
            "divergence": divergence(logits_BTV, wanted_BTV, self.temperature),
            "cross_entropy": F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()),
        }
        if self.hidden:
            parts["hidden"] = torch.stack([distance(*pair) for pair in zip(states, taught, strict=True)]).mean()
        total = torch.stack([getattr(self, name) * part for name, part in parts.items()]).sum()
        seen = {name: part.detach() for name, part in parts.items()}
        return total, {"cross_entropy/top": seen.pop("cross_entropy"), **seen}

    def _states(self, backbone: Backbone, tokens_BT: Tensor) -> list[Tensor]:
        """Hidden states after every block if they are compared, after the last in any case."""
        depth = backbone.spec.depth
        depths = range(1, depth + 1) if self.hidden else [depth]
        return [h_BTD for _, h_BTD in backbone.walk(backbone.embed(tokens_BT), depths)]


def divergence(logits_BTV: Tensor, wanted_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(wanted || given) of all positions, at a temperature and times its square, in nats.

    >>> divergence(torch.zeros(1, 1, 2), torch.tensor([[[0.0, float("-inf")]]]).clamp_min(-1e9)).item()
    0.6931471824645996
    """
    given, wanted = ((logits / temperature).log_softmax(-1).flatten(0, 1) for logits in (logits_BTV, wanted_BTV))
    return temperature**2 * F.kl_div(given, wanted, log_target=True, reduction="batchmean")


def distance(h_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    """Mean over positions of the squared difference over the wanted square.

    >>> distance(torch.ones(1, 2, 4), 2 * torch.ones(1, 2, 4)).item()
    0.25
    """
    h_BTD, wanted_BTD = at_least_float32(h_BTD), at_least_float32(wanted_BTD)
    return ((h_BTD - wanted_BTD).square().sum(-1) / wanted_BTD.square().sum(-1)).mean()
