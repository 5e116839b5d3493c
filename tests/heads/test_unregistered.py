"""Heads of a class that no package has registered: saved by ``module.Class``, found again by another process."""

import json
import subprocess
import sys

import pytest

from dynamax.heads import Exit, ExitBank, LinearGate, saved
from dynamax.testing import toy_site

SPEC = toy_site().spec
MODULE = """
from dynamax.heads import LinearGate
from dynamax.heads.base import Gate

class EMAGate(Gate):
    def __init__(self, site, *, decay=0.5):
        super().__init__()
        self.inner = LinearGate(site)

    def score(self, evidence, memory=None):
        return self.inner.score(evidence)

    def flops(self):
        return self.inner.flops()
"""
LOAD = """
import sys
from dynamax.heads import ExitBank
from dynamax.testing import toy_site
(gate,) = ExitBank.load(sys.argv[1], lambda depth: toy_site(depth=depth)).gates(2).values()
print(type(gate).__module__, type(gate).__name__, gate.recipe)
"""


def site(depth):
    return toy_site(depth=depth)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Heads of a class in a module that stands on the path."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_gates.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    import my_gates

    ExitBank({2: Exit(gates=[lambda site: my_gates.EMAGate(site, decay=0.25)])}, site).save(tmp_path / "heads", SPEC)
    yield tmp_path
    del sys.modules["my_gates"]


def named(folder):
    return json.loads((folder / "heads" / "heads.json").read_text())["exits"]["2"]["gates"][0]["class"]


@pytest.mark.slow
def test_another_process_imports_the_class(folder):
    assert named(folder) == "my_gates.EMAGate"
    environment = {"PYTHONPATH": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", LOAD, str(folder / "heads")]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split(maxsplit=2) == ["my_gates", "EMAGate", "{'decay': 0.25}\n"]
    del environment["PYTHONPATH"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    assert "Put the folder that holds my_gates on PYTHONPATH" in done.stderr


def edited(folder, name):
    record, tensors = saved.read(folder, SPEC)
    record["exits"]["2"]["gates"][0]["class"] = name
    saved.write(folder, record, tensors)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_gates.EMA", r"my_gates.EMA, which cannot be imported: .*EMA.* holds my_gates on PYTHONPATH"),
        ("nobodys_gates.Gate", "No module named 'nobodys_gates'"),
        ("os.getcwd", "os.getcwd, which is no exit head"),
        ("os", "no exit head named 'os'"),
    ],
)
def test_a_name_that_leads_to_no_head_is_refused(folder, name, message):
    edited(folder / "heads", name)
    with pytest.raises(ValueError, match=message):
        ExitBank.load(folder / "heads", site)


def test_a_name_without_a_dot_is_not_imported(folder):
    (folder / "modules" / "ran.py").write_text("raise SystemExit('it was imported')")
    edited(folder / "heads", "ran")
    with pytest.raises(ValueError, match="no exit head named 'ran'"):
        ExitBank.load(folder / "heads", site)


def test_a_class_of_ones_own_by_a_registered_name_is_not_taken_for_it():
    own = type("LinearGate", (), {"__module__": __name__})  # no gate: it would make the short name ambiguous in YAML
    assert saved.recorded_name(own) == f"{__name__}.LinearGate"
    assert saved.recorded_name(LinearGate) == "LinearGate"
