"""One registry for all kinds of parts: nothing is imported before it is named, and one broken part stops no other."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dynamax import registry
from dynamax.errors import UserError
from dynamax.registry import ALL, HEADS, Registry


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Pretend that these entry points of a group are installed beside ours; their modules go into a folder."""
    monkeypatch.syspath_prepend(tmp_path)

    def one(group: str, /, **values: str | list[str]) -> Path:
        more = [
            EntryPoint(name, value, group)
            for name, found in values.items()
            for value in ([found] if isinstance(found, str) else found)
        ]
        read = registry._installed
        monkeypatch.setattr(registry, "_installed", lambda asked: (*read(asked), *(more if asked == group else ())))
        return tmp_path

    return one


@pytest.mark.slow
def test_nothing_is_imported_before_a_name_is_asked_for() -> None:
    program = (
        "import sys; from dynamax.registry import ALL, POLICIES; [each.names() for each in ALL];"
        "print('torch' in sys.modules, POLICIES.find('MaxProb').value); POLICIES.get('MaxProb');"
        "print('dynamax.policies.confidence' in sys.modules, 'dynamax.heads.gates' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "dynamax.policies.confidence:MaxProb", "True", "False"]


def test_every_kind_knows_a_part_of_its_own() -> None:
    wanted = {
        "sources": "Hub",
        "heads": "MambaGate",
        "gate_inputs": "LensStatistics",
        "policies": "MaxProb",
        "decoders": "SelfSpeculative",
        "drafts": "PromptLookup",
        "skipped_state": "CopyLayer",
        "samplers": "Sampled",
        "objectives": "LayerSkip",
        "tasks": "CoQA",
        "text_sources": "Glosses",
        "callbacks": "ExitDepth",
    }
    assert {each.word for each in ALL} == {*wanted, "families"}
    for each in ALL:
        if each.word in wanted:
            assert each.get(wanted[each.word]).__name__ == wanted[each.word]


def test_a_file_that_stands_before_the_package_is_named(installed) -> None:
    folder = installed("dynamax.heads", LongGate="somebodys_gates:LongGate")
    (folder / "somebodys_gates.py").write_text("")
    with pytest.raises(UserError, match="LongGate cannot be imported") as caught:
        HEADS.get("LongGate")
    assert str(folder / "somebodys_gates.py") in str(caught.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("def broken(:", "SyntaxError"),
        ("import nobodys_module", "No module named 'nobodys_module'"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_whatever_a_module_raises_is_told_to_those_who_name_it_alone(installed, source: str, reason: str) -> None:
    module = f"gates_{abs(hash(source))}"
    folder = installed("dynamax.heads", LongGate=f"{module}:LongGate")
    (folder / f"{module}.py").write_text(source)
    assert HEADS.get("LinearGate").__name__ == "LinearGate"
    assert "LongGate" in HEADS.names()
    with pytest.raises(UserError, match="LongGate cannot be imported") as caught:
        HEADS.get("LongGate")
    assert reason in str(caught.value)
    assert "install again" in str(caught.value)


def test_a_package_that_is_gone_is_told(installed) -> None:
    installed("dynamax.heads", LongGate="nobodys_gates:LongGate", Odd="not a module")
    with pytest.raises(UserError, match=r"from nobodys_gates:LongGate: No module named .* Python found no file"):
        HEADS.get("LongGate")
    with pytest.raises(UserError, match="Odd cannot be imported"):
        HEADS.get("Odd")


def test_a_name_that_two_packages_offer_stops_those_who_ask_for_it(installed) -> None:
    installed("dynamax.heads", MLPGate="others:MLPGate", TwiceGate=["first:TwiceGate", "second:TwiceGate"])
    for name in ("MLPGate", "TwiceGate"):
        with pytest.raises(UserError, match=f"Two installed packages offer the exit head {name}"):
            HEADS.get(name)
    assert HEADS.get("LinearGate").__name__ == "LinearGate"


def test_an_unknown_name_is_told_with_near_ones() -> None:
    with pytest.raises(UserError, match="no exit head named 'LinearGates'. Did you mean LinearGate.* Known: Att"):
        HEADS.get("LinearGates")
    with pytest.raises(UserError, match="Known: none"):
        Registry("dynamax.nothing", "nothing").get("x")
