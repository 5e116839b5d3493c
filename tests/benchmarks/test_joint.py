"""Figures of the benchmarks of joint training and of promises, by hand; and that they run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dynamax
from benchmarks import frontier, joint_images, promises
from dynamax.calibration.scores import Reads, Scores
from dynamax.heads import Exit, LinearGate, TunedLens, UncertaintyGate


def test_the_conformal_level() -> None:
    assert joint_images.quantile(torch.arange(1.0, 20.0)) == 19.0  # the 19th of 19: ceil(20 * 0.95)
    assert joint_images.quantile(torch.arange(1.0, 40.0)) == 38.0
    assert joint_images.quantile(torch.arange(1.0, 10.0)) == 1.0  # too few for 5 %
    assert joint_images.quantile(torch.zeros(0)) == 1.0


def test_costs_of_images_are_counted() -> None:
    backbone, heads = joint_images.Backbone(), joint_images.Heads()
    layers = [module for module in backbone.vit.modules() if type(module).__name__ == "ViTLayer"]
    block = sum(p.numel() for p in layers[0].parameters() if p.ndim == 2) * joint_images.PATCHES
    block += 2 * joint_images.PATCHES**2 * joint_images.WIDTH
    enter = backbone.vit.embeddings.patch_embeddings.projection.weight.numel() * 16
    head = heads.heads[0][1].weight.numel()
    full = enter + 7 * block + head
    costs = joint_images.exit_costs(gated=True)
    assert costs[0] == pytest.approx((enter + block + head + 96) / full)
    assert costs[-1] == pytest.approx((full + 6 * (head + 96)) / full)


@pytest.mark.slow
def test_images_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = joint_images.contend(0, 3)
    assert set(run["curves"]) == set(joint_images.CONTENDERS)
    print(joint_images.table([run, run]))
    shown = capsys.readouterr().out
    assert "2 seeds" in shown
    assert "nan" not in shown


def test_what_a_contender_keeps_and_costs_by_hand() -> None:
    score_EN = torch.tensor([[0.9, 0.1, 0.6, 0.2], [0.9, 0.8, 0.1, 0.3]])
    right_EN = torch.tensor([[True, True, False, True], [True, False, True, True]])
    one = frontier.Contender(score_EN, right_EN, frontier.plain, asked=[1, 2], leaving=[10, 10])
    price = frontier.Price([100, 200, 300], matrix=10)
    # tokens 1 and 3 leave at the first exit (right, wrong), 2 at the second (wrong), 4 stays
    found = frontier.outcome(one, price, [2, 4, 6], [0, 1], 0.5)
    assert found["same"] == pytest.approx(0.5)
    assert found["blocks"] == pytest.approx((2 + 4 + 2 + 6) / 4)
    assert found["cost"] == pytest.approx((2 * (1 + 110) + (1 + 2 + 210) + (1 + 2 + 310)) / 4 / 310)
    only = frontier.outcome(one, price, [2, 4, 6], [1], 0.85)  # the first token alone leaves
    assert only["same"] == 1.0
    assert only["cost"] == pytest.approx((4 * 2 + 210 + 3 * 310) / 4 / 310)
    assert frontier.chosen(one, price, [2, 4, 6], 1.0) is not None
    free = frontier.oracle(one, price, [2, 4, 6])
    assert free["same"] == 1.0
    assert free["blocks"] == pytest.approx((2 + 2 + 4 + 2) / 4)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    engine = dynamax.load("assets/llama", exits={d: Exit(TunedLens, [UncertaintyGate, LinearGate]) for d in (2, 4)})
    assert engine.exits is not None
    source = {"class": "Folder", "options": {"path": str(Path("assets/llama").resolve())}}
    engine.exits.save(folder, engine.backbone.spec, source)
    return folder


@pytest.mark.slow
def test_the_frontier_runs(heads: Path) -> None:
    numbers = {"calibrate": 4, "questions": 4, "tokens": 12, "skip": 240, "questions_file": None}
    report = frontier.measured(argparse.Namespace(heads=[f"a={heads}"], **numbers))
    assert set(report["rows"]) == {
        "a: oracle",
        "a: MaxProb",
        "a: UncertaintyGate",
        "a: JEIGate(UncertaintyGate)",
        "a: LinearGate",
        "a: JEIGate(LinearGate)",
    }
    assert all(each["same"] <= 1.0 for row in report["rows"].values() for each in row["levels"].values())
    assert "a: MaxProb" in frontier.table(report)


@pytest.mark.slow
def test_promises_run_and_keep_their_scores(heads: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("\n".join(f"What is {n} and {n}?" for n in range(24)))
    options = {"policy": "MaxProb", "epsilon": 0.2, "delta": 0.2, "splits": 3, "tokens": 12, "every": 1}
    given = {"prompts": [tmp_path / "asked.txt"], "field": "question", "scores": tmp_path / "scores.npz"}
    args = argparse.Namespace(heads=str(heads), **options, **given)
    report = promises.measured(args)
    (tmp_path / "asked.txt").unlink()
    assert json.dumps(promises.measured(args)["rows"]) == json.dumps(report["rows"])
    assert set(report["rows"]) == {name for name, _, _ in promises.CONTENDERS}
    assert "24 documents" in promises.table(report)


def test_a_promise_of_exits_that_are_always_right() -> None:
    rng = np.random.default_rng(0)
    scores = [
        Scores(rng.random((2, 9)), np.ones((2, 9), dtype=bool), (Reads(True, 0, (), False),) * 2) for _ in range(400)
    ]
    args = argparse.Namespace(epsilon=0.05, delta=0.1)
    found = promises.split_once(scores, (2, 4), 6, lambda exits: np.array([0.5, 0.8, 1.0])[[*exits, 2]], args, 0)
    for name in ("ltt", "ucb", "crc", "naive"):
        assert found[name]["risk"] == 0.0
        assert found[name]["cost"] < 0.6
