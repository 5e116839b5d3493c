"""Rows of other packages: found by entry point, refused where two are offered or what is offered is no row."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dynamax import registry
from dynamax.backbones.families import FAMILIES, FamilySpec, family
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.sources import Folder
from dynamax.errors import UserError
from dynamax.testing import check_backbone
from tests.tiny import redraw

ROW = "from dynamax.backbones.families import FamilySpec\nROW = FamilySpec()\n"


@pytest.fixture
def offer(monkeypatch, tmp_path):
    """Install a package that offers a row: a module, and the record of its entry points."""

    def offered(model_type, module=ROW):
        packages = tmp_path / "packages"
        record = packages / "somebodys_rows-1.0.dist-info"
        record.mkdir(parents=True)
        (packages / "somebodys_rows.py").write_text(module)
        (record / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys_rows\nVersion: 1.0\n")
        (record / "entry_points.txt").write_text(f"[dynamax.families]\n{model_type} = somebodys_rows:ROW\n")
        monkeypatch.syspath_prepend(packages)
        registry._installed.cache_clear()

    yield offered
    sys.modules.pop("somebodys_rows", None)
    monkeypatch.undo()
    registry._installed.cache_clear()


def test_a_family_of_another_package(offer, tmp_path):
    """OLMo: a Llama with norms that have no weights, and not in our table."""
    with pytest.raises(UserError, match="entry point of the group dynamax.families"):
        family("olmo")
    offer("olmo")
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
    torch.testing.assert_close(top.site(2).last_blocks(h_BTD, 1), whole.site(2).last_blocks(h_BTD, 1), rtol=0, atol=0)


def test_two_rows_of_one_type_are_refused(offer):
    offer("llama")
    with pytest.raises(UserError, match="another row, somebodys_rows:ROW"):
        family("llama")
    assert family("mistral") is FAMILIES["mistral"]


@pytest.mark.parametrize("module", ["ROW = {'blocks': 'layers'}", ROW.replace("FamilySpec()", "FamilySpec")])
def test_what_is_no_row_is_refused(module, offer):
    offer("olmo", module)
    with pytest.raises(UserError, match="a FamilySpec of dynamax.backbones.families is wanted"):
        family("olmo")


def test_a_package_that_cannot_be_imported_stops_only_who_asks_for_it(offer):
    offer("olmo", "import nothing_of_this_name")
    with pytest.raises(UserError, match="nothing_of_this_name"):
        family("olmo")
    assert isinstance(family("llama"), FamilySpec)


def test_near_types_of_other_packages_are_told(offer):
    offer("olmo")
    with pytest.raises(UserError, match="Did you mean olmo"):
        family("olmoo")
