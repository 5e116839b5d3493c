"""Termination policies: evidence of one exit in, a decision to leave for each row out."""

from dynamax.policies.base import CountPolicy, ScorePolicy, TerminationPolicy
from dynamax.policies.bounds import Oracle, Random
from dynamax.policies.budget import Budget, LatencyBudget
from dynamax.policies.candidates import CandidateMargin, CandidateProb
from dynamax.policies.combine import AllOf, AnyOf, Cascade, OnlyAt
from dynamax.policies.confidence import Entropy, GateConfidence, Margin, MaxProb, Patience, Saturation, Voting
from dynamax.policies.joint import JEIGate
from dynamax.policies.mixture import BetaMixture, BetaPair
from dynamax.policies.schedule import AtDepth, Decaying, Never, PositionSchedule

__all__ = [
    "AllOf",
    "AnyOf",
    "AtDepth",
    "BetaMixture",
    "BetaPair",
    "Budget",
    "CandidateMargin",
    "CandidateProb",
    "Cascade",
    "CountPolicy",
    "Decaying",
    "Entropy",
    "GateConfidence",
    "JEIGate",
    "LatencyBudget",
    "Margin",
    "MaxProb",
    "Never",
    "OnlyAt",
    "Oracle",
    "Patience",
    "PositionSchedule",
    "Random",
    "Saturation",
    "ScorePolicy",
    "TerminationPolicy",
    "Voting",
]
