"""Early-exit decoding: run to an exit, ask the policy, leave. The text may differ from full decoding's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from dynamax.backbones.base import Backbone
from dynamax.backbones.skipped_state import Exact, SkippedState
from dynamax.decoding.base import Decoder, read_exits
from dynamax.decoding.sampling import Sampler
from dynamax.decoding.session import Session
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Step


@final
class EarlyExit(Decoder):
    """Leaves at the first exit where the policy lets every live row leave. The prompt runs at full depth.

    Args:
        backbone: The model.
        exits: Its exits.
        policy: When to leave.
        sampler: How tokens are drawn; greedy by default.
        skipped_state: What becomes of the state of skipped blocks; Exact by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitBank | None = None,
        policy: TerminationPolicy | None = None,
        sampler: Sampler | None = None,
        *,
        skipped_state: SkippedState | None = None,
    ) -> None:
        super().__init__(backbone, exits, policy, sampler)
        self._bank, self._policy = read_exits(self)
        self.skipped_state = skipped_state or Exact()
        self.skipped_state.validate(backbone)

    @property
    def teacher_forced(self) -> bool:
        """Whether leaving early changes nothing later: exact state, no policy or gate that looks at earlier steps."""
        exact = self.skipped_state.exact and not self._policy.recent and not self._bank.recent
        return exact and not any(self._bank.lens(d).last_blocks for d in self._bank.depths)

    def options(self) -> dict[str, object]:
        """What becomes of skipped state."""
        return {"skipped_state": type(self.skipped_state).__name__}

    def steps(self, session: Session) -> Iterator[Step]:
        """Run to an exit; leave there, or run on to the top."""
        yield session.prefill()
        while True:
            arrival = session.run_to_exit(self._policy)
            logits_BV = session.leave(arrival, self.skipped_state) if arrival.left else session.run_to_top(arrival)
            yield session.step(arrival, logits_BV, self.sampler(logits_BV))
