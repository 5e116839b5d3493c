"""Plain decoding at full depth: the baseline that everything is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from dynamax.backbones.base import Backbone
from dynamax.decoding.base import Decoder
from dynamax.decoding.sampling import Sampler
from dynamax.decoding.session import Session
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Step


@final
class Full(Decoder):
    """Every block for every token.

    Args:
        backbone: The model.
        exits: Not read.
        policy: None: it would never be asked.
        sampler: How tokens are drawn; greedy by default.
    """

    lossless: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitBank | None = None,
        policy: TerminationPolicy | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        if policy is not None:
            raise UserError(
                f"Full was given the policy {policy.label}, but it runs every block. Leave the policy out, or decode "
                f"with EarlyExit or SelfSpeculative."
            )
        super().__init__(backbone, None, None, sampler)

    @property
    def teacher_forced(self) -> bool:
        """True: one pass has every position's logits."""
        return True

    def steps(self, session: Session) -> Iterator[Step]:
        """Embed, run to the top, draw."""
        yield session.prefill()
        while True:
            arrival = session.embed()
            logits_BV = session.run_to_top(arrival)
            yield session.step(arrival, logits_BV, self.sampler(logits_BV))
