"""Text is never parsed, paths count from the file that names them, damaged files are told with the place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from dynamax import registry
from dynamax.commands.parsing import Parser, prepare
from dynamax.paths import InputPath

Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]
PROMPTS = [
    '"Hello" she said',
    "'Hello' she said",
    "[INST] hi",
    "[INST] hi [/INST]",
    "[1, 2]",
    "foo: bar: baz",
    "foo: bar",
    "*bold* word",
    "&anchor word",
    "@alice hi",
    "`code`",
    "%percent",
    "a\tb",
    "\ta",
    "{1: 2, 1: 3}",
    "{unclosed",
    "-5 is what?",
    "- a list",
    "null",
    "~",
    "true",
    "1e5",
    "007",
    "prompt.yaml",
    "broken.yaml",
    ".",
    "# comment",
    "!tag x",
    "| block",
    "> folded\n  more",
    "a\n\nb",
    "class_path: MaxProb",
    "${HOME}",
    "Ünïcode — 日本 🙂",
    "what? --limit 3",
    "x=y",
]


def options(
    prompt: str,
    *,
    stop_strings: list[str] | None = None,
    either: str | list[str] | None = None,
    note: str | None = None,
    heads: InputPath | None = None,
) -> None:
    """Stands for a command.

    Args:
        prompt: A text.
        stop_strings: Texts.
        either: One text or several.
        note: A text, or none.
        heads: Something to read.
    """


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.yaml").write_text("a: 1\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    prepare()

    def one(*arguments: str):
        parser = Parser(prog="test")
        parser.add_argument("-c", "--config", action="config")
        parser.add_argument("prompt", type=str)
        parser.add_function_arguments(options, skip={"prompt"}, sub_configs=True)
        return parser.read_arguments(arguments)

    return one


@pytest.mark.parametrize("text", PROMPTS)
def test_a_prompt_is_what_was_written(parse, text: str) -> None:
    assert parse(text).prompt == text
    assert parse("--note", "x", "--", text).prompt == text
    assert parse("Who?", f"--note={text}").note == (None if text == "null" else text)


@pytest.mark.parametrize("text", ["--- hi", "--debug", "--help", "-", "--", "-x", "--note=3"])
def test_behind_two_dashes_all_is_text(parse, text: str) -> None:
    assert parse("--", text).prompt == text


@pytest.mark.parametrize("text", [each for each in PROMPTS if each not in ("[1, 2]", "null")])
def test_stop_strings_are_text_too(parse, text: str) -> None:
    assert parse("Who?", f"--stop_strings={text}").stop_strings == [text]
    assert parse("Who?", f"--either={text}").either in (text, [text])


def test_several_stop_strings_are_a_list_of_text(parse) -> None:
    assert parse("Who?", '--stop_strings=["a: b", 1e5, null, "]"]').stop_strings == ["a: b", "1e5", "null", "]"]
    assert parse("Who?", "--stop_strings=null").stop_strings is None
    assert parse("Who?", "--stop_strings=a", "--stop_strings+=b").stop_strings == ["a", "b"]


def test_text_in_a_file_is_what_yaml_says(parse, tmp_path: Path) -> None:
    given = {"note": "[INST] *hi*: @x", "stop_strings": ["{1: 2}", "null", "1e5", "broken.yaml"]}
    (tmp_path / "all.yaml").write_text(json.dumps(given))
    found = parse("Who?", "-c", "all.yaml")
    assert {name: found[name] for name in given} == given


def test_options_of_parts_are_text_too(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--data.text.field=[a: b", "--data.text.path", "1e5"]
    assert run("fit", "-c", "fit.yaml", *text, "--print_config") == 0
    found = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["text"]["init_args"]
    assert found["field"] == "[a: b"
    assert Path(found["path"]).name == "1e5"
    assert run("generate", "Who?", "--policy.gate=null", "--policy.threshold=0.5", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["policy"]["init_args"]["gate"] is None
    assert run("generate", "Who?", "--policy.gate", "*x*", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["policy"]["init_args"]["gate"] == "*x*"


# -- paths ------------------------------------------------------------------------------------------


def test_a_path_counts_from_the_file_that_names_it(parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "all.yaml").write_text("heads: ../heads\n")
    assert parse("Who?", "-c", "deep/all.yaml").heads == str(tmp_path / "heads")
    assert parse("Who?", "-c", "deep/all.yaml", "--heads", "other").heads == "other"
    assert parse("Who?", "--heads", "1e5").heads == "1e5"
    assert parse("Who?", "-c", "deep/all.yaml", "--heads", "null").heads is None
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "deep" / "all.yaml").write_text("heads: ~/heads\n")
    assert parse("Who?", "-c", "deep/all.yaml").heads == "/home/someone/heads"
    assert parse("Who?", "--heads", "~/heads").heads == "/home/someone/heads"


@pytest.mark.slow
def test_a_printed_configuration_holds_in_any_folder(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "-c", "fit.yaml", "--model.heads", "old", "--print_config") == 0
    (place / "far" / "away").mkdir(parents=True)
    (place / "far" / "away" / "all.yaml").write_text(capsys.readouterr().out)
    assert run("fit", "-c", "far/away/all.yaml", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["heads"] == str(place / "old")
    assert printed["data"]["init_args"]["text"]["init_args"]["path"] == str(place / "text.txt")
    assert printed["data"]["init_args"]["folder"] == "store", "what is written counts from the working directory"


@pytest.mark.slow
def test_a_part_s_paths_count_from_the_part_s_own_file(
    run: Run, place: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "models").symlink_to(tiny_folder.parent)
    (place / "parts" / "backbone.yaml").write_text(
        f"class_path: Folder\ninit_args: {{path: ../models/{tiny_folder.name}}}\n"
    )
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "fit.yaml").write_text(
        (place / "fit.yaml").read_text().replace("parts/", "../parts/").replace("text.txt", "../text.txt")
    )
    assert run("cache", "-c", "elsewhere/fit.yaml") == 0
    assert len(list((place / "store").glob("*/shard-*"))) == 1
    capsys.readouterr()
    assert run("fit", "-c", "elsewhere/fit.yaml", "--data.text.path", "../text.txt") == 2
    assert "There is no file" in capsys.readouterr().err


# -- damaged files ----------------------------------------------------------------------------------

DAMAGED = {
    "unclosed": (b"model: HeadsModule\ndata: [a, b\n", ["mine.yaml, line 3", "not YAML"]),
    "colons": (b"model: HeadsModule\ntext: a: b: c\n", ["mine.yaml, line 2, column 8", "not YAML"]),
    "tab": (b"model:\n\tclass_path: HeadsModule\n", ["mine.yaml, line 2, column 1", "spaces, not tabs"]),
    "Latin-1": ("model: HeadsModule\n# caf\u00e9\n".encode("latin-1"), ["mine.yaml, line 2", "0xe9", "UTF-8"]),
    "control character": (b"model: a\x00b\n", ["mine.yaml", "not YAML"]),
    "a list": (b"- a\n- b\n", ["mine.yaml holds a list", "wanted"]),
    "a scalar": (b"word\n", ["mine.yaml holds one value"]),
    "empty": (b"", ["mine.yaml holds nothing"]),
    "comments alone": (b"# later\n", ["mine.yaml holds nothing"]),
    "two documents": (b"a: 1\n---\nb: 2\n", ["mine.yaml, line 2", "not YAML"]),
    "a list that holds itself": (b"a: &a [*a]\n", ["mine.yaml", "holds itself"]),
    "lists too deep": (b"a: " + b"[" * 3000 + b"]" * 3000, ["mine.yaml", "too deep"]),
    "a tag of Python": (b"a: !!python/object:os.system [ls]\n", ["mine.yaml, line 1", "constructor"]),
    "a tag that is wrong": (b"a: !!float word\n", ["mine.yaml", "tag"]),
    "a truth that is none": (b"a: !!bool word\n", ["mine.yaml", "tag"]),
    "a number as an option": (b"2: {}\n", ["mine.yaml, line 1", "no name of an option"]),
    "nothing as a key": (b"model: {~: 1}\n", ["mine.yaml", "line 1", "wanted: text or a number"]),
    "a mapping as a key": (b"? {a: b}\n: c\n", ["mine.yaml", "a list or a mapping as a key"]),
    "UTF-16": ("a: 1".encode("utf-16"), ["mine.yaml, line 1", "UTF-8"]),
    "a key twice": (b"model: A\nmodel: B\n", ["mine.yaml", "The key model stands twice", "line 1"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_told_with_the_place(refused: Refused, place: Path, case: str) -> None:
    content, told = DAMAGED[case]
    (place / "mine.yaml").write_bytes(content)
    refused(["fit", "-c", "mine.yaml"], told)
    refused(["generate", "Who?", "--config=mine.yaml"], told)
    refused(["generate", "Who?", "-cmine.yaml"], told)


@pytest.mark.slow
def test_a_damaged_part_is_told_with_the_place(refused: Refused, place: Path) -> None:
    for content, told in (DAMAGED[name] for name in ("unclosed", "colons", "tab", "Latin-1", "a key twice")):
        (place / "parts" / "exit.yaml").write_bytes(content)
        told = [each.replace("mine.yaml", "parts/exit.yaml") for each in told]
        refused(["fit", "-c", "fit.yaml"], told)
        refused(["fit", "--model", "HeadsModule", "--model.exits.2", "parts/exit.yaml"], told)


def test_a_folder_or_nothing_in_place_of_a_file(refused: Refused) -> None:
    refused(["fit", "-c", "parts"], ["parts was given after -c, but it is a folder"])
    refused(["fit", "--config", "nope.yaml"], ["nope.yaml was given after --config, but it does not exist"])


# -- prompts through the command --------------------------------------------------------------------

ASK = ("--backbone", "parts/backbone.yaml", "--exits={2: {}}", "--policy=Never", "--chat=false", "--max_new_tokens=2")


@pytest.mark.parametrize("text", ["[INST] hi", '"Hello" she said', "foo: bar: baz", "null", "\t", "{1: 2, 1: 3}"])
def test_generate_answers_any_text(run: Run, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert run("generate", text, *ASK) == 0
    assert "2 tokens in" in capsys.readouterr().out


@pytest.mark.slow
def test_generate_answers_text_that_looks_like_an_option(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("--- hi", "--debug", "--help"):
        assert run("generate", *ASK, "--", text) == 0
        assert "2 tokens in" in capsys.readouterr().out
    assert run("generate", "-5 is what?", *ASK) == 0


def test_an_empty_prompt_and_a_second_one_are_refused(refused: Refused) -> None:
    refused(["generate", "", *ASK], ["The prompt is empty"])
    refused(["generate", "caf\udce9", *ASK], ["not UTF-8"])
    refused(["generate", "Who?", *ASK, "And you?"], ["one value too many", "quotes"])


# -- parts by name ----------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A plug-in that cannot be imported, in every kind."""
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    read = registry._installed
    monkeypatch.setattr(
        registry, "_installed", lambda group: (*read(group), EntryPoint("Broken", "broken_plugin:Broken", group))
    )


@pytest.mark.slow
@pytest.mark.usefixtures("broken")
def test_a_broken_plug_in_stops_only_those_who_name_it(
    run: Run, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "-c", "fit.yaml", "--print_config") == 0
    assert run("generate", "Who?", *ASK) == 0
    told = ["Broken cannot be imported from broken_plugin:Broken: RuntimeError: no licence", "install again"]
    refused(["fit", "-c", "fit.yaml", "--model.exits={2: {lens: Broken}}"], told)
    refused(["fit", "-c", "fit.yaml", "--model.exits={2: {gates: [Broken]}}"], told)
    refused(["fit", "-c", "fit.yaml", "--model.backbone", "Broken"], told)
    refused(["fit", "-c", "fit.yaml", "--trainer.callbacks", "Broken"], told)
    refused(["test", "-c", "test.yaml", "--model.policies=[{policy: Broken}]"], told)
    refused(["generate", "Who?", "--policy", "Broken"], told)
    capsys.readouterr()
    assert run("list") == 0
    shown = capsys.readouterr().out
    assert shown.count("BROKEN: The ") == len(registry.ALL)
    assert "RuntimeError: no licence" in shown
    refused(["fit", "-c", "fit.yaml", "--data.text", "Brokn"], ["Did you mean Broken"])


@pytest.mark.slow
def test_only_what_is_named_is_imported() -> None:
    program = (
        "import sys\n"
        "from dynamax.commands.parsing import Parser, prepare\n"
        "from dynamax.policies.base import TerminationPolicy\n"
        "prepare()\n"
        "parser = Parser()\n"
        "parser.add_argument('--policy', type=TerminationPolicy)\n"
        "found = parser.read_arguments(['--policy', 'MaxProb', '--policy.threshold', '0.5'])\n"
        "print(found.policy.class_path.rpartition('.')[2])\n"
        "print([each for each in sys.modules if each.startswith(('lightning', 'dynamax.tasks', 'dynamax.data'))])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["MaxProb", "[]"]


WRONG = {
    "model: 3": "model was given 3; wanted: LightningModule",
    "model: {class_path: 3}": "model was given {'class_path': 3}; wanted",
    "model: {class_path: HeadsModule, init_args: 3}": "model was given",
    "model: {init_args: {exits: [a]}}": "model.exits was given ['a']; wanted: a mapping",
    "model: {init_args: {exits: {a: {}}}}": "model.exits was given {'a': {}}; wanted: a mapping (a whole number",
    "model: {init_args: {exits: {2: {gates: {a: b}}}}}": "model.exits.gates was given {'a': 'b'}; wanted: a list",
    "model: {init_args: {phases: {lenses: {objective: 3}}}}": "model.phases.objective was given 3; wanted: Objective",
    "model: {init_args: {phases: 3}}": "model.phases was given 3; wanted: a mapping (text: Phase",
    "data: {init_args: {folder: 3}}": "data.folder was given 3; wanted: text",
    "trainer: 3": "trainer was given 3; wanted: its options",
    "trainer: [a]": "trainer was given ['a']; wanted: its options",
    "trainer: {callbacks: 3}": "trainer.callbacks was given 3; wanted: a list",
    "trainer: {precision: 7}": "trainer.precision was given 7; wanted: 64, 32, 16",
    "seed_everything: [1]": "seed_everything was given [1]; wanted: true or false or a whole number",
}


@pytest.mark.parametrize("content", WRONG)
def test_a_value_of_the_wrong_kind_is_told_without_words_of_python(refused: Refused, place: Path, content: str) -> None:
    (place / "mine.yaml").write_text(content)
    refused(["fit", "-c", "fit.yaml", "-c", "mine.yaml"], [WRONG[content]])


@pytest.mark.parametrize(
    "option",
    [
        "--exits=2",
        "--exits=words",
        "--promise=words",
        "--promise={}",
        "--promise={level: 3}",
        "--edge={}",
        "--edge=2",
        "--backbone=[]",
    ],
)
def test_no_type_of_python_is_in_a_message(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert run("generate", "Who?", option) == 2
    told = capsys.readouterr().err
    assert not any(leak in told for leak in ("dict[", "<class", "NoneType", "dynamax.", "Subtypes", "Union")), told
