"""Rows of other packages: found by entry point, refused where two are offered or what is offered is no row."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from dynamax import registry
from dynamax.backbones import families_table
from dynamax.backbones.attention_functions import alibi_slopes
from dynamax.backbones.families import FAMILIES, REFUSED, FamilySpec, family
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.sources import Folder
from dynamax.errors import UserError
from dynamax.testing import check_backbone
from tests.tiny import redraw, tiny

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
    """Jais 2: a Llama with other norms, and not in our table."""
    with pytest.raises(UserError, match="entry point of the group dynamax.families"):
        family("jais2")
    offer("jais2")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model("jais2", vocab_size=61, pad_token_id=None, eos_token_id=None, **sizes)
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
    offer("jais2", module)
    with pytest.raises(UserError, match="a FamilySpec of dynamax.backbones.families is wanted"):
        family("jais2")


def test_a_package_that_cannot_be_imported_stops_only_who_asks_for_it(offer):
    offer("jais2", "import nothing_of_this_name")
    with pytest.raises(UserError, match="nothing_of_this_name"):
        family("jais2")
    assert isinstance(family("llama"), FamilySpec)


def test_near_types_of_other_packages_are_told(offer):
    offer("jais2")
    with pytest.raises(UserError, match="Did you mean jais2"):
        family("jais22")


def test_names_that_only_sound_alike_are_not_suggested():
    with pytest.raises(UserError, match="is not in the family table. Known"):
        family("stablemark")
    with pytest.raises(UserError, match="Did you mean qwen3"):
        family("qwen-3")


@pytest.mark.parametrize("model_type", REFUSED)
def test_types_that_do_not_come_out_exact_are_refused_with_the_reason(model_type):
    assert model_type not in FAMILIES
    with pytest.raises(UserError, match="cannot be driven block by block: .* Use a model of"):
        family(model_type)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("opt", {"do_layer_norm_before": False}, "it norms behind its layers"),
        ("opt", {"word_embed_proj_dim": 16}, "its embeddings have another width"),
        ("falcon-one-key", {"alibi": True}, "it has ALiBi"),
    ],
)
def test_models_of_another_layout_are_refused_with_the_reason(name, options, reason):
    with pytest.raises(UserError, match=f"cannot be driven block by block: {reason}"):
        HFBackbone(tiny(name, **options))


def test_the_page_of_families_is_current():
    assert set(families_table.EXAMPLES) == set(FAMILIES)
    page = Path(__file__).parents[2] / "docs" / "families.md"
    assert page.read_text() == families_table.table(), (
        "run python -m dynamax.backbones.families_table > docs/families.md"
    )
    readme = page.parents[1] / "README.md"
    assert f"{len(FAMILIES)} model types run today" in readme.read_text()


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 14, 32, 71])
def test_slopes_are_those_of_transformers(heads):
    wanted = _get_alibi_slopes(heads, torch.device("cpu"))
    torch.testing.assert_close(alibi_slopes(AutoConfig.for_model("bloom", n_head=heads)), wanted)


def test_slopes_lie_where_the_model_lies():
    backbone = HFBackbone(tiny("bloom").to("meta"), fingerprint="here")
    assert backbone.slopes.device == backbone.model.device
