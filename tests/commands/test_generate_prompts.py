"""``dynamax generate`` with several prompts, with standard input, and as JSON."""

from __future__ import annotations

import io
import json
import sys

import pytest

import dynamax
from dynamax.cli import main

MODEL = ["--backbone=Folder", "--backbone.path=assets/llama", "--exits={2: {}}", "--max_new_tokens=5"]
ASK = [*MODEL, "--policy=MaxProb", "--threshold=0.5"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["generate", *arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_several_prompts_are_answered_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    both = said(capsys, "What is the sea?", "Who is it?", *ASK)
    first, second = (said(capsys, prompt, *ASK).partition("\n\n")[0] for prompt in ("What is the sea?", "Who is it?"))
    assert both.startswith(f"> What is the sea?\n{first}\n\n")
    assert f"\n> Who is it?\n{second}\n\n" in both


@pytest.mark.slow
def test_a_line_of_json_for_each_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "What is the sea?", "Où est-il ?\n", *ASK, "--json").splitlines()
    answers = [json.loads(line) for line in lines]
    engine = dynamax.load("assets/llama", exits=[2], precision="auto", device="cpu")
    for prompt, answer in zip(("What is the sea?", "Où est-il ?\n"), answers, strict=True):
        wanted = engine.generate(prompt, policy=dynamax.MaxProb(0.5), max_new_tokens=5)
        assert (answer["prompt"], answer["text"]) == (prompt, wanted.text)
        assert (answer["tokens"], answer["depths"]) == (wanted.tokens, wanted.depths)
        assert answer["blocks"] == 8


@pytest.mark.parametrize("given", [b"What is the sea?", b"What is the sea?\n", b"What is the sea?\r\n"])
def test_a_dash_is_standard_input(
    given: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii"))
    (line,) = said(capsys, "-", *ASK, "--json", "true").splitlines()
    assert json.loads(line)["prompt"] == "What is the sea?"


@pytest.mark.parametrize(
    ("stdin", "prompts", "told"),
    [
        (b"", ["-"], "Standard input is empty"),
        (b"\n", ["-"], "Standard input is empty"),
        (b"\xff", ["-"], "not UTF-8"),
        (b"one", ["-", "-"], "can be read once"),
        (b"", ["one", ""], "The prompt is empty"),
    ],
)
def test_what_is_no_prompt_is_refused(
    stdin: bytes, prompts: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as ended:
        main(["generate", *prompts, *ASK])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
