"""Exit heads: lenses say which token, gates say whether to leave. Nothing here knows a backbone or a policy."""

from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.base import ExitHead, Gate, Lens
from dynamax.heads.gates import AttentionGate, FFNGate, LinearGate, MambaGate, MLPGate, UncertaintyGate
from dynamax.heads.inputs import (
    CandidateStatistics,
    GateInput,
    GateScore,
    HiddenState,
    LensStatistics,
    NgramAgreement,
    PastExits,
    Position,
    TrailStatistics,
)
from dynamax.heads.lenses import LastBlockLens, LogitLens, LowRankLens, TunedLens

__all__ = [
    "AttentionGate",
    "CandidateStatistics",
    "Exit",
    "ExitBank",
    "ExitHead",
    "FFNGate",
    "Gate",
    "GateInput",
    "GateScore",
    "HiddenState",
    "LastBlockLens",
    "Lens",
    "LensStatistics",
    "LinearGate",
    "LogitLens",
    "LowRankLens",
    "MLPGate",
    "MambaGate",
    "NgramAgreement",
    "PastExits",
    "Position",
    "TrailStatistics",
    "TunedLens",
    "UncertaintyGate",
]
