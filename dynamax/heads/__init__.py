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
from dynamax.heads.lenses import (
    AttentionLens,
    BridgeLens,
    LastBlockLens,
    LogitLens,
    LowRankLens,
    MambaLens,
    MLPLens,
    TunedLens,
    UntiedLens,
)

__all__ = [
    "AttentionGate",
    "AttentionLens",
    "BridgeLens",
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
    "MLPLens",
    "MambaGate",
    "MambaLens",
    "NgramAgreement",
    "PastExits",
    "Position",
    "TrailStatistics",
    "TunedLens",
    "UncertaintyGate",
    "UntiedLens",
]
