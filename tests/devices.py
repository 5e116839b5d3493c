"""The device of the tests marked gpu: a CUDA device; the CPU where ``DYNAMAX_GPU_TESTS=cpu`` rehearses them."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("DYNAMAX_GPU_TESTS", "cuda")
ACCELERATOR = "gpu" if DEVICE == "cuda" else DEVICE
missing = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device; none was found"
)
