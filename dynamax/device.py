"""Where to run, when nobody says."""

from __future__ import annotations

import torch


def chosen(name: str) -> str:
    """The device that a name means: ``auto`` is a GPU where there is one, else the CPU; others mean themselves."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
