"""Decoding that replays CUDA graphs says what it says without, over the families and decoders."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

import dynamax
from benchmarks.gpu_graphs import recorder
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.precision import capture_steps, set_precision
from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.speculative import SelfSpeculative
from tests.devices import DEVICE, missing
from tests.folders import model_folder
from tests.gpu.test_laws_gpu import EveryThird, backbone_of, bank_of, same_tokens, text
from tests.tiny import EXPERTS, FAMILIES, tiny

pytestmark = [pytest.mark.gpu, missing]
REFUSED = ("falcon", "falcon-one-key")
"""They pick keys by a list of numbers, which transformers copies to the device in every step: no graph can do that."""
DEPTHS = (2, 3, 5)
MAKES: list[Callable[[HFBackbone], Decoder]] = [
    Full,
    lambda backbone: EarlyExit(backbone, bank_of(backbone), EveryThird()),
    lambda backbone: SelfSpeculative(backbone, bank_of(backbone), EveryThird(), draft_limit=3),
]


def said(decoder: Decoder) -> list[int]:
    return [int(step.token_B) for step in decoder.decode(text(9), max_new_tokens=24)]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in {*EXPERTS, *REFUSED}])
def test_captured_steps_say_what_others_say(family: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    backbone = backbone_of(family, torch.float32)
    for number, make in enumerate(MAKES):
        backbone.captured = None
        wanted = said(make(backbone))
        if not number:
            capture_steps(backbone, DEPTHS, recorder=recorder(DEVICE))
            captured = backbone.captured
        backbone.captured = captured
        same_tokens(backbone, text(9), said(make(backbone)), wanted)
    assert captured is not None
    assert captured.replays


@pytest.mark.skipif(find_spec("torchao") is None or DEVICE == "cpu", reason="needs torchao and a CUDA device")
def test_int8_weights_can_be_captured() -> None:
    """``capture_steps`` compares what is replayed with what is not."""
    backbone = HFBackbone(tiny("llama", dtype=torch.bfloat16)).to(DEVICE)
    choice = capture_steps(backbone, DEPTHS, set_precision(backbone, "int8"))
    assert (choice.format, choice.graphs) == ("Int8Torchao", 16)


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU inductor compiles")
@pytest.mark.parametrize("precision", [None, "auto"])
def test_an_engine_that_compiles_captures(tmp_path_factory: pytest.TempPathFactory, precision: str | None) -> None:
    folder = model_folder(tmp_path_factory.mktemp("model"))
    options = {"exits": [2, 4], "device": DEVICE, "precision": precision}
    plain, fast = dynamax.load(folder, **options), dynamax.load(folder, **options, compile=True)
    assert fast.precision is not None
    assert fast.precision.graphs == 3 * 4
    policy = dynamax.AtDepth(2)
    answers = [engine.generate("Hi", policy, max_new_tokens=16) for engine in (plain, fast)]
    assert answers[0].depths == answers[1].depths
    assert fast.backbone.captured is not None
    assert fast.backbone.captured.replays
