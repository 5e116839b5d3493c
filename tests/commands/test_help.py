"""Pages of help and lists of parts: light, whole, and true to the classes they tell of."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields

import pytest
from lightning.pytorch import Trainer

from dynamax.cli import COMMANDS
from dynamax.commands.generate import generate
from dynamax.commands.help import PARTS, definition, options
from dynamax.commands.measuring import bench
from dynamax.registry import ALL, FAMILIES, HEADS
from dynamax.serving.options import EdgeOptions

Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]
HEAVY = "torch lightning transformers datasets jsonargparse numpy"


def imported(*arguments: str) -> tuple[str, list[str]]:
    """What a command prints, and which heavy packages it imports."""
    program = f"import sys, atexit; atexit.register(lambda: print(*[n for n in '{HEAVY}'.split() if n in sys.modules]))"
    program += f"; from dynamax.cli import main; main({list(arguments)})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *shown, heavy = done.stdout.splitlines()
    return "\n".join(shown), heavy.split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    shown, heavy = imported(command, "--help")
    assert heavy == []
    assert shown.startswith(f"usage: dynamax {command}")
    assert max(map(len, shown.splitlines())) <= 100
    assert len(shown.splitlines()) < 100
    assert "``" not in shown


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["list", *[each.word for each in ALL if each.word == word]], set())
        for word in [each.word for each in ALL if each is not FAMILIES]
    ]
    + [(["list", "families"], {"torch", "transformers", "numpy"})],
)
def test_list_imports_as_little_as_can_be(arguments: list[str], allowed: set[str]) -> None:
    assert set(imported(*arguments)[1]) <= allowed


@pytest.mark.slow
def test_info_and_the_parser_of_generate_do_without_lightning() -> None:
    assert "lightning" not in imported("info")[1]
    program = "import sys; from dynamax.commands import parsing; parsing.prepare(); print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "part", sorted({part for parts in PARTS.values() for part in parts}), ids=lambda each: each.name
)
def test_options_read_from_source_are_those_of_the_class(part) -> None:
    module = __import__(part.module, fromlist=[part.name])
    wanted = inspect.signature(getattr(module, part.name)).parameters
    found = options(part.module, part.name)
    assert [each.name for each in found] == list(wanted)
    for each in found:
        assert each.text, f"{each.name} is not documented"
        there = wanted[each.name].default
        assert each.default is None if there is inspect.Parameter.empty else there == eval(str(each.default))


def test_options_of_generate_are_those_of_the_function(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = options("dynamax.commands.generate", "generate")
    assert [each.name for each in found] == list(inspect.signature(generate).parameters)
    assert run("generate", "-h") == 0
    shown = capsys.readouterr().out
    assert all(each.text and f"  --{each.name} " in shown for each in found if each.name != "prompts")


def test_options_of_bench_are_those_of_the_function(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = options("dynamax.commands.measuring", "bench")
    assert [each.name for each in found] == list(inspect.signature(bench).parameters)
    assert run("bench", "-h") == 0
    shown = capsys.readouterr().out
    assert all(each.text and f"  --{each.name} " in shown for each in found if each.name not in ("model", "command"))
    assert "  MODEL " in shown


def test_all_options_are_the_live_parsers(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--help", "all") == 0
    assert "--trainer.detect_anomaly" in capsys.readouterr().out
    assert run("generate", "--help", "all") == 0
    assert "--policy.help" in capsys.readouterr().out


def test_a_part_that_is_nowhere_is_a_lookup_error() -> None:
    for module, name in [("nobodys", "X"), ("dynamax.nowhere", "X"), ("dynamax.heads.gates", "NoGate")]:
        with pytest.raises(LookupError):
            definition(module, name)


def test_list_tells_name_line_and_origin(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    shown = capsys.readouterr().out
    assert "BROKEN" not in shown
    for registry in ALL:
        assert f"\n{registry.word}\n" in f"\n{shown}"
        for name in registry.names():
            line = (inspect.getdoc(registry.get(name)) or "").split("\n")[0]
            assert any(each.split()[:1] == [name] and f" {line} " in each for each in shown.splitlines()), name
    assert "granitemoehybrid" in shown
    assert "[dynamax-exits " in shown
    assert run("list", "heads") == 0
    assert [each.split()[0] for each in capsys.readouterr().out.splitlines() if each] == ["heads", *HEADS.names()]


def test_an_unknown_kind_is_told_with_near_ones(refused: Refused) -> None:
    refused(["list", "head"], ["list was given head", "sources, families", "Did you mean heads?"])
    refused(["list", "heads", "tasks"], ["list was given heads tasks", "at most one"])


def test_all_options_of_the_trainer_have_a_page(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--help", "trainer") == 0
    shown = capsys.readouterr().out
    names = [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    assert all(f"  --trainer.{name}" in shown for name in names)
    assert "`" not in shown
    assert ":param" not in shown
    assert len(shown.splitlines()) < 3 * len(names)


def test_a_group_of_commands_shows_each(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for asked in ([], ["--help"], ["-h"]):
        assert run("serve", *asked) == 0
        shown = capsys.readouterr().out
        assert "usage: dynamax serve cloud" in shown
        assert "usage: dynamax serve edge" in shown
    assert run("serve", "clod") == 2
    assert "serve cloud" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate"], ["serve", "edge"]])
def test_options_of_an_edge_are_on_the_page(command: list[str], run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = options("dynamax.serving.options", "EdgeOptions")
    assert [each.name for each in found] == [each.name for each in fields(EdgeOptions)]
    assert run(*command, "--help") == 0
    shown = capsys.readouterr().out
    assert all(each.text and f"  --edge.{each.name} " in shown for each in found)


@pytest.mark.parametrize(
    "asked", [["fit", "--help", "data.text"], ["generate", "--help", "trainer"], ["list", "-h", "x"]]
)
def test_help_on_what_there_is_none_of_is_refused(
    asked: list[str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*asked) == 2
    assert f"There is no help on {asked[-1]!r}" in capsys.readouterr().err
