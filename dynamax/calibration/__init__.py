"""Thresholds with a promise: chosen on some documents, tested on others. Knows policies and texts, no trainer."""

from dynamax.calibration.promise import Promise
from dynamax.calibration.risk import METHODS, Method, promised

__all__ = ["METHODS", "Method", "Promise", "promised"]
