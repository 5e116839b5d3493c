"""Where to run, when nobody says, and what that is."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import torch


def chosen(name: str) -> str:
    """The device that a name means: ``auto`` is a GPU where there is one, else the CPU; others mean themselves."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def processor(device: torch.device) -> str:
    """The name of what computes: the GPU, or the model of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = []
    with contextlib.suppress(OSError):  # only Linux has this file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
