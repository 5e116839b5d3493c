"""The page without a browser: all figures are on it, nothing leads outside, text stays text, gaps are told."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dynamax.modules.results import SCHEMA_VERSION
from dynamax.report.charts import Axis, Series, bullet, plot, ticks
from dynamax.report.page import page
from dynamax.report.parts import depths_of
from dynamax.report.read import VERSIONS, read_run, read_runs
from tests.report.made import LINE, report, row, run_folder

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())
EMPTY = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Text, addresses, and elements that were not closed in turn."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.cells = "", []
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open += [] if tag in EMPTY else [tag]
        self.cells += [""] if tag in ("td", "th") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["script"], ["style"]):
            self.text += data
            if self._open[-1:] in (["td"], ["th"]):
                self.cells[-1] += data

    def values(self, name: str) -> list[str]:
        return [str(attributes[name]) for _, attributes in self.tags if name in attributes]


def paged(*folders: Path) -> str:
    return page(read_runs([str(folder) for folder in folders]), "dynamax report a b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "one")


def test_the_report_made_here_is_one_that_test_could_write() -> None:
    whole = report()
    facts = dict.fromkeys(SCHEMA["properties"]["environment"]["properties"])
    whole["environment"] = {**facts, **whole["environment"], "matmul": "highest", "deterministic": False, "batch": 1}
    whole["environment"] |= dict.fromkeys(("system", "python", "transformers", "lightning"), "x")
    jsonschema.validate(whole, SCHEMA, jsonschema.Draft202012Validator)
    assert VERSIONS[-1] == SCHEMA_VERSION


def test_every_figure_is_on_the_page(folder: Path) -> None:
    shown = Reader(paged(folder))
    wanted = ["81.2 %", "73.5 %", "64.6 %", "1.26", "0.317", "4.63", "8.15", "37 %"]  # the policy's row
    wanted += ["10.24", "0.414", "0.5", "0.625 at 2", "94.7 %"]  # the full model's, thresholds, the second policy's
    wanted += ["54.3 %", "43.2 %", "3.22", "42.4 %", "35.4 %", "2.83"]  # bounds
    wanted += ["34.4 %", "65.6 %", "90"]  # 31 and 59 of 90 tokens
    wanted += ["0.117", "0.234"]  # ECE, Brier
    wanted += ["0.817", "0.918", "44.1 %", "55.2 %"]  # test's AUROC, agreement of the lens
    wanted += ["0.616", "0.716", "31.4 %", "41.5 %"]  # fit's last validation
    wanted += ["12.5 %", "5.3 %", "8.7 % of 77", "✓ kept"]  # the promise
    wanted += ["a machine", "2.99.1"]
    assert [each for each in wanted if each not in shown.cells] == []
    assert "0.523" not in shown.cells, "of an earlier validation"


def test_every_part_names_its_command(folder: Path) -> None:
    shown = Reader(paged(folder)).text
    parts = re.split(r"\n(?=What was kept|Where tokens|Promises|Are scores|Lenses and|Answers, col|Environment)", shown)
    assert len(parts) == 8
    assert all(LINE in part for part in parts[1:])
    assert "calibrated.yaml by dynamax calibrate runs/a --epsilon 0.125" in parts[3]
    assert f"Fit by dynamax fit -c {folder}/fit/version_0/config.yaml" in parts[5]
    assert "This page was made by dynamax report a b" in parts[-1]


def test_nothing_leads_outside(folder: Path, tmp_path: Path) -> None:
    shown = Reader(paged(folder, run_folder(tmp_path / "two")))
    places = {f"#{place}" for place in shown.values("id")}
    assert {*shown.values("href"), *shown.values("src")} - places == {"data:,"}
    assert [tag for tag, _ in shown.tags if tag in ("img", "iframe", "object", "embed", "base")] == []
    assert not re.search(r"url\(|@import|https?:|//\w|fetch|XMLHttp|import\(", paged(folder))
    assert len(shown.values("id")) == len(set(shown.values("id")))
    (policy,) = [each["content"] for tag, each in shown.tags if tag == "meta" and "http-equiv" in each]
    assert str(policy).startswith("default-src 'none'")


def test_pictures_have_names_and_tables_heads(folder: Path) -> None:
    shown = Reader(paged(folder))
    pictures = [attributes for tag, attributes in shown.tags if tag == "svg"]
    assert len(pictures) > 8
    assert all(each.get("aria-label") or each.get("aria-hidden") == "true" for each in pictures)
    tags = [tag for tag, _ in shown.tags]
    assert tags.count("table") == tags.count("caption") == tags.count("thead") == 6
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in shown.tags if tag == "th")
    assert all(attributes.get("tabindex") == "0" for _, attributes in shown.tags if attributes.get("class") == "wide")


NASTY = '<script>alert(1)</script><img src=x onerror="a()"> & \' \x00 \ud800 </style>'


def test_text_stays_text(tmp_path: Path) -> None:
    nasty = report(command=f"dynamax test {NASTY}")
    given = {"policy": NASTY, "threshold": 0.5, "tokens": [NASTY, "\n"], "depths": [6, 2]}
    nasty["answers"] = [{"id": NASTY, "prompt": NASTY, "given": [{**given, "policy": "Full"}, given]}]
    nasty["frontier"][1]["policy"] = nasty["task"]["name"] = nasty["environment"]["device"] = NASTY
    nasty["reliability"][0]["policy"] = nasty["backbone"]["family"] = nasty["exits"][0]["lens"]["name"] = NASTY
    nasty["exits"][0]["gate_auroc"] = {NASTY: 0.7}
    nasty["frontier"][2]["promise"]["promise"] = NASTY
    content = page(read_runs([str(run_folder(tmp_path / "a <b> & 'c'", nasty))]), NASTY)
    shown = Reader(content)
    assert [tag for tag, _ in shown.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in shown.tags]
    assert shown.values("onerror") == []
    assert shown.text.count("<script>alert(1)</script>") > 10
    assert content.encode("utf-8", "replace")


def test_an_exit_at_the_top_is_full_depth(tmp_path: Path) -> None:
    given = report()
    top = {**given["exits"][0], "depth": 6}
    run = read_run(run_folder(tmp_path / "a", {**given, "exits": [*given["exits"], top]}))
    assert depths_of(run) == [2, 4, 6]


def test_tokens_tell_their_depth(folder: Path) -> None:
    shown = Reader(paged(folder))
    titles = [title for title in shown.values("title") if title.startswith("depth ")]
    assert titles == ["depth 6 of 6"] * 4 + ["depth 2 of 6", "depth 4 of 6"]
    assert "Pa (6) ris (2) · (4)" in shown.text
    content = paged(folder)
    early, late = re.findall(r'style="--p:(\d+)%" title="depth (?:2|4) of 6"', content)
    assert (early, late) == ("100", "0")


def test_an_older_report_says_what_it_lacks(tmp_path: Path) -> None:
    old = {key: value for key, value in report(schema_version=2).items() if key not in ("bounds", "command")}
    del old["reliability"], old["answers"]
    shown = Reader(paged(run_folder(tmp_path / "old", old))).text
    for part in ("the oracle and leaving always at the same depth", "reliability of scores", "answers"):
        assert f"Not here: {part}. The report has schema version 2, from before dynamax test wrote this." in shown
    assert "not known; this report does not hold its command line" in shown


def lacking() -> dict[str, tuple[dict[str, Any], str]]:
    bare = row("MaxProb", 0.5, agreement=0.9, tokens=0, depth_counts={})
    full = row("Full", None, agreement=1.0, score=0.5)
    return {
        "bounds": ({"bounds": []}, "A lens of this run runs the last block."),
        "reliability": ({"reliability": []}, "No policy of the run has a score"),
        "answers": ({"answers": []}, "Questions scores likelihoods; nothing was generated."),
        "costs": ({"frontier": [full, bare], "bounds": []}, "Nothing was timed or charged"),
        "tokens": ({"frontier": [full, bare]}, "No policy decoded a token behind the first."),
        "promises": ({"frontier": [full, bare]}, "No policy of the run was calibrated."),
        "policies": ({"frontier": [full], "bounds": []}, "The run has no policy."),
    }


@pytest.mark.parametrize("part", lacking())
def test_what_a_run_lacks_is_told(tmp_path: Path, part: str) -> None:
    changed, told = lacking()[part]
    folder = run_folder(tmp_path / "run", report(**changed))
    assert told in Reader(paged(folder)).text


def test_a_run_without_fit_and_calibration_says_so(folder: Path) -> None:
    (folder / "fit" / "version_0" / "metrics.csv").unlink()
    (folder / "calibrated.yaml").unlink()
    shown = Reader(paged(folder))
    assert "There is no metrics.csv of fit with gates below the run's folder." in shown.text
    assert "12.5 %" in shown.cells, "the report itself holds the promise"
    assert "dynamax calibrate" not in shown.text
    (folder / "report.json").write_text(json.dumps(report(exits=[{**report()["exits"][0], "gate_auroc": {}}])))
    assert "Not here: AUROC of gates. The run has no gates" in Reader(paged(folder)).text


@pytest.mark.parametrize(
    ("loss", "text", "verdict"),
    [
        (0.125, "at most", "✓ kept"),
        (0.1251, "at most", "✗ broken here"),
        (None, "at most", "nothing counted"),
        (0.5, "2.00% on 3 documents; nothing is promised", "nothing promised"),
    ],
)
def test_promises_are_kept_or_broken(tmp_path: Path, loss: float | None, text: str, verdict: str) -> None:
    whole = report()
    whole["frontier"][2]["promise"] |= {"loss": loss, "promise": text}
    assert verdict in Reader(paged(run_folder(tmp_path / "run", whole))).cells


def test_a_promise_that_was_not_tested_is_told(folder: Path, tmp_path: Path) -> None:
    whole = report()
    whole["frontier"][2]["promise"] = None
    shown = Reader(paged(run_folder(tmp_path / "other", whole))).text
    assert "at most 12.5% with probability 90% (ltt, 77 documents). It was not tested in this run." in shown


def test_runs_are_compared(folder: Path, tmp_path: Path) -> None:
    other = run_folder(tmp_path / "two", report(task={"name": "CoQA", "headline": "f1", "examples": 5}))
    shown = Reader(paged(folder, other))
    assert "Comparison" in shown.text
    assert "The runs had other tasks (one: Questions, two: CoQA)." in shown.text
    assert "one: MaxProb" in shown.text
    assert "two: MaxProb" in shown.text
    assert "two by dynamax test" in shown.text
    whole = report()
    whole["environment"]["threads"] = 7
    assert "threads (not the same)" in Reader(paged(folder, run_folder(tmp_path / "three", whole))).cells
    assert "Comparison" not in Reader(paged(folder)).text


# -- pictures -----------------------------------------------------------------------------------------


def test_points_stand_where_their_numbers_say() -> None:
    series = [Series("a", [(0.25, 0.5, ""), (0.75, 1.0, "")], 0, "M0,0Z")]
    drawn = plot(series, Axis("x", low=0.0, high=1.0), Axis("y", low=0.0, high=1.0), title="t")
    places = [tuple(map(float, found)) for found in re.findall(r"translate\(([\d.]+),([\d.]+)\)", drawn)]
    (left, low), (right, high) = places
    numbers = dict(re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">(\d+)%', drawn))
    across = {int(share): float(place) for place, share in numbers.items()}
    assert (left, right) == pytest.approx(
        ((across[20] * 3 + across[40]) / 4, across[60] / 4 + across[80] * 3 / 4), abs=0.2
    )
    assert high == 12.0
    assert low == pytest.approx((12 + 268 - 46) / 2)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.985, 1.0012), (-3.0, 250.0), (1e-6, 3e-6)])
def test_ticks_are_few_round_numbers_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-12 <= each <= high + 1e-12 for each in found)


def test_a_bar_passes_the_line_where_a_promise_is_broken() -> None:
    for value in (0.05, 0.2):
        drawn = bullet(value, 0.1, "c0", "t")
        bar, line = re.findall(r'y="5" width="([\d.]+)".*limit" x="([\d.]+)"', drawn)[0]
        assert float(bar) / float(line) == pytest.approx(value / 0.1, rel=1e-2)


def test_one_point_has_a_picture() -> None:
    drawn = plot([Series("a", [(1.0, 1.0, "")], 0, "M0,0Z")], Axis("x"), Axis("y"), title="t")
    assert "nan" not in drawn
