"""Static state and masks, in float64 over the families: what is captured computes what ``Backbone.run`` computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu_graphs import CapturedDecoder, Plain, distance
from benchmarks.gpu_speeds import prefilled
from dynamax.backbones.hf import HFBackbone
from dynamax.decoding.full import Full
from tests.float64 import upcast64
from tests.tiny import FAMILIES, tiny

NO_POSITIONS = [family for family in FAMILIES if not family.startswith("gpt2")]
DEPTHS = (2, 3, 6)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with upcast64():
        yield


def text(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
@pytest.mark.parametrize("family", NO_POSITIONS)
def test_hidden_states_are_those_of_run(family: str) -> None:
    backbone, prompt_BT = HFBackbone(tiny(family)), text(2, 7)
    cache, token_B1 = prefilled(backbone, prompt_BT)
    decoder = CapturedDecoder(backbone, cache, token_B1, DEPTHS, capacity=24, record=Plain())
    for depth in DEPTHS:
        decoder.load(cache, token_B1)
        assert distance(decoder, prefilled(backbone, prompt_BT)[0], depth, 9) < 1e-9


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "mamba", "mamba2", "bamba"])
def test_chunks_are_those_of_run(family: str) -> None:
    backbone, prompt_BT = HFBackbone(tiny(family)), text(1, 7)
    cache, token_B1 = prefilled(backbone, prompt_BT)
    decoder = CapturedDecoder(backbone, cache, token_B1, [6], capacity=24, record=Plain(), rows=3)
    assert distance(decoder, cache, 6, 4) < 1e-9


@torch.inference_mode()
def test_tokens_are_those_of_full_decoding() -> None:
    backbone, prompt_BT = HFBackbone(tiny("llama")), text(2, 5)
    wanted = torch.stack([step.token_B for step in Full(backbone).decode(prompt_BT, max_new_tokens=9)], 1)
    cache, token_B1 = prefilled(backbone, prompt_BT)
    decoder = CapturedDecoder(backbone, cache, token_B1, DEPTHS, capacity=16, record=Plain())
    got = [token_B1]
    for step in [decoder.step, decoder.step_plainly] * 4:
        step(6)
        got.append(decoder.token_BT.clone())
    assert torch.equal(torch.cat(got, 1), wanted)
