"""Sources: folders in, proven backbones out; whatever is wrong is told."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from dynamax.backbones import families, sources
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.sources import GGUF, Folder, Hub, SmolLM2, Source, source_from
from tests.tiny import tiny

TOKENS_BT = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DYNAMAX_CACHE", str(folder))
    return folder


@pytest.fixture
def llama(tmp_path):
    """A tiny model in a folder, and the folder."""
    model = tiny("llama", dtype=torch.float32)
    folder = tmp_path / "llama"
    model.save_pretrained(folder)
    return model, folder


# -- Folder; what is read of it, and how, is in test_loading -----------------------------------------------


def test_the_top_is_the_top_only(llama):
    _, folder = llama
    top, backbone = Folder(str(folder)).output_stage(), Folder(str(folder)).load()
    one_block = sum(parameter.numel() for parameter in backbone.model.model.layers[-1].parameters())
    assert sum(parameter.numel() for parameter in top.parameters()) == one_block + 32 + 61 * 32
    assert not any(module.training for child in top.train().children() for module in child.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_one_fingerprint_in_every_dtype(dtype, llama):
    model, folder = llama
    backbone = Folder(str(folder)).load(dtype=dtype)
    assert str(backbone.model.dtype) == f"torch.{dtype}"
    assert backbone.spec.fingerprint == HFBackbone(model).spec.fingerprint
    assert Folder(str(folder)).output_stage(dtype=dtype).spec.fingerprint == backbone.spec.fingerprint


def test_mixtral_in_float64(tmp_path):
    tiny("mixtral", dtype=torch.float32).save_pretrained(tmp_path)
    Folder(str(tmp_path)).load(dtype="float64")


def test_bad_options(llama):
    _, folder = llama
    with pytest.raises(ValueError, match="'int3' was given; one of float32, bfloat16"):
        Folder(str(folder)).load(dtype="int3")
    with pytest.raises(ValueError, match="'abacus' was given, but cannot be used"):
        Folder(str(folder)).load(device="abacus")


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        Folder(str(tmp_path / "none")).load()
    with pytest.raises(ValueError, match="has no config.json"):
        Folder(str(tmp_path)).load()


def test_an_unknown_family_is_told_before_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "jais2"}))
    with pytest.raises(ValueError, match="'jais2' is not in the family table"):
        Folder(str(tmp_path)).load()
    with pytest.raises(ValueError, match="'jais2' is not in the family table"):
        Folder(str(tmp_path)).output_stage()


def test_no_safetensors(llama):
    _, folder = llama
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has neither model.safetensors nor"):
        Folder(str(folder)).load()


def test_a_missing_shard(tmp_path):
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(ValueError, match="is missing, but the index names it"):
        Folder(str(tmp_path)).load()


@pytest.mark.parametrize("lost", ["model.layers.5.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_weight_is_not_left_random(lost, llama):
    _, folder = llama
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing keys: "):
        Folder(str(folder)).load()
    with pytest.raises(ValueError, match="missing keys: "):
        Folder(str(folder)).output_stage()


def test_a_row_that_is_wrong_is_found_at_load_time(monkeypatch, tmp_path):
    tiny("gemma2", dtype=torch.float32).save_pretrained(tmp_path)
    wrong = dataclasses.replace(families.FAMILIES["gemma2"], scale_logits=families.FamilySpec().scale_logits)
    monkeypatch.setitem(families.FAMILIES, "gemma2", wrong)
    with pytest.raises(ValueError, match="logits differ from the model's own"):
        Folder(str(tmp_path)).load()


# -- Hub ----------------------------------------------------------------------------------------------


def test_the_hub_without_a_network(monkeypatch):
    def offline(*_, **__):
        raise OfflineModeIsEnabled("no network here")

    monkeypatch.setattr(sources, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"some/model at v1 could not be fetched from the hub: no network here"):
        Hub("some/model", revision="v1").load()


def test_the_hub_with_a_bad_name():
    with pytest.raises(ValueError, match="could not be fetched from the hub"):
        Hub("no/such/name").load()


def test_a_hub_snapshot(monkeypatch, llama):
    model, folder = llama
    monkeypatch.setattr(sources, "snapshot_download", lambda name, **_: str(folder))
    backbone = Hub("some/model").load()
    torch.testing.assert_close(backbone.reference(TOKENS_BT), model(TOKENS_BT).logits)


# -- GGUF: errors; the rest is in test_gguf ---------------------------------------------------------------


def test_gguf_errors(tmp_path):
    with pytest.raises(ValueError, match="is not a file. Give the path of a GGUF"):
        GGUF(str(tmp_path / "none.gguf")).load()
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not one")
    with pytest.raises(ValueError, match="is wanted. The file is damaged or another one"):
        GGUF(str(path), sha256="0" * 64).load()
    with pytest.raises(ValueError, match="is not a readable GGUF file"):
        GGUF(str(path)).load()


# -- recipes: which source it was -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "options"),
    [
        (SmolLM2(), "SmolLM2", {"wheel": None}),
        (Hub("some/model", revision="v1"), "Hub", {"name": "some/model", "revision": "v1"}),
        (Hub(name="some/model"), "Hub", {"name": "some/model", "revision": None}),
    ],
)
def test_a_recipe_makes_the_source_again(source, name, options):
    assert source.recipe == {"class": name, "options": options}
    again = source_from(json.loads(json.dumps(source.recipe)))
    assert type(again) is type(source)
    assert vars(again) == vars(source)


def test_paths_of_a_recipe_hold_in_every_folder(llama, monkeypatch, tmp_path):
    _, folder = llama
    monkeypatch.chdir(folder.parent)
    source = Folder(folder.name)
    hub, file = Hub(folder.name), GGUF("x.gguf", sha256="0" * 64)
    monkeypatch.chdir("/")
    assert source.recipe["options"] == {"path": str(folder)}
    assert source_from(source.recipe).load().spec.family == "llama"
    assert hub.recipe["options"]["name"] == folder.name  # a repository, though a folder has its name
    assert file.recipe["options"] == {"path": str(folder.parent / "x.gguf"), "sha256": "0" * 64}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~/llama").recipe["options"] == {"path": str(folder)}
    assert copy.deepcopy(source).recipe == pickle.loads(pickle.dumps(source)).recipe == source.recipe


class Odd(Source):
    def __init__(self, given, *, scale=1.0, **more):
        self.given = given

    def load(self, *, dtype="float32", device="cpu"):
        raise NotImplementedError

    def tokenizer(self):
        raise NotImplementedError


class Nameless(Odd):
    def __init__(self, *given):
        super().__init__(given)


def test_a_recipe_is_json(tmp_path):
    assert Odd(tmp_path, far=2).recipe["options"] == {"given": str(tmp_path), "scale": 1.0, "far": 2}
    assert Nameless(1, 2).recipe["options"] == {"*given": [1, 2]}
    with pytest.raises(ValueError, match="does not take the options"):
        source_from(Nameless(1, 2).recipe)
    assert Odd(1).recipe["class"] == f"{__name__}.Odd"
    with pytest.raises(ValueError, match=r"Odd was given given=tensor.* recorded as JSON"):
        _ = Odd(torch.zeros(1)).recipe


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("Foldr", {}, "Did you mean Folder"),
        ("nobodys.module.Class", {}, "cannot be imported"),
        ("json.JSONDecoder", {}, "is no backbone source"),
        ("Folder", {"name": "x"}, "Folder does not take the options"),
        ("Folder", {}, "Folder does not take the options"),
    ],
)
def test_a_recipe_that_cannot_be_followed(name, options, told):
    with pytest.raises(ValueError, match=told):
        source_from({"class": name, "options": options})


# -- generation: what the model's makers wrote ----------------------------------------------------------


def test_the_folders_generation_config_is_read(llama):
    model, folder = llama
    GenerationConfig(eos_token_id=[0, 53], temperature=0.6, do_sample=True).save_pretrained(folder)
    found = Folder(str(folder)).generation_config()
    assert (found.eos_token_id, found.temperature, found.do_sample) == ([0, 53], 0.6, True)
    assert Folder(str(folder)).load().model.generation_config.eos_token_id == [0, 53]


def test_without_one_the_configuration_tells(llama):
    _, folder = llama
    (folder / "generation_config.json").unlink()
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, "eos_token_id": [2, 7], "bos_token_id": 1}))
    found = Folder(str(folder)).generation_config()
    assert (found.eos_token_id, found.bos_token_id) == ([2, 7], 1)


@pytest.mark.parametrize("content", ["{", "", "[]"])
def test_a_broken_one_is_named(content, llama):
    _, folder = llama
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match="generation_config.json"):
        Folder(str(folder)).generation_config()
