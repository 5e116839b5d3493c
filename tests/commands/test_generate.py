"""``dynamax generate``: the decoder's own tokens, painted by depth; plain where nobody sees colour."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynamax.backbones.sources import Folder
from dynamax.commands.colors import DepthColors, coloured
from dynamax.commands.generate import WITHOUT_HEADS, balance
from dynamax.decoding.full import Full
from dynamax.engine import load

Run = Callable[..., int]
ASK = ("generate", "Who?", "--backbone", "parts/backbone.yaml", "--exits={2: {}, 4: {}}", "--chat=false")
LIMIT = "--max_new_tokens=12"
PAINT = re.compile("\x1b\\[[0-9;]*m")


def answer(shown: str) -> str:
    end = re.search(r"\n\n(?:\x1b\[[0-9;]*m)?(?: exit 2| full depth|The first token comes)", shown)
    assert end is not None
    return shown[: end.start()]


def spoken(folder: Path) -> str:
    source = Folder(str(folder))
    tokenizer = source.tokenizer()
    prompt_1T = torch.tensor([tokenizer("Who?")["input_ids"]])
    tokens = [int(step.token_B) for step in Full(source.load()).decode(prompt_1T, max_new_tokens=12, eos_token_id=[0])]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_never_leaving_says_what_the_model_says(
    run: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*ASK, LIMIT, "--policy", "Never") == 0
    shown = capsys.readouterr().out
    wanted = spoken(tiny_folder)
    assert answer(shown) == wanted[: len(answer(shown))]
    assert "\x1b" not in shown
    assert "exit 2  0%" in shown
    assert "full depth 6  100%" in shown
    assert "blocks a token: 6.0 of 6, 0% saved" in shown


@pytest.mark.parametrize("drafts", [[], ["--decoder", "Speculative", "--decoder.sources=[PromptLookup]"]])
def test_a_backbone_without_heads_runs_all_blocks(
    drafts: list[str], run: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [option for option in ASK if not option.startswith("--exits")]
    assert run(*ask, LIMIT, "--policy", "null", *drafts) == 0
    shown = answer(capsys.readouterr().out)
    assert shown == spoken(tiny_folder)[: len(shown)]


def test_exits_may_be_depths_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for exits in ("{2: {}, 4: {}}", "[2, 4]"):
        ask = [option for option in ASK if not option.startswith("--exits")]
        assert run(*ask, LIMIT, f"--exits={exits}", "--policy", "AtDepth", "--policy.depth", "4") == 0
        texts.append(answer(capsys.readouterr().out))
    assert texts[0] == texts[1]


def test_tokens_are_painted_by_depth(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(*ASK, LIMIT, "--policy", "AtDepth", "--policy.depth", "2") == 0
    shown = capsys.readouterr().out
    assert len(PAINT.findall(answer(shown))) >= 2
    assert "blocks a token: 2.0 of 6, 67% saved" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(*ASK, LIMIT, "--policy", "AtDepth", "--policy.depth", "2") == 0
    assert PAINT.sub("", shown).splitlines()[:-1] == capsys.readouterr().out.splitlines()[:-1]


def test_lossless_says_what_the_model_says(run: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, LIMIT, "--policy", "MaxProb", "--threshold", "0.02", "--decoder", "SelfSpeculative") == 0
    shown = answer(capsys.readouterr().out)
    assert shown == spoken(tiny_folder)[: len(shown)]


@pytest.mark.parametrize(
    "sources", ["[PromptLookup]", "[{class_path: TokenTable, init_args: {longest: 2}}, PromptLookup]"]
)
@pytest.mark.parametrize("policy", [["--policy", "MaxProb", "--threshold", "0.02"], ["--policy=null"]])
def test_drafts_of_sources(
    policy: list[str], sources: str, run: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With drafts from the exits as well, and without."""
    assert run(*ASK, LIMIT, *policy, "--decoder", "Speculative", f"--decoder.sources={sources}") == 0
    shown = answer(capsys.readouterr().out)
    assert shown == spoken(tiny_folder)[: len(shown)]


def test_a_source_that_is_none_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, LIMIT, "--policy=null", "--decoder", "Speculative", "--decoder.sources=[PromptLokup]") == 2
    assert "Did you mean PromptLookup?" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["float32", "null", "auto"])
def test_precision(precision: str, run: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, LIMIT, "--policy=null", "--decoder", "Full", f"--precision={precision}") == 0
    shown = answer(capsys.readouterr().out)
    assert shown == spoken(tiny_folder)[: len(shown)]


def test_a_precision_that_is_none_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, LIMIT, "--policy=null", "--precision", "fp16") == 2
    assert "one of auto, float32, float16, bfloat16, int8, int4 is wanted" in capsys.readouterr().err


@pytest.mark.slow
def test_sampling_depends_on_its_seed_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in ("1", "1", "2"):
        assert run(*ASK, LIMIT, "--policy", "Never", "--temperature", "2.0", "--seed", seed) == 0
        said.append(answer(capsys.readouterr().out))
    assert said[0] == said[1] != said[2]


def test_one_token_saves_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, "--policy", "Never", "--max_new_tokens", "1") == 0
    shown = capsys.readouterr().out
    assert "nothing could be saved" in shown
    assert "exit 2" not in shown


def test_the_first_token_is_counted_apart(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, "--policy", "MaxProb", "--threshold", "0", "--max_new_tokens", "2") == 0
    shown = capsys.readouterr().out
    assert "exit 2  100%" in shown
    assert "2 tokens in" in shown
    assert "1 from the prompt's own pass, at full depth, and 1 as shared out above" in shown


def test_options_may_come_from_a_file(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "backbone: parts/backbone.yaml\nexits: {2: {}}\npolicy: Never\nchat: false\nmax_new_tokens: 3\n"
    (place / "generate.yaml").write_text(options)
    assert run("generate", "Who?", "-c", "generate.yaml", "--max_new_tokens", "4") == 0
    assert "4 tokens in" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--temperature=0.9"], ["--top_k", "3"], ["--top_p", "0.9"]])
def test_an_option_of_sampling_is_enough_to_sample(
    run: Run, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert run(*ASK, LIMIT, "--policy", "Never") == 0
    greedy = answer(capsys.readouterr().out)
    assert run(*ASK, LIMIT, "--policy", "Never", *options, "--seed=3") == 0
    assert answer(capsys.readouterr().out) != greedy
    assert run(*ASK, LIMIT, "--policy", "Never", *options, "--do_sample=false") == 2
    assert "would change nothing, because do_sample is off" in capsys.readouterr().err


def test_a_seed_alone_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, "--policy", "Never", "--seed", "1") == 2
    assert "seed would change nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stop_string_ends_the_answer(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ask = [*ASK, "--policy", "Never", "--max_new_tokens=40", "--temperature=3", "--seed=1"]
    assert run(*ask) == 0
    whole = answer(capsys.readouterr().out)
    stop = next(sign for sign in whole if sign.isascii() and sign.isalnum())
    for stops in (stop, f"[nowhere, '{stop}']"):
        assert run(*ask, f"--stop_strings={stops}") == 0
        assert answer(capsys.readouterr().out) == whole[: whole.index(stop)]


def test_full_decoding_needs_no_policy(run: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, LIMIT, "--policy", "null", "--decoder", "Full") == 0
    shown = answer(capsys.readouterr().out)
    assert shown == spoken(tiny_folder)[: len(shown)]


PROMPTS = [
    '"Hello" she said',
    "[INST] hi",
    "foo: bar: baz",
    "*bold* word",
    "@alice hi",
    "a\ttab",
    "\tbegins with a tab",
    "{1: 2, 1: 3}",
    "{'a': 'b'}",
    "[1, 2",
    "!important",
    "!!python/object:os.system",
    "%TAG",
    "# heading",
    "- item",
    "? what",
    "| pipe",
    "> quote",
    "&anchor",
    "'half a quote",
    '"half a quote',
    "null",
    "~",
    "true",
    "007",
    "1e5",
    "2020-01-01",
    "two\nlines: here",
    "ends with a colon:",
    "prompt.yaml",
    "/etc/passwd",
    "dynamax.Never",
    "naïve 🙂",
    " ",
    "\\",
    "$HOME `ls`",
]


@pytest.mark.parametrize("prompt", PROMPTS[::2])
def test_a_prompt_is_text_whatever_it_looks_like(
    run: Run, prompt: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["generate", prompt, *ASK[2:], "--policy", "Never", "--max_new_tokens", "3"]
    assert run(*ask) == 0
    shown = answer(capsys.readouterr().out)
    assert shown == load(tiny_folder, device="cpu").generate(prompt, chat=False, max_new_tokens=3).text


@pytest.mark.parametrize("prompt", ["-- dashes", "--help me", "-c"])
def test_a_prompt_that_begins_with_a_dash_stands_behind_two(
    run: Run, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", *ASK[2:], "--policy", "Never", "--max_new_tokens", "3", "--", prompt) == 0
    assert "3 tokens in" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["", "caf\udce9"])
def test_what_is_no_text_is_told(run: Run, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", prompt, *ASK[2:], "--policy", "Never") == 2
    assert "rompt" in capsys.readouterr().err


def test_heads_beside_exits_are_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASK, LIMIT, "--policy", "Never", "--heads", "somewhere") == 2
    assert "give one of the two" in capsys.readouterr().err


def test_a_gate_that_no_exit_has_is_told_before_anything_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ask = [option.replace("{2: {}, ", "{2: {gates: [LinearGate]}, ") for option in ASK]
    assert run(*ask, "--policy", "GateConfidence", "--policy.threshold=0.5", "--policy.gate=AttentionGate") == 2
    shown = capsys.readouterr()
    assert "no exit has; gates of the exits: LinearGate." in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("more", "told"), [([], "The backbone has no heads"), (["--heads", "nowhere"], "no saved heads in nowhere.")]
)
def test_heads_that_are_not_there_are_told_with_what_goes_without(
    run: Run, capsys: pytest.CaptureFixture[str], more: list[str], told: str
) -> None:
    ask = [option for option in ASK if not option.startswith("--exits")]
    assert run(*ask, *more) == 2
    message = capsys.readouterr().err
    assert told in message
    assert WITHOUT_HEADS in message
    assert run(*ask, *shlex.split(WITHOUT_HEADS)) == 0


def test_the_balance_counts_blocks_and_flops(tiny_folder: Path) -> None:
    answered = load(tiny_folder, device="cpu").generate("abc", chat=False, max_new_tokens=5, eos_token_id=[])
    assert balance(dataclasses.replace(answered, seconds=2.0)) == (
        "5 tokens in 2.0 s: 1 from the prompt's own pass, at full depth, and 4 as shared out above. Of these, blocks a "
        "token: 6.0 of 6, 0% saved; FLOPs: 0% saved."
    )


def test_line_ends_stay_bare() -> None:
    painted = DepthColors([2, 4], 6, on=True).paint("a\n\nb", 2)
    assert PAINT.sub("", painted) == "a\n\nb"
    assert all(not line or line.endswith("\x1b[0m") for line in painted.split("\n"))


def test_an_exit_at_the_top_is_full_depth():
    palette = DepthColors([2, 6], 6, on=False)
    assert palette.legend({2: 1, 6: 3}).split() == ["exit", "2", "25%", "full", "depth", "6", "75%"]
    assert DepthColors([2, 6], 6, on=True).paint("a", 6) == "a"


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
