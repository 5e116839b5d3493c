"""Whatever is asked, no traceback, no good exit without a result, no half a file. More of it: ``make fuzz``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.cases import CASES, make
from tests.fuzz.runner import run_case

COUNTS = {"prompt": 80, "printed": 60, "words": 40, "yaml": 30, "option": 25, "setting": 15, "model": 20}
FEW = 8
"""Cases of other kinds."""


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        folder.mkdir()
        patch.chdir(folder)
        make(folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CASES)
def test_nothing_raw(kind: str, whole: Path, tmp_path: Path) -> None:
    found = [
        fault for seed in range(COUNTS.get(kind, FEW)) for fault in run_case(kind, seed, whole, tmp_path / "place")
    ]
    assert not found, "\n".join(found)
