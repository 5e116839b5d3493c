"""What is wrong with a model folder is told by the file's name, whichever library stumbled over it."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from dynamax.backbones.sources import Folder
from dynamax.errors import UserError
from tests.folders import model_folder

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def content(what):
    return lambda path: path.write_bytes(what)


DAMAGE = {
    "a file cut short": ("model.safetensors", cut, "model.safetensors is damaged or was not fetched to its end"),
    "weights that are a pointer": ("model.safetensors", content(POINTER), "is a pointer of Git LFS"),
    "empty weights": ("model.safetensors", content(b""), "model.safetensors is empty"),
    "weights that are none": (
        "model.safetensors",
        content(b"<html>not found</html>" * 9),
        "model.safetensors is damaged",
    ),
    "a broken index": ("model.safetensors.index.json", content(b'{"weight_map": '), "index.json is not valid JSON"),
    "an index without a map": ("model.safetensors.index.json", content(b"{}"), "model.safetensors.index.json"),
    "an index that is a list": ("model.safetensors.index.json", content(b"[]"), "index.json holds a list"),
    "broken JSON": ("config.json", content(b'{"model_type": "llama",'), "config.json is not valid JSON"),
    "an empty configuration": ("config.json", content(b""), "config.json is empty"),
    "a configuration that is a list": ("config.json", content(b"[1, 2]"), "config.json holds a list"),
    "a configuration that is a string": ("config.json", content(b'"llama"'), "config.json holds a text"),
    "a configuration that is null": ("config.json", content(b"null"), "config.json holds null"),
    "a configuration that is too deep": ("config.json", content(b"[" * 100_000), "config.json .* too deep"),
    "a configuration of nothing": ("config.json", content(b"{}"), "config.json names no model_type"),
    "a model type that is a number": ("config.json", content(b'{"model_type": 3}'), "config.json names no model_type"),
    "a configuration that is a pointer": ("config.json", content(POINTER), "is a pointer of Git LFS"),
    "a configuration of another encoding": ("config.json", content("\xff\xfe".encode("utf-16")), "config.json is not"),
    "an unknown model type": ("config.json", content(b'{"model_type": "lamma"}'), "Did you mean .*llama"),
    "sizes that are words": (
        "config.json",
        content(b'{"model_type": "llama", "hidden_size": "wide"}'),
        "config.json",
    ),
    "a broken generation_config": ("generation_config.json", content(b"{"), "generation_config.json is not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("way", ["load", "output_stage"])
def test_a_damaged_file_is_named(damage, way, tmp_path):
    name, harm, told = DAMAGE[damage]
    model_folder(tmp_path)
    if name.endswith("index.json"):
        (tmp_path / "model.safetensors").unlink()
    harm(tmp_path / name)
    with pytest.raises(UserError, match=told) as caught:
        getattr(Folder(str(tmp_path)), way)()
    assert len(str(caught.value).splitlines()) == 1


TOKENIZERS = {
    "cut short": (cut, "tokenizer.json is not valid JSON"),
    "empty": (content(b""), "tokenizer.json is empty"),
    "a pointer": (content(POINTER), "tokenizer.json is a pointer of Git LFS"),
    "a list": (content(b"[]"), "tokenizer.json holds a list"),
    "no tokenizer": (content(b"{}"), "tokenizer.json"),
    "missing": (lambda path: path.unlink(), "has no tokenizer"),
}


@pytest.mark.parametrize("length", ["words", [], {}])
def test_a_setting_of_the_wrong_kind_is_told_when_it_is_read(length, tmp_path):
    path = model_folder(tmp_path) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": length}))
    with pytest.raises(UserError, match="cannot be read .*tokenizer"):
        Folder(str(tmp_path)).tokenizer()


NO_FILES = {
    "a link to nowhere": lambda path: path.symlink_to("/nowhere/at/all"),
    "no file": lambda path: path.mkdir(),
}
READS = {
    "generation_config.json": "generation_config",
    "chat_template.jinja": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "model.safetensors": "load",
}


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("name", READS)
def test_what_has_a_file_s_name_and_is_none(name, what, tmp_path):
    """Left out, it would be passed over: a model would answer without its template, or go on behind its end."""
    path = model_folder(tmp_path) / name
    path.unlink(missing_ok=True)
    NO_FILES[what](path)
    with pytest.raises(UserError, match=f"{name} is {what}"):
        getattr(Folder(str(tmp_path)), READS[name])()


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_damaged_tokenizer_is_named(damage, tmp_path):
    model_folder(tmp_path)
    harm, told = TOKENIZERS[damage]
    harm(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=told):
        Folder(str(tmp_path)).tokenizer()


def test_another_width_than_the_weights_is_told(tmp_path):
    path = model_folder(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 64, "head_dim": 16}))
    with pytest.raises(UserError, match="does not fit its own config.json; mismatched keys"):
        Folder(str(tmp_path)).load()


def test_fewer_blocks_than_the_weights_are_told(tmp_path, capfd):
    path = model_folder(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 4}))
    for way in (Folder(str(tmp_path)).load, Folder(str(tmp_path)).output_stage):
        with pytest.raises(UserError, match=r"unexpected keys: .*num_hidden_layers"):
            way()
    assert "LOAD REPORT" not in capfd.readouterr().err  # transformers' own table would say it a second time


def test_an_index_that_names_what_no_file_holds_is_told(tmp_path):
    model_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save_file({k: t for k, t in tensors.items() if k != "model.norm.weight"}, tmp_path / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"missing keys: \['model.norm.weight'\]"):
        Folder(str(tmp_path)).output_stage()


def test_an_adapter_is_not_passed_over(tmp_path):
    (model_folder(tmp_path) / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge_and_unload"):
        Folder(str(tmp_path)).output_stage()


def test_a_package_that_is_wanting_is_told(tmp_path, monkeypatch):
    def wanting(*_, **__):
        raise ImportError("\nThis tokenizer needs sentencepiece.\nMore words.")

    monkeypatch.setattr("dynamax.backbones.loading.AutoTokenizer.from_pretrained", wanting)
    with pytest.raises(UserError, match="not installed: This tokenizer needs sentencepiece. Install it"):
        Folder(str(model_folder(tmp_path))).tokenizer()


def test_a_fault_of_ours_stays_a_fault(tmp_path, monkeypatch):
    """Only what libraries raise while they read is told as the files' fault."""
    model_folder(tmp_path)
    monkeypatch.setattr("dynamax.backbones.loading.fingerprint_of", lambda *_: [][0])
    with pytest.raises(IndexError):
        Folder(str(tmp_path)).load()
