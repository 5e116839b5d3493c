"""Rows of other packages: found by entry point, refused where two are offered or what is offered is no row."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dynamax.backbones import families
from dynamax.backbones.families import FamilySpec, family
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.sources import Folder
from dynamax.errors import UserError
from dynamax.testing import check_backbone
from tests.tiny import redraw


@pytest.fixture
def offer(monkeypatch):
    """Offer an object as the row of a model type, as an installed package would."""
    module = types.ModuleType("somebodys_rows")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def offered(model_type, row):
        setattr(module, model_type.upper(), row)
        point = EntryPoint(model_type, f"{module.__name__}:{model_type.upper()}", "dynamax.families")
        monkeypatch.setattr(families.MODEL_FAMILIES, "_points", {model_type: point})

    return offered


def test_a_family_of_another_package(offer, tmp_path):
    """OLMo: a Llama with norms that have no weights, and not in our table."""
    with pytest.raises(UserError, match="entry point of the group dynamax.families"):
        family("olmo")
    offer("olmo", FamilySpec())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model("olmo", vocab_size=61, pad_token_id=None, eos_token_id=None, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float64)
    redraw(model, seed=0)
    backbone = HFBackbone(model)
    check_backbone(backbone, backbone.reference)
    model.save_pretrained(tmp_path)
    whole, top = Folder(str(tmp_path)).load(dtype="float64"), Folder(str(tmp_path)).output_stage(dtype="float64")
    assert top.spec == whole.spec
    h_BTD = torch.randn(1, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(top.site(2).last_block(h_BTD), whole.site(2).last_block(h_BTD), rtol=0, atol=0)


def test_two_rows_of_one_type_are_refused(offer):
    offer("llama", FamilySpec())
    with pytest.raises(UserError, match="another row, somebodys_rows:LLAMA"):
        family("llama")
    assert family("mistral") is families.FAMILIES["mistral"]


def test_what_is_no_row_is_refused(offer):
    offer("olmo", {"blocks": "layers"})
    with pytest.raises(UserError, match="a FamilySpec of dynamax.backbones.families is wanted"):
        family("olmo")


def test_near_types_of_other_packages_are_told(offer):
    offer("olmo", FamilySpec())
    with pytest.raises(UserError, match="Near: olmo"):
        family("olmoo")
