"""``dynamax bench`` as a user runs it: table, report, picture, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import validate

import dynamax
from dynamax import Exit, Folder
from dynamax.bench.contenders import CONTENDERS, ON_REQUEST
from dynamax.bench.prompts import DEFAULT
from dynamax.bench.results import MEANING
from dynamax.cli import main
from dynamax.heads.gates import MambaGate

ASSETS = Path(__file__).parents[2] / "assets"
EXITS = ("--exits={2: {}, 4: {}}", "--policy", "MaxProb", "--threshold", "0.05")
SMALL = ("--rounds", "1", "--threads", "1")
SPREAD = {"type": "object", "required": ["p10", "p50", "p95"], "additionalProperties": {"exclusiveMinimum": 0}}
NUMBER, TEXT = {"type": "number"}, {"type": "string"}
SCHEMA = {
    "type": "object",
    "required": [
        *("command", "dynamax", "when", "environment", "model", "options", "loading", "reference", "meaning"),
        *("contenders", "floors", "absent"),
    ],
    "additionalProperties": False,
    "properties": {
        "command": TEXT,
        "dynamax": TEXT,
        "when": TEXT,
        "reference": {"const": "transformers"},
        "meaning": {"type": "object", "additionalProperties": TEXT},
        "environment": {"required": ["device", "threads", "dtype", "torch", "transformers", "packages", "cpus"]},
        "model": {"required": ["name", "source", "sizes", "end_tokens", "heads", "exits", "policy"]},
        "options": {"required": ["prompts", "max_new_tokens", "rounds", "seed", "chat"]},
        "loading": {"enum": ["together", "in turn"]},
        "contenders": {
            "type": "array",
            "minItems": 1,
            "items": {
                "required": [*MEANING, "name", "about", "ours", "weights", "load_seconds", "raw", "floor_weights"],
                "properties": {
                    "name": {"enum": list(CONTENDERS)},
                    "ms_per_token": SPREAD,
                    "first_token_ms": SPREAD,
                    "tokens_per_second": {"exclusiveMinimum": 0},
                    "floor_ms": {"exclusiveMinimum": 0},
                    "memory_bytes": {"type": ["integer", "null"]},
                    "equal_share": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
                    "raw": {"type": "array", "items": {"required": ["prompt", "round", "tokens", "ended"]}},
                },
            },
        },
        "floors": {"additionalProperties": {"properties": {"ms": SPREAD, "raw_ms": {"items": NUMBER}}}},
        "absent": {"items": {"required": ["name", "reason"], "properties": {"name": TEXT, "reason": TEXT}}},
    },
}

Bench = Callable[..., int]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Run the command in an empty folder, as if no peer were installed; its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dynamax.bench.base.find_spec", lambda _: None)

    def one(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["bench", *arguments])
        return ended.value.code  # type: ignore[return-value]

    return one


@pytest.mark.slow
def test_table_report_and_picture(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = ("--out", "new/report.json", "--plot", "new/bars.png")
    assert bench(str(ASSETS / "llama"), *EXITS, *SMALL, "--max-new-tokens", "4", *files) == 0
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    validate(report, SCHEMA)
    assert (tmp_path / "new" / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert report["command"].startswith("dynamax bench ")
    assert len(report["options"]["prompts"]) == DEFAULT
    found = {each["name"]: each for each in report["contenders"]}
    absent = {each["name"]: each["reason"] for each in report["absent"]}
    assert set(found) | set(absent) == set(CONTENDERS) - set(ON_REQUEST)
    assert {"dynamax-full", "dynamax-early-exit", "dynamax-lossless", "transformers"} <= set(found)
    for name in ("dynamax-full", "dynamax-lossless", "transformers"):
        assert (found[name]["equal_share"], found[name]["identical"]) == (1.0, DEFAULT)
    for package in ("economize", "ctranslate2", "llama-cpp-python"):
        assert any(f"pip install {package}" in reason for reason in absent.values())
        assert f"pip install {package}" in shown.out
    assert "transformers-lookup" in found
    lines = shown.out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in found)
    assert max(len(line) for line in lines if line.startswith(tuple(found))) <= 100
    assert "loading dynamax-full" in shown.err


@pytest.mark.slow
def test_a_recurrent_model_is_measured_too(bench: Bench, tmp_path: Path) -> None:
    few = ("--contenders", "dynamax-full,dynamax-lossless,transformers", "--max-new-tokens", "4")
    assert bench(str(ASSETS / "mamba2"), *EXITS, *SMALL, *few, "--out", "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    validate(report, SCHEMA)
    assert [each["equal_share"] for each in report["contenders"]] == [1.0] * 3
    assert bench(str(ASSETS / "mamba2"), "--contenders", "transformers-lookup", *SMALL) == 2


@pytest.mark.slow
def test_answers_end_at_the_models_end_tokens(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Where does the sun rise?\n\nWho wrote it?\n")
    given = ("--prompts", "prompts.txt", "--max-new-tokens", "8", "--contenders", "dynamax-full,transformers")
    assert bench(str(ASSETS / "llama"), *SMALL, *given, "--out", "free.json") == 0
    free = json.loads((tmp_path / "free.json").read_text())
    whole = {each["prompt"]: each["tokens"] for each in free["contenders"][0]["raw"]}
    assert free["options"]["prompts"] == ["Where does the sun rise?", "Who wrote it?"]
    end = whole[0][3]
    shutil.copytree(ASSETS / "llama", tmp_path / "ending")
    (tmp_path / "ending" / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    assert bench("ending", *SMALL, *given, "--out", "stopped.json") == 0
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    for each in stopped["contenders"]:
        first, _ = each["raw"]
        assert first["tokens"] == whole[0][: whole[0].index(end) + 1]
        assert first["ended"]
        assert each["ended"] == sum(end in tokens for tokens in whole.values())
        assert each["identical"] == 2


@pytest.mark.slow
def test_a_folder_of_heads_names_its_model_and_has_a_policy(bench: Bench, tmp_path: Path) -> None:
    engine = dynamax.load(ASSETS / "llama", exits={4: Exit(gates=[MambaGate])}, device="cpu")
    assert engine.exits is not None
    engine.exits.save("heads", engine.backbone.spec, Folder(ASSETS / "llama").recipe)
    given = ("--contenders", "dynamax-early-exit,dynamax-lossless,transformers", "--max-new-tokens", "4")
    assert bench("heads", *SMALL, *given, "--out", "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["model"]["heads"], report["model"]["policy"]) == ("heads", "GateConfidence(MambaGate)")
    assert report["contenders"][1]["identical"] == DEFAULT


@pytest.mark.slow
def test_without_the_reference_nothing_is_compared(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--contenders", "dynamax-full", "--max-new-tokens", "2")
    assert bench(str(ASSETS / "llama"), *SMALL, *given) == 0
    assert "Nothing to compare answers with: name transformers" in capsys.readouterr().out


@pytest.mark.slow
def test_where_memory_is_short_the_report_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dynamax.bench.runner.available", lambda: 1000)
    given = ("--contenders", "dynamax-full,transformers", "--max-new-tokens", "2", "--out", "report.json")
    assert bench(str(ASSETS / "llama"), *SMALL, *given) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    validate(report, SCHEMA)
    assert report["loading"] == "in turn"
    assert set(report["floors"]) == {"float32"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no/such/model"], ["no/such/model is no folder of heads"]),
        (["LLAMA", "--contenders", "llamacpp"], ["no contender 'llamacpp'", "Did you mean llamacpp-f"]),
        (["LLAMA", "--contenders", "ctranslate2-int8"], ["ctranslate2-int8 was asked for", "pip install ctranslate2"]),
        (["LLAMA", "--contenders", "dynamax-early-exit"], ["dynamax-early-exit was asked for", "--exits"]),
        (["LLAMA", "--prompts", "absent.txt"], ["absent.txt cannot be read", "a prompt on each line"]),
        (["LLAMA", "--prompts", "empty.txt"], ["empty.txt has no prompts"]),
        (["LLAMA", "--prompts", "latin.txt"], ["not UTF-8"]),
        (["LLAMA", "--rounds", "0"], ["rounds=0", "1 or more"]),
        (["LLAMA", "--rounds", "many"], ["rounds was given many", "a whole number"]),
        (["LLAMA", "--max-new-tokens", "1"], ["max_new_tokens=1", "2 or more"]),
        (["LLAMA", "--max-new-tokens", "900"], ["context holds 512", "lower max_new_tokens"]),
        (["LLAMA", "--threads", "0"], ["threads=0"]),
        (["LLAMA", "--out", "report.txt"], ["report.txt", ".json"]),
        (["LLAMA", "--plot", "bars.pdf"], ["bars.pdf", ".png"]),
        (["LLAMA", "--out", "empty.txt/report.json"], ["empty.txt is no folder"]),
        (["LLAMA", "--heads", "nowhere"], ["nowhere"]),
        (["LLAMA", "--heads", "nowhere", "--exits={2: {}}"], ["one of the two"]),
        (["LLAMA", "--exits={99: {}}", "--policy", "Never", "--contenders", "dynamax-lossless"], ["99"]),
        (["LLAMA", "--policy", "MaxPro"], ["MaxPro", "Did you mean MaxProb?"]),
        (["LLAMA", "--max_tokens", "3"], ["no option --max_tokens"]),
        ([], ["There is no model", "SmolLM2"]),
    ],
)
def test_what_cannot_be_done_is_refused(
    arguments: list[str], told: list[str], bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Où est-ce ?".encode("latin-1"))
    assert bench(*[each.replace("LLAMA", str(ASSETS / "llama")) for each in arguments]) == 2
    message = capsys.readouterr().err.split("dynamax: ")[-1]
    assert all(words in message for words in told), message
    assert "Traceback" not in message
    assert len(message) < 900


def test_it_speaks_before_it_imports_what_is_heavy() -> None:
    program = "import sys; import dynamax.cli, dynamax.commands.bench; print([n for n in HEAVY if n in sys.modules])"
    program = program.replace("HEAVY", "('torch', 'transformers', 'numpy', 'jsonargparse')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
