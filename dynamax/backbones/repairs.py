"""What transformers gets wrong in recurrent mixers, put right where a model is wrapped.

What it gets wrong in chunks (Mamba-1's scan forgets the state, Mamba-2's pads every chunk to 256 positions) needs no
repair here: ``mixers`` runs code of its own.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn


def free_steps(module: nn.Module) -> None:
    """Let chunks and single steps of one mixer agree on step sizes.

    Zamba2 and NemotronH clamp step sizes from below by ``time_step_min``, a bound of their initialisation,
    in chunks and not in single steps, so that their own decoding differs from their own pass over the same
    text. The code they were trained with clamps in neither, unless a configuration names a limit.
    """
    mixer: Any = module
    mixer.time_step_limit = tuple(mixer.config.to_dict().get("time_step_limit") or (0.0, math.inf))


def check_devices(module: nn.Module) -> None:
    """Let CPU tensors take the plain path of transformers' code around one mixer.

    Where ``mamba_ssm`` can be imported, transformers calls its kernels on tensors of any device, and on a CPU
    they fail. Each such function beside the mixer keeps its kernel for CUDA tensors alone.
    """
    place = sys.modules[type(module).__module__]
    for attribute, function in vars(place).copy().items():
        wraps = isinstance(function, FunctionType) and "__wrapped__" in vars(function)
        if wraps and function.__code__.co_filename.endswith("hub_kernels.py"):
            setattr(place, attribute, _by_device(function))


def _by_device(function: FunctionType) -> Callable[..., Any]:
    plain = function.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def chosen(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in (*args, *options.values()))
        return (function if on_gpu else plain)(*args, **options)

    return chosen
