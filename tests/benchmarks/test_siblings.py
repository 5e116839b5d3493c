"""The siblings' table and picture, from reports written by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import siblings


def report(folder: Path, perplexity: float) -> None:
    folder.mkdir(parents=True)
    depths = {str(d): {"perplexity": perplexity + 8 - d, "agreement": d / 8} for d in (2, 8)}
    known = {"parameters": 4_500_000, "tokens": 2_000_000, "steps": 10, "curve": [[5, 7.0], [10, 5.0]]}
    (folder / "training.json").write_text(json.dumps({**known, "depths": depths}))


def test_every_report_that_is_there_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(tmp_path / "assets/mamba2", 40.0)
    report(tmp_path / "assets/plain/mamba2", 50.0)
    report(tmp_path / "assets/shallow/mamba2", 60.0)
    given = ["--markdown", "tables/table.md", "--plot", "pictures/picture.png"]
    monkeypatch.setattr(sys, "argv", ["siblings", *given])
    monkeypatch.chdir(tmp_path)
    siblings.main()
    rows = (tmp_path / "tables/table.md").read_text().splitlines()[2:]
    assert rows == [
        "| Mamba-2 | with exits | 4.50 M | 2.00 M | 46.0 / 40.0 | .25 |",
        "| Mamba-2 | without | 4.50 M | 2.00 M | 56.0 / 50.0 | .25 |",
        "| Mamba-2 | of four blocks only | 4.50 M | 2.00 M | 66.0 / 60.0 | .25 |",
    ]
    assert (tmp_path / "pictures/picture.png").read_bytes().startswith(b"\x89PNG")


def test_no_report_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["siblings", "--assets", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        siblings.main()


def test_the_models_that_are_there_have_nine_rows() -> None:
    found = siblings.reports(Path(siblings.__file__).parents[1] / "assets")
    assert len(found) == 9
    assert len(siblings.table(found).splitlines()) == 2 + 9


def test_agreement_has_two_digits() -> None:
    depths = {str(d): {"perplexity": 10.0, "agreement": a} for d, a in enumerate((0.0, 0.254, 0.996, 1.0))}
    known = {"parameters": 1, "tokens": 1, "depths": depths}
    assert "| .00 / .25 / 1.00 |" in siblings.table({("llama", "without"): known})


def test_losses_above_the_picture_are_of_the_beginning() -> None:
    small = {"steps": 100, "curve": [[5, 9.0], [10, 6.0], [100, 4.0]]}
    large = {"steps": 1000, "curve": [[50, 9.0], [500, 2.5], [1000, 2.0]]}
    low, high = siblings.reach([small, large])
    assert 1.5 < low < 2.0
    assert 6.0 < high < 6.5
