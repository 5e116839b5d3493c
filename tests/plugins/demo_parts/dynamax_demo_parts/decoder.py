"""A decoder from outside: early steps, and a full one every so often."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from dynamax.backbones.base import Backbone
from dynamax.backbones.skipped_state import Exact
from dynamax.decoding.base import Decoder, read_exits
from dynamax.decoding.sampling import Sampler
from dynamax.decoding.session import Session
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Step


class Alternating(Decoder):
    """Asks the policy at most steps; every so often a step runs at full depth unasked.

    Args:
        backbone: The model.
        exits: Its exits.
        policy: When to leave.
        sampler: How tokens are drawn; greedy by default.
        every: Which steps run at full depth; 2 is every other one.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitBank | None = None,
        policy: TerminationPolicy | None = None,
        sampler: Sampler | None = None,
        *,
        every: int = 2,
    ) -> None:
        super().__init__(backbone, exits, policy, sampler)
        _, self._policy = read_exits(self)
        self.every = every

    def options(self) -> dict[str, object]:
        """Which steps run at full depth."""
        return {"every": self.every}

    def steps(self, session: Session) -> Iterator[Step]:
        """An early step, or a full one."""
        yield session.prefill()
        for number in count(1):
            arrival = session.embed() if number % self.every == 0 else session.run_to_exit(self._policy)
            logits_BV = session.leave(arrival, Exact()) if arrival.left else session.run_to_top(arrival)
            yield session.step(arrival, logits_BV, self.sampler(logits_BV))
