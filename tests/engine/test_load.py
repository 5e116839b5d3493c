"""Everything that ``dynamax.load`` takes, and what it says of the rest; and what importing costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dynamax
from dynamax import GGUF, Engine, Exit, ExitBank, Folder, Hub, MaxProb, SmolLM2, UserError
from dynamax.heads.lenses import TunedLens
from tests.folders import model_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def heads(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved heads that know where their model is."""
    source = Folder(str(tiny_folder))
    backbone = source.load()
    bank = ExitBank({2: Exit(TunedLens), 4: Exit()}, backbone.site)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("heads") / "heads"
    bank.save(folder, backbone.spec, source.recipe)
    return folder


def said(engine: Engine) -> list[int]:
    return engine.generate("Hi", MaxProb(0.05), max_new_tokens=8).tokens


@pytest.mark.slow
def test_heads_alone_know_their_model(heads: Path, tiny_folder: Path) -> None:
    engine = dynamax.load(heads, device="cpu")
    assert engine.exits is not None
    assert engine.exits.depths == (2, 4)
    assert isinstance(engine.exits.lens(2), TunedLens)
    beside = dynamax.load(tiny_folder, heads=heads, device="cpu")
    assert said(engine) == said(beside) == said(dynamax.load(str(heads), device="cpu"))
    assert said(engine) != said(dynamax.load(tiny_folder, exits=[2, 4], device="cpu"))  # so the heads were read


def test_exits_of_ones_own_stand_in_place_of_the_heads_of_the_folder(heads: Path) -> None:
    engine = dynamax.load(heads, exits=[3], device="cpu")
    assert engine.exits is not None
    assert engine.exits.depths == (3,)


def make_source(folder: Path) -> Folder:
    return Folder(folder)


@pytest.mark.parametrize("given", [Path, str, make_source])
def test_a_model_by_path_or_source(tiny_folder: Path, given: Callable[[Path], Any]) -> None:
    engine = dynamax.load(given(tiny_folder), exits=[2], device="cpu")
    assert engine.backbone.spec.depth == 6
    assert engine.generate("Hi", max_new_tokens=3).tokens


def test_a_gguf_file(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(GGUF, "folder", lambda self: asked.append(self.path) or tiny_folder)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for given in (tmp_path / "model.gguf", str(tmp_path / "model.gguf")):
        assert dynamax.load(given, exits=[2], device="cpu").backbone.spec.depth == 6
    assert set(asked) == {str(tmp_path / "model.gguf")}


def test_a_source_by_name(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmolLM2, "folder", lambda _: tiny_folder)
    assert dynamax.load("SmolLM2", exits=[2], device="cpu").backbone.spec.depth == 6


def test_a_name_on_the_hub(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Hub, "folder", lambda self: asked.append(self.name) or tiny_folder)
    assert dynamax.load("someone/some-model", device="cpu").backbone.spec.depth == 6
    assert set(asked) == {"someone/some-model"}


@pytest.mark.slow
def test_exits_as_depths_and_as_a_mapping(tiny_folder: Path) -> None:
    for exits in ([4, 2], (2, 4), {4: Exit(TunedLens), 2: Exit()}):
        engine = dynamax.load(tiny_folder, exits=exits, device="cpu")
        assert engine.exits is not None
        assert engine.exits.depths == (2, 4)
    assert dynamax.load(tiny_folder, device="cpu").exits is None


def test_dtype_and_device(tiny_folder: Path) -> None:
    engine = dynamax.load(tiny_folder, dtype="bfloat16", device="cpu")
    assert (engine.dtype, engine.device) == (torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nowhere", "nowhere is no folder of heads, no model folder"),
        ("./nobody/nothing", "is no folder of heads"),
        ("/nowhere/model", "is no folder of heads"),
        ("a/b/c", "OWNER/NAME"),
        ("SmolLM", "SmolLM2"),
    ],
)
def test_a_name_that_is_nothing_is_refused(given: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        dynamax.load(given)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(UserError, match="is no folder of heads"):
        dynamax.load(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"no config.json"):
        dynamax.load(tmp_path)


def test_heads_of_another_backbone_are_refused(heads: Path, tmp_path: Path) -> None:
    other = model_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="another backbone|belong to"):
        dynamax.load(other, heads=heads, device="cpu")


def test_heads_whose_model_has_gone_or_changed_are_refused(tmp_path: Path, heads: Path, tiny_folder: Path) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    source = Folder(model)
    backbone = source.load()
    ExitBank({2: Exit()}, backbone.site).save(tmp_path / "own", backbone.spec, source.recipe)
    shutil.rmtree(model)
    with pytest.raises(UserError, match="model is not a folder"):
        dynamax.load(tmp_path / "own", device="cpu")
    model_folder(model, seed=2)
    with pytest.raises(UserError, match="another backbone|belong to"):
        dynamax.load(tmp_path / "own", device="cpu")


def test_heads_that_do_not_say_whose_they_are_need_a_model(tiny_folder: Path, tmp_path: Path) -> None:
    backbone = Folder(tiny_folder).load()
    ExitBank({2: Exit()}, backbone.site).save(tmp_path / "own", backbone.spec)
    with pytest.raises(UserError, match="do not say where their model comes from"):
        dynamax.load(tmp_path / "own")
    engine = dynamax.load(tiny_folder, heads=tmp_path / "own", device="cpu")
    assert engine.exits is not None
    assert engine.exits.depths == (2,)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"source": 3}', "do not say where their model comes from"),
        ('{"source": {"class": "Folder"}}', "do not say where their model comes from"),
        *((content, "damaged") for content in ("{", "[]", "3")),
    ],
)
def test_a_damaged_record_of_heads_names_no_model(heads: Path, tmp_path: Path, content: str, told: str) -> None:
    folder = shutil.copytree(heads, tmp_path / "heads")
    (folder / "heads.json").write_text(content)
    with pytest.raises(UserError, match=told):
        dynamax.load(folder)


def test_heads_and_exits_are_one_too_many(tiny_folder: Path, heads: Path) -> None:
    with pytest.raises(UserError, match="one of the two"):
        dynamax.load(tiny_folder, heads=heads, exits=[2])


def test_heads_that_are_not_there_are_told_before_the_model_is_read(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Folder, "load", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(UserError, match="nowhere"):
        dynamax.load(tiny_folder, heads=tmp_path / "nowhere")


# -- what importing costs -----------------------------------------------------------------------------


def python(program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_itself_imports_no_library() -> None:
    heavy = "{'torch', 'transformers', 'lightning', 'numpy', 'jsonargparse'}"
    assert python(f"import sys, dynamax; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_every_public_name_is_where_it_is_said_to_be() -> None:
    assert all(getattr(dynamax, name).__name__ == name for name in dynamax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = dynamax.Nothing  # type: ignore[attr-defined]


@pytest.mark.slow
def test_three_lines_generate_with_exits_and_without_a_trainer() -> None:
    told = python(
        "import dynamax, sys\n"
        "answer = dynamax.load('assets/llama', exits=[2, 4]).generate('Who?', dynamax.AtDepth(4), max_new_tokens=3)\n"
        "print(answer.depths, repr(answer.text))\n"
        "heavy = {'lightning', 'torchmetrics', 'datasets', 'torchvision', 'sklearn', 'pandas', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    ).splitlines()
    assert told[0].startswith("[8, 4, 4] ")
    assert told[1] == "[]"


@pytest.mark.parametrize("name", ["Folder", "Hub", "GGUF"])
def test_a_source_that_needs_options_says_so(name: str) -> None:
    with pytest.raises(UserError, match=f"The source {name} needs options"):
        dynamax.load(name)
