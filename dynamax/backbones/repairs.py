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

IGNORED_LIMITS = ("Zamba2MambaMixer", "NemotronHMamba2Mixer")


def repair(module: nn.Module) -> None:
    """Put right what is wrong with one mixer.

    Args:
        module: transformers' mixer.
    """
    free_steps(module)
    check_devices(type(module).__module__)


def free_steps(module: nn.Module) -> None:
    """Let chunks and single steps agree on step sizes.

    Zamba2 and NemotronH clamp step sizes from below by ``time_step_min``, a bound of their initialisation,
    in chunks and not in single steps, so that their own decoding differs from their own pass over the same
    text. The code they were trained with clamps in neither.
    """
    mixer: Any = module
    if type(module).__name__ in IGNORED_LIMITS:
        mixer.time_step_limit = (0.0, math.inf)


def check_devices(name: str) -> None:
    """Let CPU tensors take the plain path of one of transformers' modules.

    Where ``mamba_ssm`` can be imported, transformers calls its kernels on tensors of any device, and on a CPU
    they fail. Each such function of the module keeps its kernel for CUDA tensors alone.
    """
    for attribute, function in vars(sys.modules[name]).copy().items():
        wraps = isinstance(function, FunctionType) and "__wrapped__" in vars(function)
        if wraps and function.__code__.co_filename.endswith("hub_kernels.py"):
            setattr(sys.modules[name], attribute, _by_device(function))


def _by_device(function: FunctionType) -> Callable[..., Any]:
    plain = function.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def chosen(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in args)
        return (function if on_gpu else plain)(*args, **options)

    return chosen
