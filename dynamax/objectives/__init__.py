"""What lenses, gates and whole models are trained towards."""

from dynamax.objectives.base import Objective
from dynamax.objectives.early_exit import LanguageObjective, LayerSkip, NextToken
from dynamax.objectives.gate import GateObjective
from dynamax.objectives.joint import JointGates, JointLenses
from dynamax.objectives.lens import LensDistillation

__all__ = [
    "GateObjective",
    "JointGates",
    "JointLenses",
    "LanguageObjective",
    "LayerSkip",
    "LensDistillation",
    "NextToken",
    "Objective",
]
