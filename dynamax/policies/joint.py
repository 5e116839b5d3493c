"""JEI-DNN's rule: the gates of all exits share one distribution over where a row leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dynamax.policies.base import ScorePolicy, check_gate
from dynamax.types import Evidence


def exit_distribution(confidence_EB: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows leave, by JEI-DNN: an exit takes its gate's confidence of what the exits before it have left over.

    ``P_e = max(0, min(g_e, 1 - sum of g before))``; what remains stays to the top. ``h_e = P_e / (1 - sum of P
    before)`` is the chance to leave at an exit of a row that comes there; 1 where no chance remains to come there.

    Args:
        confidence_EB: The gates' confidences in [0, 1], shallowest exit first.

    Returns:
        ``P_EB`` and ``h_EB``, both in [0, 1].
    """
    before_EB = confidence_EB.cumsum(0) - confidence_EB
    leave_EB = torch.minimum(confidence_EB, 1 - before_EB).clamp_min(0.0)
    arrive_EB = 1 - (leave_EB.cumsum(0) - leave_EB)
    gone_EB = arrive_EB <= torch.finfo(leave_EB.dtype).eps
    return leave_EB, torch.where(gone_EB, 1.0, leave_EB / arrive_EB.masked_fill(gone_EB, 1.0)).clamp(0.0, 1.0)


class JEIGate(ScorePolicy):
    """The chance to leave here of a row that came here, from the gates of this exit and of those before it.

    For gates that were trained with ``JointGates``. An exit leaves at less confidence of its own gate if the gates
    before it were nearly sure. Without joint training ``GateConfidence`` is the rule to use.

    Args:
        threshold: In [0, 1]; one number for all exits, or a mapping from each exit's depth to its own.
        gate: Class name of the gates; may be left out where every exit has just one.

    Source: JEI-DNN (Regol et al. 2024, arXiv 2310.09163), which leaves at 0.5.
    """

    reads_trail = True

    def __init__(self, threshold: float | dict[int, float] = 0.5, *, gate: str | None = None) -> None:
        super().__init__(threshold)
        self.gate = gate
        self.gates = None if gate is None else (gate,)
        self.made_of = self.gates or ()

    def check_gates(self, offered: Mapping[int, Collection[str]], total: int) -> None:
        """Refuse exits without the gate."""
        check_gate(self.gate, offered, total)

    def score(self, evidence: Evidence) -> Tensor:
        """The conditional probability of leaving here, ``h_B``."""
        exits: Sequence[Evidence] = (*evidence.trail, evidence)
        return exit_distribution(torch.stack([each.confidence(self.gate) for each in exits]))[1][-1]
