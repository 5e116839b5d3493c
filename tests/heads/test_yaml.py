"""Exits as they are written in YAML: short names, options, and paths to other files."""

import pytest
from jsonargparse import ArgumentParser

from dynamax.heads import (
    Exit,
    ExitBank,
    GateScore,
    HiddenState,
    LinearGate,
    LogitLens,
    LowRankLens,
    MambaGate,
    NgramAgreement,
    Position,
    TunedLens,
)
from dynamax.testing import toy_site

MAMBA = """
lens: {class_path: LowRankLens, init_args: {rank: 5}}
gates:
- LinearGate
- class_path: MambaGate
  init_args: {d_state: 8}
"""


class Model:
    """Stands for whatever takes exits."""

    def __init__(self, exits: dict[int, Exit]):
        """Hold them.

        Args:
            exits: What stands at each depth.
        """
        self.exits = exits


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    (tmp_path / "parts" / "exits").mkdir(parents=True)
    (tmp_path / "parts" / "exits" / "mamba.yaml").write_text(MAMBA)
    monkeypatch.chdir("/")

    def parse(text, *more):
        config = tmp_path / "parts" / "run.yaml"
        config.write_text(text)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_class_arguments(Model, "model", sub_configs=True)
        given = parser.parse_args(["--config", str(config), *more])
        return parser.instantiate(given).model.exits

    return parse


def built(exits):
    return ExitBank(exits, lambda depth: toy_site(depth=depth))


def test_short_names_options_and_paths(parsed):
    bank = built(
        parsed("""
model:
  exits:
    1: {gates: [LinearGate]}
    2: {lens: TunedLens}
    3: exits/mamba.yaml
""")
    )
    assert isinstance(bank.lens(1), LogitLens)
    assert isinstance(bank.gates(1)["LinearGate"], LinearGate)
    assert isinstance(bank.lens(2), TunedLens)
    assert isinstance(bank.lens(3), LowRankLens)
    assert bank.lens(3).recipe == {"rank": 5}
    gate = bank.gates(3)["MambaGate"]
    assert isinstance(gate, MambaGate)
    assert gate.recipe == {"d_state": 8, "expand": 2, "d_conv": 4, "headdim": 32, "width": 128}


def test_a_dotted_option_changes_one_exit(parsed):
    text = "model:\n  exits:\n    1: exits/mamba.yaml\n    3: exits/mamba.yaml\n"
    bank = built(parsed(text, "--model.exits.3.lens", "TunedLens", "--model.exits.2.gates", "[MLPGate]"))
    assert isinstance(bank.lens(1), LowRankLens)
    assert isinstance(bank.lens(3), TunedLens)
    assert "MambaGate" in bank.gates(3)
    assert list(bank.gates(2)) == ["MLPGate"]


def test_inputs_of_gates(parsed):
    bank = built(
        parsed("""
model:
  exits:
    2:
      gates:
      - MambaGate
      - class_path: LinearGate
        init_args: {inputs: [HiddenState, {class_path: GateScore, init_args: {gate: MambaGate}}]}
      - class_path: MLPGate
        init_args: {inputs: [{class_path: NgramAgreement, init_args: {orders: 2}}, Position], hidden: 3}
""")
    )
    assert bank.gates(2)["LinearGate"].recipe == {"inputs": [HiddenState(), GateScore("MambaGate")]}
    assert bank.gates(2)["MLPGate"].recipe == {"inputs": [NgramAgreement(orders=2), Position()], "hidden": 3}
    assert bank.gates(2)["MLPGate"].enter.in_features == 4
