"""Termination policies: evidence of one exit in, a decision to leave for each row out."""

from dynamax.policies.base import CountPolicy, ScorePolicy, TerminationPolicy
from dynamax.policies.candidates import CandidateMargin, CandidateProb
from dynamax.policies.combine import AllOf, AnyOf, Cascade, OnlyAt
from dynamax.policies.confidence import Entropy, GateConfidence, Margin, MaxProb, Patience, Saturation
from dynamax.policies.joint import JEIGate
from dynamax.policies.schedule import AtDepth, Decaying, Never

__all__ = [
    "AllOf",
    "AnyOf",
    "AtDepth",
    "CandidateMargin",
    "CandidateProb",
    "Cascade",
    "CountPolicy",
    "Decaying",
    "Entropy",
    "GateConfidence",
    "JEIGate",
    "Margin",
    "MaxProb",
    "Never",
    "OnlyAt",
    "Patience",
    "Saturation",
    "ScorePolicy",
    "TerminationPolicy",
]
