"""What every figure must come with: machine, device, dtype, batch, versions."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from dynamax.backbones.precision import Choice
from dynamax.device import processor


def environment(
    device: torch.device | str = "cpu", *, dtype: str, batch: int, precision: Choice | None = None
) -> dict[str, Any]:
    """Where and with what a measurement was made.

    Args:
        device: What computed.
        dtype: What it computed in.
        batch: Sequences at a time.
        precision: How weights were held; None for as they were loaded.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "device": processor(device),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": dtype,
        "precision": None if precision is None else precision.precision,
        "weights": None if precision is None else precision.format,
        "compile_seconds": None if precision is None else precision.compiling,
        "graphs": None if precision is None else precision.graphs,
        "batch": batch,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if on_gpu else None,
        **{name: version(name) for name in ("torch", "transformers", "lightning")},
    }
