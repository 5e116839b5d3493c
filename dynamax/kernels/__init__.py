"""Recurrences over positions: causal convolution, Mamba-1's and Mamba-2's scans. They know tensors alone.

Each continues from a state, over any number of positions, and returns the state behind the last. Installed kernels of
``mamba_ssm`` and ``causal_conv1d`` run them on a GPU, plain PyTorch elsewhere and in float64: see ``backend``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynamax.errors import UserError

PACKAGES = ("mamba_ssm", "causal_conv1d")


@functools.cache
def backend(package: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """The package, where its kernels take tensors of this device and precision, else ``"torch"``.

    Kernels take CUDA tensors alone, and none in float64. On other devices the package is not even looked for:
    its pure Python part would be.

    Args:
        package: ``"mamba_ssm"`` or ``"causal_conv1d"``.
        device: Where the tensors are.
        dtype: Their precision.
    """
    on_gpu = torch.device(device).type == "cuda" and dtype != torch.float64
    return package if on_gpu and importlib.util.find_spec(package) is not None else "torch"


def kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of an installed package.

    Raises:
        UserError: If the package is there but this part of it cannot be imported.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{package} is installed, but {module}.{name} cannot be imported: {error}. Wanted: a build made for this "
            f"PyTorch and GPU. Rebuild it (pip install --no-build-isolation {package.replace('_', '-')}), or uninstall "
            f"{package} to run in plain PyTorch."
        ) from error


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions in float32; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
