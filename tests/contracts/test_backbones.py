"""Every family keeps the backbone contract in float64, and the contract has teeth."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dynamax.backbones import families
from dynamax.backbones.families import FamilySpec
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.plan import StepPlan
from dynamax.testing import check_backbone
from tests.float64 import upcast64
from tests.tiny import FAMILIES, tiny


@pytest.mark.parametrize("name", FAMILIES)
def test_contract(name):
    with upcast64():
        backbone = HFBackbone(tiny(name))
        errors = check_backbone(backbone, backbone.reference, tolerance=1e-12)
    assert set(errors) >= {"one pass", "uneven chunks", "single steps", "debts", "left padding"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "mamba", "mamba2", "falcon_h1", "lfm2", "qwen3_next"])
def test_tolerances_suit_each_dtype(name, dtype):
    backbone = HFBackbone(tiny(name, dtype=dtype))
    check_backbone(backbone, backbone.reference)


def test_every_row_has_a_variant():
    assert {variant.model_type for variant in FAMILIES.values()} == set(families.FAMILIES)


@pytest.mark.parametrize(("depth", "length"), [(1, 16), (2, 40)])
def test_edges(depth, length):
    backbone = HFBackbone(tiny("mistral", depth=depth))
    check_backbone(backbone, backbone.reference, tokens_BT=torch.arange(length)[None] % 61)


# -- teeth: each fault must be found --------------------------------------------------------------


LLAMA, ROWS = FamilySpec(), families.FAMILIES
FAULTS = {
    "a window too wide": ("mistral", {"windows": LLAMA.windows}),
    "layer types ignored": ("qwen2-window", {"windows": LLAMA.windows}),
    "one window for all": ("gemma3_text", {"windows": ROWS["mistral"].windows}),
    "the cap lost": ("gemma2", {"scale_logits": LLAMA.scale_logits}),
    "positions lost": ("gpt2", {"after_embedding": LLAMA.after_embedding}),
    "another norm": ("llama", {"final_norm": "embed_tokens"}),
    "norms on step, B and C lost": ("falcon_mamba", {"mixer": ROWS["mamba"].mixer}),
    "the embedding's scale lost": ("granitemoehybrid-dense", {"after_embedding": LLAMA.after_embedding}),
    "the logits' scale lost": ("granitemoehybrid-dense", {"scale_logits": LLAMA.scale_logits}),
    "the channels' scales lost": ("falcon_h1", {"mixer": ROWS["mamba2"].mixer}),
    "no rotary angles": ("lfm2", {"rotary": ROWS["gpt2"].rotary}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_row_is_found(fault, monkeypatch):
    name, change = FAULTS[fault]
    model = tiny(name)
    row = families.FAMILIES[model.config.model_type]
    monkeypatch.setitem(families.FAMILIES, model.config.model_type, dataclasses.replace(row, **change))
    with pytest.raises((ValueError, RuntimeError, TypeError)):  # noqa: PT012 - some faults are seen at once
        backbone = HFBackbone(model)
        check_backbone(backbone, backbone.reference)


@pytest.mark.parametrize(("name", "mode"), [("llama", "uneven chunks"), ("gpt2", "left padding")])
def test_no_masks_are_found(name, mode, monkeypatch):
    backbone = HFBackbone(tiny(name))
    monkeypatch.setattr(StepPlan, "mask", lambda self, window, holes=frozenset(): None)
    with pytest.raises(ValueError, match=r"logits differ from the model's own by .* at position"):
        check_backbone(backbone, backbone.reference)


def test_a_wrong_shape_is_told():
    backbone = HFBackbone(tiny("llama"))
    with pytest.raises(ValueError, match="are wanted"):
        check_backbone(backbone, lambda tokens_BT: backbone.reference(tokens_BT)[..., :-1])


def test_too_few_tokens():
    backbone = HFBackbone(tiny("llama"))
    with pytest.raises(ValueError, match="at least 16"):
        check_backbone(backbone, backbone.reference, tokens_BT=torch.zeros(1, 4, dtype=torch.long))
