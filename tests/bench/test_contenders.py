"""Contenders that need no other package, on the small models: transformers' tokens, and where they end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, LlamaConfig

from dynamax.backbones.checkpoint import Checkpoint
from dynamax.backbones.gguf import Metadata, tensors_of
from dynamax.backbones.loading import read_config
from dynamax.backbones.sources import Folder
from dynamax.bench.answers import timed
from dynamax.bench.base import Subject
from dynamax.bench.contenders import CONTENDERS, ON_REQUEST, chosen
from dynamax.bench.floors import FORMATS, Floor, known
from dynamax.bench.gguf_copy import uncovered, write_gguf
from dynamax.bench.memory import Growth, available
from dynamax.bench.outline import outline
from dynamax.errors import UserError
from dynamax.heads.bank import Exit
from dynamax.policies import AtDepth, MaxProb
from tests.tiny import tiny

ASSETS = Path(__file__).parents[2] / "assets"
PROMPT = [5, 77, 300, 12]
SAFE = ("dynamax-full", "dynamax-lossless", "dynamax-decoder", "transformers", "transformers-lookup")


def subject(name: str, *, tokens: int = 8, ends: tuple[int, ...] = ()) -> Subject:
    folder = ASSETS / name
    exits = {2: Exit(), 4: Exit()}
    return Subject(Folder(str(folder)), folder, ends, tokens, 16, 1, exits=exits, policy=MaxProb(0.05))


def spoken(name: str, tokens: int) -> list[int]:
    """The model's greedy tokens, each from a pass over the whole text."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32)
    text = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(tokens):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return text[0, len(PROMPT) :].tolist()


def said(name: str, given: Subject) -> list[int]:
    contender = CONTENDERS[name](name, given)
    assert contender.absent() is None
    contender.prepare()
    contender.load()
    answer = timed(contender, PROMPT)
    contender.unload()
    assert answer.first_ms > 0
    return answer.tokens


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "mamba2"])
def test_lossless_contenders_say_what_the_model_says_and_stop_where_it_stops(model: str) -> None:
    whole = spoken(model, 8)
    end = next(token for place, token in enumerate(whole) if place >= 2 and token not in whole[:place])
    stopped = whole[: whole.index(end) + 1]
    for name in SAFE:
        if model == "mamba2" and name == "transformers-lookup":
            continue  # transformers takes no drafts for a recurrent state
        given = replace(subject(model), decoder=decoder())
        assert said(name, given) == whole, name
        assert said(name, replace(given, ends=(4095, end))) == stopped, name


def decoder() -> Callable:
    from dynamax.decoding.speculative import SelfSpeculative

    return SelfSpeculative


def test_early_exit_says_what_its_exit_says() -> None:
    given = replace(subject("llama"), policy=AtDepth(2))
    engine_says = said("dynamax-early-exit", given)
    assert len(engine_says) == 8
    assert engine_says[0] == spoken("llama", 1)[0]  # from the prompt's own pass
    assert engine_says != spoken("llama", 8)
    assert said("transformers-early-exit", given) == spoken("llama", 8)


def test_every_peer_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamax.bench.base.find_spec", lambda _: None)
    made = [make(name, subject("llama")) for name, make in CONTENDERS.items()]
    peers = {each.package for each in made if each.module}
    assert peers == {"economize", "ctranslate2", "llama-cpp-python"}
    for each in made:
        if each.module:
            assert f"pip install {each.package}, or pip install -e '.[bench]'" in str(each.absent())


@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
@pytest.mark.parametrize(
    "name", ["economize-lookup", "economize-early-exit", "ctranslate2-float32", "llamacpp-f32", "llamacpp-f16"]
)
def test_lossless_peers_say_what_the_model_says(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path))
    reason = CONTENDERS[name](name, subject("llama")).absent()
    if reason is not None:
        pytest.skip(reason)
    whole = spoken("llama", 8)
    assert said(name, subject("llama")) == whole
    assert said(name, subject("llama", ends=(whole[3],))) == whole[: whole.index(whole[3]) + 1]


def test_what_lacks_exits_or_a_policy_says_so() -> None:
    bare = replace(subject("llama"), exits=None)
    for name in ("dynamax-early-exit", "transformers-early-exit"):
        assert "--exits" in str(CONTENDERS[name](name, bare).absent())
    assert CONTENDERS["dynamax-lossless"]("x", bare).absent() is None  # it drafts from earlier text
    unguided = replace(subject("llama"), policy=None)
    assert "--policy MaxProb" in str(CONTENDERS["dynamax-lossless"]("x", unguided).absent())
    assert "--decoder" in str(CONTENDERS["dynamax-decoder"]("x", subject("llama")).absent())
    elsewhere = replace(subject("llama"), folder=None)
    assert "folder" in str(CONTENDERS["transformers"]("x", elsewhere).absent())


def test_names() -> None:
    assert set(chosen(None)) == set(CONTENDERS) - set(ON_REQUEST)
    assert chosen(["transformers, dynamax-full"]) == {"dynamax-full": True, "transformers": True}
    assert chosen(["all", "transformers-static"])["transformers-static"]
    assert not chosen(["all", "transformers-static"])["transformers"]
    with pytest.raises(UserError, match="Did you mean transformers"):
        chosen(["transformer"])
    with pytest.raises(UserError, match="No contender"):
        chosen([","])


def test_sizes_are_the_models() -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "llama")
    found = outline(ASSETS / "llama")
    assert found.weights == sum(weight.numel() for weight in model.parameters())
    assert sum(out * into for out, into in found.linears) == sum(
        weight.numel() for name, weight in model.named_parameters() if weight.dim() == 2
    )  # the output matrix is the embedding matrix


def test_sizes_of_a_mixture_are_those_of_the_experts_that_a_position_takes(tmp_path: Path) -> None:
    model = tiny("mixtral", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    found = outline(tmp_path)
    assert found.weights == sum(weight.numel() for weight in model.parameters())
    attention, expert = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 64
    assert sum(out * into for out, into in found.linears) == 6 * (attention + 2 * expert) + 61 * 32


@pytest.mark.parametrize("weights", FORMATS)
def test_floors_take_time(weights: str) -> None:
    floor = Floor(known(weights), [(64, 32), (99, 64)])
    floor.load()
    floor.measure()
    assert len(floor.ms) == 1
    assert floor.ms[0] > 0


def test_the_floor_of_an_unknown_format_is_that_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: torch.Tensor) -> None:
        raise RuntimeError("no such engine")

    assert known("int3") == "float32"
    monkeypatch.setitem(FORMATS, "float16", fails)
    assert known("float16") == "float32"
    with pytest.raises(UserError, match="no floor"):
        Floor("int3", [])


@pytest.mark.slow
def test_memory_that_is_taken_is_seen() -> None:
    growth = Growth()
    held = np.ones(64 << 20, dtype=np.uint8)
    peak, there = growth.peak(), available()
    if peak is None or there is None:
        pytest.skip("only Linux tells")
    assert 60 << 20 < peak < 500 << 20
    assert there > 0
    assert held.all()


def test_a_gguf_copy_holds_the_models_weights(tmp_path: Path) -> None:
    folder = ASSETS / "llama"
    config = read_config(folder)
    assert isinstance(config, LlamaConfig)
    assert uncovered(config) is None
    write_gguf(folder, tmp_path)
    found = tensors_of(Metadata(GGUFReader(tmp_path / "model.gguf"), tmp_path), config)
    wanted = Checkpoint(folder)
    assert set(found) | {"lm_head.weight"} == set(wanted) | {"lm_head.weight"}
    assert all(found[name].equal(wanted[name].float()) for name in found)


def test_models_without_a_gguf_copy_are_named(tmp_path: Path) -> None:
    assert "mamba2" in str(uncovered(read_config(ASSETS / "mamba2")))
    config = read_config(ASSETS / "llama")
    config.attention_bias = True
    assert "biases" in str(uncovered(config))
    scaled = LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    assert "'linear'" in str(uncovered(scaled))
