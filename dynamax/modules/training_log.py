"""What a training run has seen, how its loss fell, and how a backbone is read at every depth. Knows no trainer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.errors import UserError

POINTS = 40


@final
class TrainingLog:
    """Tokens, seconds, and the loss of every step. Travels in checkpoints.

    Attributes:
        tokens: Tokens seen.
        seconds: Of training, validation between steps included.
        losses: Cross-entropy of the top, by step.
        scores: What validation found, by steps done and depth.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.losses: list[Tensor | float] = []
        self.scores: dict[int, dict[int, dict[str, float]]] = {}

    def add(self, loss: Tensor, tokens: int) -> None:
        """One step more; the loss stays on its device until it is asked for."""
        self.losses.append(loss.detach())
        self.tokens += tokens

    def check(self) -> None:
        """Refuse to go on once the loss is no number.

        Raises:
            UserError: If the newest loss is infinite or not a number.
        """
        if self.losses and not math.isfinite(float(self.losses[-1])):
            raise UserError(
                f"The loss of step {len(self.losses)} is {float(self.losses[-1])}. Lower model.learning_rate, or train "
                f"in another precision (trainer.precision: bf16-mixed or 32-true), and train anew."
            )

    def state(self) -> dict[str, Any]:
        """As plain numbers."""
        self.losses = [float(loss) for loss in self.losses]
        return {"tokens": self.tokens, "seconds": self.seconds, "losses": self.losses, "scores": self.scores}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.losses, self.scores = list(state["losses"]), dict(state["scores"])

    def curve(self) -> list[tuple[int, float]]:
        """Up to 40 points: steps done, and the mean loss of the steps since the point before."""
        losses = [float(loss) for loss in self.losses]
        size = max(1, -(-len(losses) // POINTS))
        parts = [losses[start : start + size] for start in range(0, len(losses), size)]
        done = itertools.accumulate(map(len, parts))
        return [(steps, sum(part) / len(part)) for steps, part in zip(done, parts, strict=True)]


def read_depths(backbone: Backbone, tokens_BT: Tensor, depths: Sequence[int]) -> list[Tensor]:
    """Logits ``logits_BTV`` at each depth, all through the final norm and the output matrix.

    Args:
        backbone: The model.
        tokens_BT: Token ids.
        depths: Blocks completed, ascending.
    """
    return [backbone.unembed(h_BTD) for _, h_BTD in backbone.walk(backbone.embed(tokens_BT), depths)]
