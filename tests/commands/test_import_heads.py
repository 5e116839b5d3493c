"""Heads in DSSD's layout become ours: the same logits as their module has, the same rule, lossless decoding."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import dynamax
from dynamax.commands.import_heads import dssd_thresholds
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.policies import Entropy
from tests.folders import model_folder

INDICES = [1, 3]
ARGUMENTS = ("import-heads", "dssd", "--backbone", "Folder", "--backbone.path", "qwen3", "--out", "heads")
Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]


class AuxiliaryHead(nn.Module):
    """What DSSD calls a head."""

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, vocab, bias=False)

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(h_BTD))


@pytest.fixture
def heads(place: Path) -> nn.ModuleList:
    """Heads near the logit lens, in DSSD's files, for a tiny Qwen3."""
    model_folder(place / "qwen3", "qwen3", depth=5)
    own = dynamax.load(place / "qwen3", exits={1: dynamax.Exit()}, device="cpu").backbone.output_matrix
    torch.manual_seed(0)
    made = nn.ModuleList([AuxiliaryHead(32, 257) for _ in INDICES])
    with torch.no_grad():
        for head in made:
            head.norm.weight.uniform_(0.5, 1.5)
            head.linear.weight.copy_(own + 0.1 * torch.randn_like(own))
    (place / "dssd").mkdir()
    torch.save(made.state_dict(), place / "dssd" / "aux_heads.pt")
    config = {"model_name": "Qwen/Qwen3-0.6B", "num_heads": 2, "head_layer_indices": INDICES, "quantization": "none"}
    config |= {"hidden_size": 32, "vocab_size": 257, "num_hidden_layers": 5, "training_config": {}}
    (place / "dssd" / "config.json").write_text(json.dumps(config))
    known = {"model_config_path": "x", "calibration_dataset": "y", "calibration_samples": 9}
    known |= {"uncertainty_metric": "entropy", "accuracy_levels": [0.75], "statistics": {}}
    known |= {"thresholds": {"0.75": {"0": 5.0, "1": 4.5}}}
    (place / "dssd" / "calibration.json").write_text(json.dumps(known))
    return made


@pytest.mark.slow
def test_the_heads_say_what_theirs_say_and_decode_losslessly(
    heads: nn.ModuleList, run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*ARGUMENTS) == 0
    told = capsys.readouterr().out
    assert "at 2, 4 of 5 blocks" in told
    engine = dynamax.load("heads", device="cpu")
    assert engine.exits is not None
    tokens_1T = torch.randint(1, 257, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = engine.backbone.model(tokens_1T, output_hidden_states=True).hidden_states
    read = engine.read(tokens_1T, start=0)
    rule = Entropy(dssd_thresholds(Path("dssd"), [2, 4], 257)["0.75"])
    left = 0
    for head, index, seen in zip(heads, INDICES, read.exits, strict=True):
        theirs_TV = head(states[index + 1])[0]
        torch.testing.assert_close(seen.logits, theirs_TV, rtol=1e-4, atol=1e-4)
        p_TV = theirs_TV.softmax(-1)
        leaves_T = -(p_TV * p_TV.log()).sum(-1) < {1: 5.0, 3: 4.5}[index]
        assert rule(seen).tolist() == leaves_T.tolist()
        left += int(leaves_T.sum())
    assert 0 < left < 2 * len(tokens_1T[0])

    options = {"max_new_tokens": 24, "do_sample": False, "chat": False}
    full = engine.generate("What?", **options)
    drafted = engine.generate("What?", policy=rule, decoder=SelfSpeculative, **options)
    assert drafted.tokens == full.tokens
    assert set(drafted.depths[1:]) & {2, 4}, "some draft was right"
    line = next(each for each in told.splitlines() if each.startswith("Published for an accuracy of 0.75"))
    values = re.search(r"\{(.*)\}", line)
    assert values is not None
    assert values[1] == ", ".join(f"{d}: {1 - t / math.log(257):.6f}" for d, t in ((2, 5.0), (4, 4.5)))
    command = ["generate", "What?", "--heads", "heads", "--decoder", "SelfSpeculative", "--policy", "Entropy"]
    assert run(*command, "--policy.threshold", values[0], "--max_new_tokens", "4") == 0


def test_an_untied_lens_is_charged_one_output_matrix(heads: nn.ModuleList, run: Run, place: Path) -> None:
    assert run(*ARGUMENTS) == 0
    untied, tied = (
        dynamax.load("qwen3", **given, device="cpu").generate(
            "What?", policy=dynamax.MaxProb(0.0), max_new_tokens=4, do_sample=False, chat=False
        )
        for given in ({"heads": "heads"}, {"exits": {2: dynamax.Exit(), 4: dynamax.Exit()}})
    )
    assert set(untied.depths[1:]) == set(tied.depths[1:]) == {2}
    assert untied.cost.cost.flops == tied.cost.cost.flops
    norm = 4 * 32
    assert untied.cost.cost.bytes == pytest.approx(tied.cost.cost.bytes + norm * untied.cost.tokens)


@pytest.mark.slow
def test_what_does_not_belong_together_is_refused(heads: nn.ModuleList, refused: Refused, place: Path) -> None:
    model_folder(place / "other", "qwen3", depth=6)
    refused([*ARGUMENTS[:5], "other", *ARGUMENTS[6:]], ["Qwen/Qwen3-0.6B", "(32, 257, 5)", "(32, 257, 6)"])
    torch.save({"0.norm.weight": torch.ones(32)}, place / "dssd" / "aux_heads.pt")
    refused(ARGUMENTS, ["aux_heads.pt is not as DSSD writes it", "0.linear.weight"])
    (place / "dssd" / "aux_heads.pt").write_bytes(b"no tensors")
    refused(ARGUMENTS, ["aux_heads.pt cannot be read"])
    (place / "dssd" / "config.json").unlink()
    refused(ARGUMENTS, ["config.json cannot be read", "Give a folder"])
    assert not (place / "heads").exists()
