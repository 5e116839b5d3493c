"""What every figure must come with: machine, device, dtype, batch, versions."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device | str = "cpu", *, dtype: str, batch: int) -> dict[str, Any]:
    """Where and with what a measurement was made."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        name = torch.cuda.get_device_name(device)
    else:
        names = []
        with contextlib.suppress(OSError):  # only Linux has this file
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": dtype,
        "batch": batch,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if on_gpu else None,
        **{name: version(name) for name in ("torch", "transformers", "lightning")},
    }
