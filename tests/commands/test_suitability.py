"""``suitability``: a verdict with its figures and a picture; what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]
LLAMA = Path("assets/llama").resolve()


@pytest.mark.slow
def test_a_model_is_judged_on_its_own_answers(run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ("suitability", str(LLAMA), "--documents", "12", "--every", "3", "--precision", "null", "--measure", "true")
    assert run(*asked, "--out", "found/it.json", "--plot", "found/it.png") == 0
    shown = capfd.readouterr().out
    content = json.loads((tmp_path / "found" / "it.json").read_text())
    assert content["command"].startswith("dynamax suitability ")
    assert [row["depth"] for row in content["rows"]] == [3, 6]
    assert f"Do early exits pay on {LLAMA}? {content['verdict'].capitalize()}." in shown
    assert f"{content['rows'][0]['logit']['agreement']:.1%}" in shown
    assert "of the time here" in shown
    for row in content["rows"]:
        assert row["bytes"]["break_even"]["logit"] == pytest.approx(
            row["bytes"]["read"] / (row["bytes"]["read"] + row["bytes"]["blocks"]), abs=1e-3
        )
        assert row["time"]["read"] > 0
    assert sum(content["documents"].values()) == 12
    assert (tmp_path / "found" / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_texts_can_be_given(run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(
        "\n".join(f"{index} cats and {index * 7} dogs are in house {index}." for index in range(30))
    )
    text = ("--text", "SelfGenerated", "--text.prompts", "text.txt", "--text.field", "text", "--text.chat", "false")
    more = ("--text.documents", "30", "--text.max_new_tokens", "8", "--every", "4", "--precision", "null")
    assert run("suitability", str(LLAMA), *text, *more) == 0
    assert "of the bytes" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--keep", "1.5"), ("keep 1.5", "between 0 and 1")),
        (("--every", "8"), ("every 8", "1 to 7")),
        (("--documents", "0"), ("documents",)),
        (("--out", "x.png"), ("x.png", ".json")),
        (("--plot", "x.json"), ("x.json", ".png")),
    ],
)
def test_mistakes_are_told(refused: Refused, options: Sequence[str], named: Sequence[str]) -> None:
    refused(("suitability", str(LLAMA), "--precision", "null", "--documents", "2", *options), named)
