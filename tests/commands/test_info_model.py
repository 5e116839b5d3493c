"""``dynamax info MODEL``: facts of a model, from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamax.backbones.loading import load_backbone, outline
from dynamax.backbones.sources import Folder
from dynamax.cli import main
from dynamax.decoding.cost import CostModel
from dynamax.heads import Exit, LinearGate, TunedLens
from dynamax.heads.bank import ExitBank
from tests.folders import model_folder
from tests.tiny import DISTINCT, tiny

SIZES = ("family", "depth", "width", "vocab", "context")


def code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(["info", *arguments])
    return ended.value.code


@pytest.mark.parametrize("name", DISTINCT)
def test_an_outline_has_the_sizes_and_costs_of_the_model(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path)
    bare = outline(tmp_path)
    whole = load_backbone(tmp_path, dtype="float32", device="cpu")
    assert {parameter.device.type for parameter in bare.parameters()} == {"meta"}
    assert [getattr(bare.spec, size) for size in SIZES] == [getattr(whole.spec, size) for size in SIZES]
    assert CostModel(bare).blocks == CostModel(whole).blocks
    assert sum(p.numel() for p in bare.parameters()) == sum(p.numel() for p in whole.parameters())


def test_what_is_told_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model", "mistral")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 5], "do_sample": True, "top_p": 0.5})
    )
    whole = load_backbone(folder, dtype="float32", device="cpu")
    (folder / "model.safetensors").unlink()  # nobody waits for weights
    assert code(str(folder)) == 0
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    told = {line[:12].rstrip(): line[12:] for line in lines}
    assert told["model"] == str(folder)
    assert told["family"] == "mistral, Transformer; sliding windows"
    assert told["blocks"] == "6 of width 32"
    assert told["weights"].startswith(f"{sum(p.numel() for p in whole.parameters()):,}, ")
    keys = sum(whole.block_cost(index).keys for index in range(6))
    assert told["state"] == f"{4 * keys} bytes for each token"
    assert told["answers"] == "drawn at temperature 1, top_k 50, top_p 0.5"
    assert told["ends at"] == "<end> (0), % (5)"
    assert told["chat"] == "has a template"


def test_what_is_told_of_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Folder(model_folder(tmp_path / "model", "mamba2"))
    backbone = source.load()
    bank = ExitBank({2: Exit(), 3: Exit(TunedLens, [LinearGate])}, backbone.site)
    bank.save(tmp_path / "heads", backbone.spec, source=source.recipe)
    assert code(str(tmp_path / "heads")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"heads       {tmp_path / 'heads'}" in lines
    assert "exit 2      LogitLens" in lines
    assert "exit 3      TunedLens, LinearGate" in lines
    assert [line.split()[0] for line in lines[-3:]] == ["2", "3", "6"]
    assert lines[-1].split() == ["6", "100%", "100%"]
    shares = [float(line.split()[1].rstrip("%")) for line in lines[-3:]]
    full, model = CostModel(backbone).full(128), CostModel(backbone)
    assert shares[0] == pytest.approx(100 * model.path([2], 128).flops / full.flops, abs=0.5)


def test_rules_that_are_refused_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3}))
    assert code(str(folder)) == 0
    assert "repetition_penalty" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nosuch"], "nosuch is no folder of heads, no model folder"),
        (["--presicion"], "MODEL alone"),
        (["a", "b"], "MODEL alone"),
        (["."], "has no config.json"),
        ([" "], "The name of the model is empty"),
    ],
)
def test_mistakes(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code(*given) == 2
    assert said in capsys.readouterr().err
