"""``dynamax generate``: the decoder's own tokens, painted by depth; plain where nobody sees colour."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynamax.backbones.sources import Folder
from dynamax.commands.colors import DepthColors, coloured
from dynamax.commands.generate import WITHOUT_HEADS, balance, pieces
from dynamax.decoding.cost import CostModel
from dynamax.decoding.full import Full
from dynamax.types import Step
from tests.folders import byte_tokenizer

Run = Callable[..., int]
ASK = ("generate", "Who?", "--backbone", "parts/backbone.yaml", "--exits={2: {}, 4: {}}", "--chat=false", "--limit=12")
PAINT = re.compile("\x1b\\[[0-9;]*m")


def answer(shown: str) -> str:
    return shown[: shown.rindex("\n\n")]


def spoken(folder: Path) -> str:
    source = Folder(str(folder))
    tokenizer = source.tokenizer()
    prompt_1T = torch.tensor([tokenizer("Who?")["input_ids"]])
    tokens = [int(step.token_B) for step in Full(source.load()).decode(prompt_1T, limit=12, stop=[0])]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_never_leaving_says_what_the_model_says(
    run: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*ASK, "--policy", "Never") == 0
    shown = capsys.readouterr().out
    wanted = spoken(tiny_folder)
    assert answer(shown) == wanted[: len(answer(shown))]
    assert "\x1b" not in shown
    assert "exit 2  0%" in shown
    assert "full depth 6  100%" in shown
    assert "blocks a token: 6.0 of 6, 0% saved" in shown


def test_tokens_are_painted_by_depth(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(*ASK, "--policy", "AtDepth", "--policy.depth", "2") == 0
    shown = capsys.readouterr().out
    assert len(PAINT.findall(answer(shown))) >= 2
    assert "blocks a token: 2.0 of 6, 67% saved" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(*ASK, "--policy", "AtDepth", "--policy.depth", "2") == 0
    assert PAINT.sub("", shown).splitlines()[:-1] == capsys.readouterr().out.splitlines()[:-1]


def test_lossless_says_what_the_model_says(run: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, "--policy", "MaxProb", "--threshold", "0.02", "--mode", "lossless") == 0
    shown = answer(capsys.readouterr().out)
    assert shown == spoken(tiny_folder)[: len(shown)]


def test_sampling_depends_on_its_seed_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in ("1", "1", "2"):
        assert run(*ASK, "--policy", "Never", "--temperature", "2.0", "--seed", seed) == 0
        said.append(answer(capsys.readouterr().out))
    assert said[0] == said[1] != said[2]


def test_one_token_saves_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, "--policy", "Never", "--limit", "1") == 0
    shown = capsys.readouterr().out
    assert "nothing could be saved" in shown
    assert "exit 2" not in shown


def test_the_first_token_is_counted_apart(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, "--policy", "MaxProb", "--threshold", "0", "--limit", "2") == 0
    shown = capsys.readouterr().out
    assert "exit 2  100%" in shown
    assert "2 tokens in" in shown
    assert "1 from the prompt's own pass, at full depth, and 1 as shared out above" in shown


def test_options_may_come_from_a_file(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "backbone: parts/backbone.yaml\nexits: {2: {}}\npolicy: Never\nchat: false\nlimit: 3\n"
    (place / "generate.yaml").write_text(options)
    assert run("generate", "Who?", "-c", "generate.yaml", "--limit", "4") == 0
    assert "4 tokens in" in capsys.readouterr().out


def step(token: int, depth: int) -> Step:
    return Step(torch.tensor([token]), depth, torch.zeros(1, 1))


def test_half_a_character_waits_for_its_other_half() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer("aé!")["input_ids"]
    assert len(tokens) == 4
    steps = iter([step(token, depth) for depth, token in enumerate(tokens)])
    assert list(pieces(steps, tokenizer, [0])) == [("a", 0), ("é", 2), ("!", 3)]


def test_an_answer_that_ends_within_a_character_shows_what_there_is() -> None:
    tokenizer = byte_tokenizer()
    steps = iter([step(token, depth) for depth, token in enumerate(tokenizer("aé")["input_ids"][:2])])
    assert list(pieces(steps, tokenizer, [0])) == [("a", 0), ("\ufffd", 1)]


def test_text_that_changes_behind_us_is_not_cut_by_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    said = {1: "a ", 2: "a, b"}
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: said[len(tokens)])
    assert [piece for piece, _ in pieces(iter([step(1, 2), step(2, 4)]), tokenizer, [0])] == ["a ", ", b"]


@pytest.mark.parametrize("options", [["--top_k", "3"], ["--top_p", "1.0"], ["--seed", "0", "--top_k=2"]])
def test_options_of_sampling_need_a_temperature(
    run: Run, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert run(*ASK, "--policy", "Never", *options) == 2
    message = capsys.readouterr().err
    assert all(option.lstrip("-").split("=")[0] in message for option in options if option.startswith("--"))
    assert "Add --temperature" in message


def test_heads_beside_exits_are_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, "--policy", "Never", "--heads", "somewhere") == 2
    assert "exactly one of the two" in capsys.readouterr().err


def test_a_gate_that_no_exit_has_is_told_before_anything_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ask = [option.replace("{2: {}, ", "{2: {gates: [LinearGate]}, ") for option in ASK]
    assert run(*ask, "--policy", "GateConfidence", "--policy.threshold=0.5", "--policy.gate=AttentionGate") == 2
    shown = capsys.readouterr()
    assert "no exit has; gates of the exits: LinearGate." in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(("more", "folder"), [([], "runs/demo/heads"), (["--heads", "nowhere"], "nowhere")])
def test_heads_that_are_not_there_are_told_with_what_goes_without(
    run: Run, capsys: pytest.CaptureFixture[str], more: list[str], folder: str
) -> None:
    ask = [option for option in ASK if not option.startswith("--exits")]
    assert run(*ask, *more) == 2
    message = capsys.readouterr().err
    assert f"no saved heads in {folder}." in message
    assert WITHOUT_HEADS in message
    assert run(*ask, *shlex.split(WITHOUT_HEADS)) == 0


def test_the_end_is_not_printed() -> None:
    assert list(pieces(iter([step(0, 1)]), byte_tokenizer(), [0])) == []


def test_the_balance_counts_blocks_and_flops(tiny_folder: Path) -> None:
    backbone = Folder(str(tiny_folder)).load()
    steps = list(Full(backbone).decode(torch.tensor([[1, 2, 3]]), limit=5))
    assert balance(CostModel(backbone), steps, 3, 2.0) == (
        "5 tokens in 2.0 s: 1 from the prompt's own pass, at full depth, and 4 as shared out above. Of these, blocks a "
        "token: 6.0 of 6, 0% saved; FLOPs: 0% saved."
    )


def test_line_ends_stay_bare() -> None:
    painted = DepthColors([2, 4], 6, on=True).paint("a\n\nb", 2)
    assert PAINT.sub("", painted) == "a\n\nb"
    assert all(not line or line.endswith("\x1b[0m") for line in painted.split("\n"))


def test_each_exit_has_its_own_colour() -> None:
    palette = DepthColors(list(range(1, 7)), 8, on=True)
    assert len({palette.paint("x", depth) for depth in range(1, 9)}) == 7  # full depth is bare
    assert palette.paint("x", 8) == "x"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False)],
)
def test_who_sees_colour(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], expected: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / "out").open("w") as file:
        assert coloured(file) is expected
