"""A decoder, a policy, a family and a task of someone else's, used together; and a part that is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.folders import byte_tokenizer
from tests.tiny import redraw

SOURCE = Path(__file__).parent / "demo_parts"
ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]

RUN = """
trainer:
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  callbacks: [{class_path: ExitFrontier, init_args: {folder: report}}]
model:
  class_path: DecodingModule
  init_args:
    backbone: {class_path: Folder, init_args: {path: model}}
    exits: {2: {}, 4: {}}
    policies: [{policy: {class_path: LaterTokens, init_args: {tokens: 4}}}]
    decoder: {class_path: Alternating, init_args: {every: 2}}
data:
  class_path: TaskData
  init_args:
    task: {class_path: Capitals, init_args: {max_new_tokens: 8}}
"""
CHECK = """
from dynamax import Folder
from dynamax.registry import DECODERS, POLICIES, TASKS
from dynamax.testing import check_backbone, check_policy

backbone = Folder("model").load(dtype="float64")
assert backbone.spec.family == "jais2"
assert max(check_backbone(backbone, backbone.reference).values()) < 1e-5
check_policy(POLICIES.get("LaterTokens")(3), thresholds=(1, 2, 3))
assert [example.id for example in TASKS.get("Capitals")().examples()] == ["France", "Italy", "Peru"]
print(DECODERS.get("Alternating").__module__)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed in ``site``, a tiny model of its family in ``model``, and a run."""
    work = tmp_path_factory.mktemp("parts")
    shutil.copytree(SOURCE, work / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(work / "site"), str(work / "source")], check=True)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "vocab_size": 257}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "attention_bias": True}
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jais2", **sizes, **heads, **ends))
    redraw(model, 0)
    model.save_pretrained(work / "model")
    byte_tokenizer().save_pretrained(work / "model")
    (work / "run.yaml").write_text(RUN)
    return work


@pytest.fixture
def run(place: Path) -> Run:
    def one(*command: str, installed: bool = True) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT), *([str(place / "site")] if installed else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=place)

    return one


@pytest.mark.slow
def test_each_part_keeps_its_contract(run: Run) -> None:
    done = run("-c", CHECK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "dynamax_demo_parts.decoder"


@pytest.mark.slow
def test_all_of_them_in_one_run(run: Run, place: Path) -> None:
    done = run("-m", "dynamax", "test", "-c", "run.yaml")
    assert done.returncode == 0, done.stderr
    report = json.loads((place / "report" / "report.json").read_text())
    assert report["task"]["name"] == "Capitals"
    assert report["task"]["examples"] == 3
    assert report["backbone"]["family"] == "jais2"
    assert (report["decoding"]["decoder"], report["decoding"]["options"]) == ("Alternating", {"every": 2})
    full, ours = report["frontier"]
    assert full["policy"] == "Full"
    assert ours["policy"].startswith("LaterTokens")
    # of the seven decoded tokens of an answer, the fifth and the seventh: every other one may, from the fourth on
    assert ours["depth_counts"] == {"2": 6, "6": 15}


@pytest.mark.slow
def test_they_are_listed_with_what_they_are_and_where_from(run: Run) -> None:
    done = run("-m", "dynamax", "list")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if "dynamax-demo-parts 0.2.0" in line}
    assert sorted(lines) == ["Alternating", "Broken", "Capitals", "LaterTokens", "jais2"]
    assert "Asks the policy at most steps" in lines["Alternating"]
    assert "Leaves at the first exit once an answer is under way." in lines["LaterTokens"]
    assert "Which city is the capital?" in lines["Capitals"]
    assert "transformers' model type jais2" in lines["jais2"]
    assert "BROKEN" in lines["Broken"]
    assert "RuntimeError: its licence file is missing" in lines["Broken"]


@pytest.mark.slow
def test_a_broken_part_stops_only_who_asks_for_it(run: Run) -> None:
    model = ["--backbone", "Folder", "--backbone.path", "model", "--exits={2: {}}", "--max_new_tokens=3"]
    done = run("-m", "dynamax", "generate", "Who?", *model, "--policy", "Broken")
    assert done.returncode == 2, done.stderr
    assert "The termination policy Broken cannot be imported from dynamax_demo_parts.broken:Broken" in done.stderr
    assert "RuntimeError: its licence file is missing" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("-m", "dynamax", "generate", "Who?", *model, "--policy", "LaterTokens", "--policy.tokens", "2")
    assert done.returncode == 0, done.stderr
    assert "exit 2  50%" in done.stdout


@pytest.mark.slow
def test_without_the_package_the_family_is_unknown(run: Run) -> None:
    done = run("-c", "import dynamax; dynamax.load('model')", installed=False)
    assert done.returncode == 1
    assert "The model type 'jais2' is not in the family table" in done.stderr
    assert "offer a FamilySpec by an entry point" in done.stderr
