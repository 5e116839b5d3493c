"""A model in two folders: each has its own blocks alone, and the one behind the other is the whole."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dynamax.backbones.loading import load_backbone
from dynamax.backbones.parts import part_in
from dynamax.backbones.precision import set_precision
from dynamax.errors import UserError
from dynamax.heads import Exit, ExitBank, LastBlockLens, MambaGate
from dynamax.serving.split import Places, load_part, places, split
from dynamax.types import Span
from tests.backbones.test_loading import DEPTH, SAVED, said_to_be_tied, tied, tied_to_the_output_matrix, untied

SIBLING = Path("assets/llama")
TOKENS_1T = torch.arange(7)[None]


def bank(folder: Path, *depths: int) -> ExitBank:
    whole = load_backbone(folder, dtype="float32", device="cpu")
    return ExitBank({depth: Exit(gates=[MambaGate]) for depth in depths}, whole.site)


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


WRITERS = [said_to_be_tied, tied_to_the_output_matrix]
TIED = ("llama", "gpt2", "mamba2", "zamba2", "gemma3_text")
CASES = [*product([name for name in SAVED if "-" not in name], [untied]), *product(TIED, [tied, *WRITERS])]


@pytest.mark.parametrize(("name", "write"), CASES)
@torch.inference_mode()
def test_the_parts_one_behind_the_other_are_the_whole(name: str, write, tmp_path: Path) -> None:
    write(name, tmp_path / "whole")
    whole = load_backbone(tmp_path / "whole", dtype="float32", device="cpu")
    exits = bank(tmp_path / "whole", 1, 2)
    edge, cloud = split(tmp_path / "whole", exits, places(exits, whole.spec.depth, 2, 1), tmp_path / "parts")
    wanted_1TV = whole.unembed(whole.run(whole.embed(TOKENS_1T), Span(0, whole.spec.depth)))
    lower, upper = load_part(edge), load_part(cloud)
    h_1TD = lower.run(lower.embed(TOKENS_1T), Span(0, 1))
    got_1TV = upper.unembed(upper.run(h_1TD, Span(1, whole.spec.depth)))
    experts = whole.row.expert_share(whole.model.config) < 1  # a weight at another address may be summed otherwise
    torch.testing.assert_close(got_1TV, wanted_1TV, rtol=0, atol=5e-5 if experts else 0)
    assert lower.spec == upper.spec == whole.spec  # heads and states of one go with the other
    assert ExitBank.load(edge / "heads", lower.site).depths == (1, 2)
    with pytest.raises(UserError, match="was not loaded"):
        lower.run(h_1TD, Span(2, DEPTH))


def test_a_part_holds_its_own_weights_alone(tmp_path: Path) -> None:
    untied("llama", tmp_path / "whole")
    exits = bank(tmp_path / "whole", 1, 2)
    edge, cloud = split(tmp_path / "whole", exits, places(exits, DEPTH, 2, None), tmp_path / "parts")
    assert {name.split(".")[2] for name in names(edge) if ".layers." in name} == {"0", "1"}
    assert {name.split(".")[2] for name in names(cloud) if ".layers." in name} == {"2", "3"}
    assert "model.embed_tokens.weight" in names(edge) - names(cloud)
    assert "lm_head.weight" in names(edge) & names(cloud)
    with pytest.raises(UserError, match="embedding matrix was not loaded"):
        load_part(cloud).embed(TOKENS_1T)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_a_part_can_be_packed(precision: str, tmp_path: Path) -> None:
    exits = bank(SIBLING, 4)
    edge, cloud = split(SIBLING, exits, places(exits, 8, 4, None), tmp_path / "parts")
    parts = [load_part(edge), load_part(cloud), load_backbone(SIBLING, dtype="float32", device="cpu")]
    for part in parts:
        set_precision(part, precision)
    lower, upper, whole = parts
    with torch.inference_mode():
        wanted_1TV = whole.unembed(whole.run(whole.embed(TOKENS_1T), Span(0, 8)))
        h_1TD = lower.run(lower.embed(TOKENS_1T), Span(0, 4))
        torch.testing.assert_close(upper.unembed(upper.run(h_1TD, Span(4, 8))), wanted_1TV)


def test_where_a_model_can_be_cut(tmp_path: Path) -> None:
    tied("llama", tmp_path)
    exits = bank(tmp_path, 1, 2)
    assert places(exits, DEPTH, None, None) == Places(Span(0, 2), Span(2, DEPTH))
    assert places(exits, DEPTH, 2, 1) == Places(Span(0, 2), Span(1, DEPTH))
    for at, start, told in [(3, None, "its exits are at 1, 2"), (2, 3, "exits are at"), (1, 2, "the edge ends at 1")]:
        with pytest.raises(UserError, match=told):
            places(exits, DEPTH, at, start)
    whole = load_backbone(tmp_path, dtype="float32", device="cpu")
    late = ExitBank({1: Exit(LastBlockLens)}, whole.site)
    with pytest.raises(UserError, match="the edge does not have them"):
        places(late, DEPTH, 1, None)


def test_what_is_no_part_and_what_is_no_whole_is_refused(tmp_path: Path) -> None:
    tied("llama", tmp_path / "whole")
    exits = bank(tmp_path / "whole", 1)
    edge, _ = split(tmp_path / "whole", exits, places(exits, DEPTH, 1, None), tmp_path / "parts")
    with pytest.raises(UserError, match="holds no part of a model"):
        load_part(tmp_path / "whole")
    with pytest.raises(UserError, match="holds the blocks 0 to 1 of a model of 4 alone"):
        load_backbone(edge, dtype="float32", device="cpu")
    with pytest.raises(UserError, match="exists already"):
        split(tmp_path / "whole", exits, places(exits, DEPTH, 1, None), tmp_path / "parts")


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"span": [2, 1]}, {"span": [0, 9]}, {"span": "all"}, {"depth": "3"}, {"output": None}, {"more": 1}],
)
def test_a_damaged_record_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    tied("llama", tmp_path / "whole")
    exits = bank(tmp_path / "whole", 1)
    edge, _ = split(tmp_path / "whole", exits, places(exits, DEPTH, 1, None), tmp_path / "parts")
    record = json.loads((edge / "part.json").read_text())
    for content in (json.dumps({**record, **change}), "", "[]", "{"):
        (edge / "part.json").write_text(content)
        with pytest.raises(UserError, match=r"part\.json cannot be read"):
            part_in(edge)
