"""Observers of training and testing. They import ``dynamax``; nothing in ``dynamax`` imports them."""

from callbacks.checkpoint import HeadsCheckpoint
from callbacks.frontier import ExitFrontier
from callbacks.observers import ExitAccuracy, ExitDepth, ExitLatency

__all__ = ["ExitAccuracy", "ExitDepth", "ExitFrontier", "ExitLatency", "HeadsCheckpoint"]
