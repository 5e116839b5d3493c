"""Spans captured in CUDA graphs give the bits of plain calls, and the hidden states of ``Backbone.run``."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_speeds import captured
from dynamax.backbones.hf import HFBackbone
from tests.devices import DEVICE, missing
from tests.tiny import tiny

pytestmark = [pytest.mark.gpu, missing]


@pytest.mark.parametrize("family", ["llama", "mistral", "mamba2", "bamba"])
@pytest.mark.parametrize("batch", [1, 3])
def test_captured_spans_are_plain_calls(family: str, batch: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    backbone = HFBackbone(tiny(family, dtype=torch.float32).to(DEVICE))
    prompt_BT = torch.randint(0, 61, (batch, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = captured(backbone, prompt_BT, (2, 3), 4)
    assert found["equals_plain_calls"]
    assert found["recorder"] == ("Graphs" if DEVICE == "cuda" else "Plain")
