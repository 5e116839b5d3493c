"""What logits do not show must be seen all the same: one deliberately wrong row, backbone or source for each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dynamax.backbones import families
from dynamax.backbones.attention_functions import AttentionCost, turned_by_its_module
from dynamax.backbones.base import Backbone
from dynamax.backbones.check import QUICK
from dynamax.backbones.families import FamilySpec
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.sources import Folder, Source
from dynamax.errors import UserError
from dynamax.testing import check_backbone, check_source
from tests.float64 import upcast64
from tests.tiny import tiny

LLAMA = FamilySpec()


def wrong(monkeypatch: pytest.MonkeyPatch, name: str, **change: Any) -> HFBackbone:
    """A tiny model whose row is changed."""
    model = tiny(name)
    kind = model.config.model_type
    monkeypatch.setitem(families.FAMILIES, kind, dataclasses.replace(families.FAMILIES[kind], **change))
    return HFBackbone(model)


STATE = {
    "a partial rotation": ("stablelm", {"turn": lambda block, k, cos, sin: k}, "written without running it"),
    "blocks without positions": ("smollm3", {"turn": turned_by_its_module}, "written without running it"),
    "norms that are not there": ("olmo2", {"keys_and_values": lambda block, u: bare(block, u)}, "written without"),
    "values in place of keys": ("deepseek_v3", {"turned": "keys"}, "written without running it"),
}


def bare(block: Any, u_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values without their norm."""
    k, v = block.self_attn.k_proj(u_BTD), block.self_attn.v_proj(u_BTD)
    k, v = (x.unflatten(-1, (-1, block.self_attn.head_dim)).transpose(1, 2) for x in (k, v))
    return k, v


@pytest.mark.parametrize("fault", STATE)
def test_state_written_wrongly(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change, message = STATE[fault]
    backbone = wrong(monkeypatch, name, **change)
    with pytest.raises((UserError, RuntimeError), match=f"{message}|must match"):
        check_backbone(backbone, backbone.reference)


def halves(backbone: HFBackbone, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, index: int) -> Any:  # noqa: ANN401
    """As if every family turned the two halves of its channels, and in every block."""
    rotary = backbone.rotary
    assert rotary is not None
    cos, sin = rotary(k_BHTD, torch.ones(1, 1, dtype=torch.long), None)
    turned, kept = k_BHTD.tensor_split([cos.shape[-1]], -1)
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, kept], -1), v_BHTD


@pytest.mark.parametrize("name", ["glm", "cohere", "smollm3", "helium"])
def test_keys_shifted_wrongly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = HFBackbone(tiny(name))
    monkeypatch.setattr(HFBackbone, "shift", halves)
    with pytest.raises(UserError, match="keys that are shifted by one position differ"):
        check_backbone(backbone, backbone.reference)


COSTS = {
    "experts forgotten": ("olmoe", {"expert_share": LLAMA.expert_share}, "running it takes"),
    "keys counted for groups, held for heads": ("falcon", {"attention_cost": LLAMA.attention_cost}, "values of keys"),
    "latents counted as keys": ("deepseek_v3", {"attention_cost": LLAMA.attention_cost}, "values of keys"),
    "all that is written forgotten": (
        "llama",
        {"attention_cost": lambda config, block: AttentionCost(64, 32, 0)},
        "writing its state takes",
    ),
    "adapters of other blocks": ("zamba2", {"uses_parameter": LLAMA.uses_parameter}, "running it takes"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", COSTS)
def test_costs_counted_wrongly(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change, message = COSTS[fault]
    backbone = wrong(monkeypatch, name, **change)
    with pytest.raises(UserError, match=message):
        check_backbone(backbone, backbone.reference)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "cohere2", "gpt_oss", "exaone4"])
def test_a_window_longer_than_the_text(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """It is seen when the model is loaded, too."""
    model = tiny(name, sliding_window=4096, dtype=torch.float32)
    kind = model.config.model_type
    forgotten = dataclasses.replace(families.FAMILIES[kind], windows=LLAMA.windows)
    monkeypatch.setitem(families.FAMILIES, kind, forgotten)
    backbone = HFBackbone(model)
    with pytest.raises(UserError, match="short windows: logits differ"):
        check_backbone(backbone, backbone.reference, modes=QUICK)
    assert model.config.sliding_window == 4096
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="short windows: logits differ"):
        Folder(str(tmp_path)).load()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"rotary": LLAMA.rotary}, "its row of the family table finds none"),
        ("olmo3", {"rotary_types": LLAMA.rotary_types}, "cannot ask for those of the kind None"),
        ("lfm2", {"rotary": lambda base: None}, "says that there are none, but the model has a rotary_emb"),
    ],
)
def test_a_wrong_rotary_is_called_one(name: str, change: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"Rotary angles of {name}: .*{message}"):
        wrong(monkeypatch, name, **change)


class Shuffled(Source):
    """A source whose output stage has another last block than the whole model."""

    def __init__(self, path: str) -> None:
        self.folder = Folder(path)

    def load(self, *, dtype: str = "float32", device: str = "cpu") -> Backbone:
        return self.folder.load(dtype=dtype, device=device)

    def tokenizer(self) -> Any:  # noqa: ANN401
        raise NotImplementedError

    def output_stage(self, *, dtype: str = "float32", device: str = "cpu", blocks: int = 1) -> Backbone:
        top: Any = self.folder.load(dtype=dtype, device=device)
        top._blocks = top._blocks[::-1]
        return top


def test_a_top_that_is_not_the_wholes(tmp_path: Any) -> None:
    """SmolLM3: a block that takes another's place would turn keys that are not to be turned."""
    tiny("smollm3", dtype=torch.float32, no_rope_layers=[1, 1, 1, 1, 1, 0]).save_pretrained(tmp_path)
    check_source(Folder(str(tmp_path)))
    with pytest.raises(UserError, match="its output stage gives other logits than the whole model"):
        check_source(Shuffled(str(tmp_path)))


def test_all_of_it_passes_where_nothing_is_wrong() -> None:
    with upcast64():
        backbone = HFBackbone(tiny("mistral"))
        errors = check_backbone(backbone, backbone.reference, tolerance=1e-12)
    assert {"short windows", "written state", "shifted keys", "counted costs"} <= set(errors)
