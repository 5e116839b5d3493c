"""A later file or option over an earlier one: exits begin anew, a model's config is merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[..., int]
EXITS = "{2: {lens: LogitLens}, 4: {gates: [{class_path: MambaGate, init_args: {d_state: 4}}]}}"
CONFIG = "{model_type: llama, num_hidden_layers: 6, hidden_size: 32}"


@pytest.fixture
def given(run: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The options that a command line comes to."""

    def one(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert run(*arguments, "--print_config") == 0
        return yaml.safe_load(capsys.readouterr().out)

    return one


def exits(options: dict[str, Any]) -> dict[int, tuple[str | None, list[tuple[str, Any]]]]:
    """Lens, and gates with their state size, by depth."""
    found = {}
    for depth, exit_ in options["exits"].items():
        lens = exit_["lens"] and exit_["lens"]["class_path"].rpartition(".")[2]
        gates = [(gate["class_path"].rpartition(".")[2], gate.get("init_args", {})) for gate in exit_["gates"]]
        found[int(depth)] = lens, [(name, options.get("d_state")) for name, options in gates]
    return found


WHOLE = "{class_path: CoQA, init_args: {limit: 3}}"
WANTED = {2: ("LogitLens", []), 4: (None, [("MambaGate", 4)])}


def test_exits_of_a_later_file_begin_anew(given: Callable[..., dict[str, Any]], place: Path) -> None:
    (place / "later.yaml").write_text(f"model: {{init_args: {{exits: {EXITS}}}}}")
    assert exits(given("fit", "-c", "fit.yaml", "-c", "later.yaml")["model"]["init_args"]) == WANTED


@pytest.mark.slow
def test_exits_on_the_command_line_begin_anew(given: Callable[..., dict[str, Any]]) -> None:
    assert exits(given("fit", "-c", "fit.yaml", "--model.exits", EXITS)["model"]["init_args"]) == WANTED
    again = ["--model.exits={2: {gates: [{class_path: MambaGate, init_args: {d_state: 4}}]}}", "--model.exits"]
    last = given("fit", "-c", "fit.yaml", *again, "{2: {gates: [MambaGate]}}")["model"]["init_args"]
    assert exits(last) == {2: (None, [("MambaGate", 32)])}, "options of an earlier gate of that class are gone too"


def test_a_part_of_an_exit_changes_the_earlier_one(given: Callable[..., dict[str, Any]]) -> None:
    options = given("fit", "-c", "fit.yaml", "--model.exits.2.lens", "TunedLens")["model"]["init_args"]
    gates = [("LinearGate", None), ("MambaGate", 32)]
    assert exits(options) == {2: ("TunedLens", gates), 4: ("LowRankLens", gates)}


def test_exits_of_generate_begin_anew(given: Callable[..., dict[str, Any]], place: Path) -> None:
    (place / "first.yaml").write_text("exits: {2: {lens: TunedLens}, 4: {gates: [LinearGate]}}\npolicy: Never\n")
    (place / "later.yaml").write_text(f"exits: {EXITS}")
    ask = ["generate", "Who?", "-c", "first.yaml"]
    assert exits(given(*ask, "-c", "later.yaml")) == WANTED
    assert exits(given(*ask, "--exits", EXITS)) == WANTED


@pytest.mark.slow
def test_a_models_config_is_merged_unless_it_names_its_type(given: Callable[..., dict[str, Any]], place: Path) -> None:
    (place / "train.yaml").write_text(
        f"model: {{class_path: PretrainingModule, init_args: {{config: {CONFIG}, exits: [2], objective: LayerSkip}}}}"
    )
    (place / "later.yaml").write_text("model: {init_args: {config: {num_hidden_layers: 4}}}")

    def config(*more: str) -> dict[str, Any]:
        return given("train", "-c", "training.yaml", "-c", "train.yaml", *more)["model"]["init_args"]["config"]

    wanted = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 32}
    assert config("-c", "later.yaml") == config("--model.config={num_hidden_layers: 4}") == wanted
    assert config("--model.config.num_hidden_layers", "4") == wanted
    assert config("--model.config={model_type: mamba2}") == {"model_type": "mamba2"}


def task(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of the task."""
    found = options["data"]["init_args"]["task"]
    return found["class_path"].rpartition(".")[2], found.get("init_args", {})


@pytest.mark.slow
def test_another_class_begins_anew(given: Callable[..., dict[str, Any]], place: Path) -> None:
    """Its options are its own, whatever the earlier class had under the same names."""
    (place / "task.yaml").write_text(
        "{data: {class_path: TaskData, init_args: {task: {class_path: TriviaQA, init_args: "
        "{limit: 12, offset: 240, max_new_tokens: 24}}}}}"
    )
    (place / "other.yaml").write_text("{data: {init_args: {task: CoQA}}}")
    (place / "part.yaml").write_text(WHOLE)
    plain = {"path": None, "limit": None, "offset": 0, "max_new_tokens": 64, "last_turn_only": False}
    ask = ["test", "-c", "test.yaml", "-c", "task.yaml"]
    assert task(given(*ask))[1]["offset"] == 240
    assert task(given(*ask, "-c", "other.yaml")) == ("CoQA", plain)
    assert task(given(*ask, "--data.task", "CoQA")) == ("CoQA", plain)
    assert task(given(*ask, "--data.task", "part.yaml")) == ("CoQA", plain | {"limit": 3})
    assert task(given(*ask, "--data.task", "{class_path: CoQA, init_args: {limit: 3}}")) == (
        "CoQA",
        plain | {"limit": 3},
    )
    assert task(given(*ask, "--data.task", "CoQA", "--data.task.offset", "7")) == ("CoQA", plain | {"offset": 7})
    assert task(given(*ask, "--data.task.class_path", "CoQA")) == ("CoQA", plain)
    same = task(given(*ask, "--data.task", "TriviaQA"))[1]
    assert (same["limit"], same["offset"]) == (12, 240), "the same class keeps its options"


def test_another_text_source_begins_anew(given: Callable[..., dict[str, Any]], place: Path) -> None:
    (place / "text.yaml").write_text(
        "{data: {init_args: {text: {class_path: HubText, init_args: {name: x, length: 99, rows: 7, field: words}}}}}"
    )
    ask = ["fit", "-c", "fit.yaml", "-c", "text.yaml"]
    found = given(*ask, "--data.text", "{class_path: LocalText, init_args: {path: prompts.txt}}")["data"]["init_args"]
    assert {name: found["text"]["init_args"][name] for name in ("length", "rows", "field")} == {
        "length": 256,
        "rows": None,
        "field": "text",
    }


@pytest.mark.slow
def test_an_entry_of_a_list_begins_anew_where_it_names_another_class(given: Callable[..., dict[str, Any]]) -> None:
    earlier = "--model.policies=[{policy: {class_path: Margin, init_args: {threshold: 0.7, temperature: 3.0}}}]"

    def policy(later: str) -> tuple[str, dict[str, Any]]:
        options = given("test", "-c", "test.yaml", earlier, f"--model.policies=[{{policy: {later}}}]")
        (entry,) = options["model"]["init_args"]["policies"]
        return entry["policy"]["class_path"].rpartition(".")[2], entry["policy"]["init_args"]

    assert policy("Margin") == ("Margin", {"threshold": 0.7, "temperature": 3.0})
    later = "{class_path: MaxProb, init_args: {threshold: 0.5}}"
    assert policy(later) == ("MaxProb", {"threshold": 0.5, "temperature": 1.0})
