"""Blocks compiled for training, and the compiler that takes. Knows modules, no trainer."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

import torch
from torch import nn

from dynamax.errors import UserError


def check_compiler() -> None:
    """Refuse to compile without the compiler that PyTorch calls on a CPU.

    Raises:
        UserError: If it is not installed.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"model.compile needs a C++ compiler, and {compiler} is not installed. Install it (apt install g++), or "
            f"set model.compile to false."
        )


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block in place. One with a mixer of ours is a graph of its own, and PyTorch would stop at eight."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(blocks) + 1)
    for block in blocks:
        block.compile()
