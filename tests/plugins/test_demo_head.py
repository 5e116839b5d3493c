"""A package of someone else's, installed beside ours, adds a head: no line of dynamax changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "demo_head"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in, installed by pip into a folder of its own."""
    work = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, work / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(work / "site"), str(work / "source")], check=True)
    return work / "site"


def run(site_folder: Path, *command: str, path: bool = True) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *([str(site_folder)] if path else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=site_folder.parent
    )


CHECK = """
from dynamax.registry import HEADS
from dynamax.testing import check_head
gate = HEADS.get("NormGate")
check_head(gate)
print(gate.__module__)
"""


@pytest.mark.slow
def test_it_is_found_by_its_entry_point_and_keeps_the_contract(site_folder: Path) -> None:
    done = run(site_folder, "-c", CHECK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "dynamax_demo_head"


@pytest.mark.slow
def test_it_goes_by_its_short_name_on_the_command_line(site_folder: Path) -> None:
    options = [
        "--model",
        "HeadsModule",
        "--model.backbone",
        "SmolLM2",
        "--model.phases={gates: {objective: GateObjective}}",
    ]
    exits = "--model.exits={15: {gates: [{class_path: NormGate, init_args: {offset: 0.5}}]}}"
    done = run(site_folder, "-m", "dynamax", "fit", *options, exits, "--print_config")
    assert done.returncode == 0, done.stderr
    assert "dynamax_demo_head.NormGate" in done.stdout
    assert "offset: 0.5" in done.stdout


@pytest.mark.slow
def test_list_tells_what_it_is_and_where_it_comes_from(site_folder: Path) -> None:
    done = run(site_folder, "-m", "dynamax", "list", "heads")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "NormGate" in line)
    assert " A straight line through the logarithm of the state's length.  [dynamax-demo-head 0.1.0]" in line


@pytest.mark.slow
def test_without_it_the_name_is_unknown_and_near_names_are_told(site_folder: Path) -> None:
    done = run(site_folder, "-c", "from dynamax.registry import HEADS; HEADS.get('NormGate')", path=False)
    assert done.returncode == 1
    assert "There is no exit head named 'NormGate'. Did you mean" in done.stderr
