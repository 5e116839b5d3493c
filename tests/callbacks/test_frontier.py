"""The report and the picture, from results made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from callbacks import frontier, plots
from callbacks.common import table
from callbacks.observers import bar, shares
from dynamax.modules.results import DecodingFacts, DecodingResults, ExitRow, HeadRow, PolicyRow, TaskFacts
from dynamax.modules.rows import AnswersRow, GivenAnswer


def row(policy: str, threshold: Any, saved: float, **changed: Any) -> PolicyRow:
    usual = PolicyRow(
        policy,
        threshold,
        agreement=1 - saved / 2,
        drafts_kept=None,
        answer_agreement=1 - saved,
        blocks_per_token=30 * (1 - saved),
        flops_fraction=1 - saved,
        bytes_fraction=1 - saved,
        ms_per_token=30 * (1 - saved),
        speed_up=1 / (1 - saved),
        score=0.5,
        scores={"exact_match": 0.5},
        tokens=4,
        timed_tokens=4,
        depth_counts={15: 3, 30: 1},
    )
    return replace(usual, **changed)


USUAL = DecodingFacts("EarlyExit", False, {"skipped_state": "Exact"}, {"name": "Greedy"}, False, "runs/heads")
LOSSLESS = {"decoder": "SelfSpeculative", "lossless": True, "options": {"draft_limit": 4}}


def found(*rows: PolicyRow, **manner: Any) -> DecodingResults:  # noqa: ANN401 - decoding's own values
    return DecodingResults(
        task=TaskFacts("Questions", "exact_match", 3),
        backbone={"family": "llama", "depth": 30, "width": 576},
        decoding=replace(USUAL, **manner),
        environment={"device": "a machine", "dtype": "float32"},
        exits=[
            ExitRow(15, 0.5, {"LinearGate": None}, {"p50": 1.0, "p95": 2.0}, HeadRow("LogitLens", 0, 0), gates=[]),
        ],
        frontier=[row("Full", None, 0.0), *rows],
        bounds=[],
        reliability=[],
        answers=[AnswersRow("1", "Who?", [GivenAnswer("Full", None, ["A [list]", "\n", ","], [30, 15, 15])])],
        command=None,
    )


def test_the_report_survives_json(tmp_path: Path) -> None:
    odd = row("MaxProb", 0.9, 0.1, score=math.nan, speed_up=math.inf)
    frontier.write(found(odd, row("GateConfidence", {15: 0.5, 20: 0.6}, 0.2)).as_json(), tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    report = json.loads(text)
    assert set(report) == {each.name for each in fields(DecodingResults)}
    assert report == found(odd, row("GateConfidence", {15: 0.5, 20: 0.6}, 0.2)).as_json()
    assert '"tokens": ["A [list]", "\\n", ","],\n' in text, "a list of single values takes one line"
    assert report["decoding"] == asdict(USUAL)
    assert report["frontier"][1]["score"] is None
    assert report["frontier"][1]["speed_up"] is None
    assert report["frontier"][2]["threshold"] == {"15": 0.5, "20": 0.6}
    assert report["frontier"][2]["depth_counts"] == {"15": 3, "30": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_how_decoding_was_done_is_told_where_it_was_not_as_usual() -> None:
    rows = [row("MaxProb", 0.9, 0.1)]
    usual = frontier.table(found(*rows))
    assert "Decoding:" not in usual
    assert "95.0%" in usual
    skipping = found(*rows, options={"skipped_state": "Skip"}, sampler={"name": "Sampled", "seed": 0})
    assert "Decoding: skipped_state Skip, sampler Sampled" in frontier.table(skipping)
    assert "skipped_state Skip · sampler Sampled" in frontier._measured_on(skipping)
    lossless = frontier.table(found(row("MaxProb", 0.9, 0.1, drafts_kept=0.25), **LOSSLESS))
    assert "Decoding: SelfSpeculative, draft_limit 4" in lossless
    assert "drafts" in lossless
    assert "25.0%" in lossless
    assert "95.0%" not in lossless


def test_lossless_runs_are_drawn_over_the_drafts_kept(tmp_path: Path) -> None:
    rows = [row("MaxProb", level, level / 2, agreement=None, drafts_kept=1 - level) for level in (0.5, 0.9)]
    assert plots.curves(rows, "flops_fraction") == {}
    assert [line.threshold for line in plots.curves(rows, "flops_fraction", plots.DRAFTS)["MaxProb"]] == [
        0.5,
        0.9,
    ]
    frontier.picture(found(*rows, **LOSSLESS), tmp_path / "lossless.png")
    frontier.picture(found(*rows), tmp_path / "empty.png")
    assert (tmp_path / "lossless.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    frontier.write({"old": 1}, tmp_path / "report.json")
    with pytest.raises(TypeError):
        frontier.write({"new": object()}, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    rows = [row("MaxProb", threshold, 0.5 - threshold / 2) for threshold in (0.9, 0.5, 0.7)]
    frontier.picture(found(*rows, row("Never", None, 0.0)), tmp_path / "frontier.png")
    pixels = imread(tmp_path / "frontier.png")
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1200
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2]).tolist()}) > 10


def test_curves_go_up_the_thresholds_and_leave_the_full_model_out() -> None:
    rows = [row("Full", None, 0), row("MaxProb", 0.9, 0.1), row("MaxProb", 0.5, 0.4), row("Never", None, 0)]
    lines = plots.curves(rows, "flops_fraction")
    assert list(lines) == ["MaxProb", "Never"]
    assert [line.threshold for line in lines["MaxProb"]] == [0.5, 0.9]


def test_gates_go_by_their_own_name_and_the_full_model_hides_no_point() -> None:
    axes = Figure().subplots()
    rows = [row("AnyOf(GateConfidence(MambaGate), MaxProb)", None, 0.1)]
    rows += [row("GateConfidence(MambaGate)", level, 1 - level) for level in (0.5, 1.0)]
    plots._plot(axes, rows, plots.panels(rows, 30)[0], plots.AGREEMENT)
    both, curve, star = axes.get_lines()[-3:]
    assert both.get_label() == "AnyOf(MambaGate, MaxProb)"
    assert (curve.get_label(), star.get_label()) == ("MambaGate, 0.5 to 1", "full model")
    assert star.get_zorder() < curve.get_zorder()


def test_likelihood_tasks_are_drawn_over_depth(tmp_path: Path) -> None:
    rows = [row("MaxProb", 0.9, 0.1, flops_fraction=None, bytes_fraction=None, speed_up=None)]
    (panel,) = plots.panels(rows, 30)
    assert (panel.key, panel.whole) == ("blocks_per_token", 30)
    frontier.picture(found(*rows), tmp_path / "frontier.png")


def test_a_run_without_any_policy_figure_still_draws_and_shows(tmp_path: Path) -> None:
    results = found()
    frontier.picture(results, tmp_path / "frontier.png")
    assert "Full" in frontier.table(results)


def test_what_was_not_measured_is_blank_in_the_table() -> None:
    line = frontier.table(found(row("MaxProb", 0.9, 0.1, score=None, speed_up=None))).splitlines()[-1]
    assert line.split() == ["at", "0.9", "95.0%", "90%", "27.0", "90%", "90%", "27.00"]


def test_shares_and_bars() -> None:
    assert shares({}) == {}
    assert bar(1.0) == "100% █████"
    assert bar(0.0).strip() == "·"
    assert {len(bar(share / 100)) for share in range(101)} == {10}


def test_tables_align_and_name_groups_once() -> None:
    shown = table("T", ["a\nb"], [("G", "x", ["1"]), ("G", "y", ["22"]), ("H", "", ["3"])])
    assert shown.splitlines()[2:] == ["      a", "      b", "G", "  x   1", "  y  22", "H     3"]


def test_a_table_without_lines_has_its_heads() -> None:
    assert "head" in table("T", ["head"], [])
