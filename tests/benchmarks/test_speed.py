"""The timed benchmarks, on a model of two blocks: every contender is there, and does what its name says."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import chunks, decode, models
from benchmarks.models import Contestant, load
from dynamax.backbones.precision import set_precision

TINY = {
    "model_type": "mamba2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "num_heads": 4,
    "head_dim": 16,
    "n_groups": 1,
    "vocab_size": 99,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.CONTESTANTS, "tiny", Contestant((1,), TINY))


def report(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *given: str) -> dict:
    out = folder / "report.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--model", "tiny", "--rounds", "1", "--out", str(out), *given])
    module.main()
    return json.loads(out.read_text())


@pytest.mark.slow
def test_decode_has_every_contender_and_its_floors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(decode, tmp_path, monkeypatch, "--prompts", "1", "--tokens", "4")
    assert list(found["ms"]) == [
        "transformers generate",
        "dynamax, all 2",
        "dynamax, depth 1",
        "floor, depth 1",
        "floor, depth 2",
    ]
    assert found["same"] == {"tokens": 4, "of": 4, "answers": 1, "prompts": 1}
    backbone, _ = load("tiny", dtype="float32", device="cpu", prompts=1)
    weights = sum(p.numel() for name, p in backbone.model.named_parameters() if "_proj" in name or "embed" in name)
    assert found["memory_ms"]["2"] == pytest.approx(1e3 * 4 * weights / (1e9 * found["bandwidth_gb_s"]))


def test_same_tokens_are_counted_up_to_the_first_difference() -> None:
    steps = [SimpleNamespace(token_B=torch.tensor([token])) for token in (5, 6, 7)]
    said = {"transformers generate": [torch.tensor([[1, 5, 6, 7]]), torch.tensor([[1, 5, 9, 7]])]}
    found = decode.same_tokens({**said, "dynamax, all 2": [steps, steps]}, 2, 3)
    assert found == {"tokens": 4, "of": 6, "answers": 1, "prompts": 2}


def test_the_floor_of_a_mixture_is_that_of_the_experts_that_a_position_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As loaded and packed; the weights of the routers are not in it."""
    config = models.CONTESTANTS["mixtral-small"].config
    assert config is not None
    monkeypatch.setitem(models.CONTESTANTS, "tiny", Contestant((), config | {"num_hidden_layers": 2, "vocab_size": 99}))
    backbone, _ = load("tiny", dtype="float32", device="cpu", prompts=1)
    wanted = 99 * 512 + 2 * (512 * (512 + 128 + 128 + 512) + 2 * 3 * 512 * 1792)
    assert sum(weight.numel() for weight in decode.matrices(backbone, 2)) == wanted
    assert backbone.block_cost(0).active * 2 == wanted - 99 * 512 + 2 * 8 * 512
    set_precision(backbone, "bfloat16")
    assert sum(each.in_features * each.out_features for each in decode.products(backbone, 2)) == wanted
    assert sum(weight.numel() for weight in decode.matrices(backbone, 2)) == wanted


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["granite-hybrid-small", "mixtral-small", "pythia-160m", "gemma3-small", "qwen3-small"]
)
def test_small_shapes_can_be_packed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = models.CONTESTANTS[name].config
    assert config is not None
    size = {"num_hidden_layers": 4, "vocab_size": 99} | (
        {"layer_types": config["layer_types"][-4:]} if "layer_types" in config else {}
    )
    monkeypatch.setitem(models.CONTESTANTS, "tiny", Contestant((2,), config | size))
    plain, (prompt_1T,) = load("tiny", dtype="float32", device="cpu", prompts=1)
    backbone = copy.deepcopy(plain)
    set_precision(backbone, "float32")
    said: dict = {}
    decode.measure(backbone, [prompt_1T], (), tokens=5, rounds=1, plain=plain, said=said)
    assert decode.same_tokens(said, 4, 5)["tokens"] == 5


def test_chunks_has_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    found = report(chunks, tmp_path, monkeypatch, "--dtype", "bfloat16")
    assert set(found["ms"]) == {"1", "2", "4", "8", "16"}
    assert all(set(row) == {"transformers", "dynamax", "convolve", "grouped"} for row in found["ms"].values())
    assert len(capsys.readouterr().out.splitlines()) == 6


@torch.inference_mode()
@pytest.mark.parametrize("precision", [None, "float32"])
def test_the_contenders_of_a_chunk_say_the_same(precision: str | None) -> None:
    plain, (prompt_1T,) = load("tiny", dtype="float32", device="cpu", prompts=1)
    backbone = copy.deepcopy(plain)
    if precision is not None:
        set_precision(backbone, precision)
    said = {name: ready()() for name, ready in chunks.contenders(backbone, plain, prompt_1T, 4).items()}
    assert said["dynamax"].shape[1] == 4
    assert torch.allclose(said["transformers"].logits, said["dynamax"], atol=1e-4)
    pair = chunks.convolutions(4, "cpu")
    assert torch.allclose(pair["convolve"]()[0], pair["grouped"](), atol=1e-4)
