"""Part ``laws``: the tests marked ``gpu``, by pytest, each kept as it ends.

A rehearsal runs them against the CPU: there kernels are skipped, and the rest checks the tests.
"""

from __future__ import annotations

import os
from collections import Counter
from importlib import import_module
from typing import Any

import pytest

from benchmarks.gpu_part import ROOT, Box, reason

TESTS = (
    "tests/gpu/test_laws_gpu.py",
    "tests/gpu/test_decoding_gpu.py",
    "tests/gpu/test_spans_captured.py",
    *("tests/metrics", "tests/data", "tests/modules"),
    "tests/gpu/test_kernels.py",
)
"""Most worth first. mamba_ssm's kernels try many forms of themselves when they first run: two minutes on an H100."""
OPTIONS = (
    *("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")),
    *("-q", "--no-header", "--tb=short", "--durations=0", "--durations-min=5", "-p", "no:cacheprovider"),
    *("-W", "default"),  # other versions warn of other things, and that is not what is asked here
    *("-m", "gpu", "--continue-on-collection-errors"),
)


class Recorder:
    """A plug-in of pytest that keeps how each test ended, and stops when time is up.

    Args:
        box: Where it is kept.
    """

    def __init__(self, box: Box) -> None:
        self._box = box
        self._counts: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._session: Any = None
        self._found = self._ended = 0

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Remember whom to tell to stop."""
        self._session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure, too."""
        if report.failed:
            self._fail(report.nodeid, report.longreprtext)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many there are."""
        self._found += len(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep how it ended."""
        if report.failed:
            self._fail(report.nodeid, report.longreprtext)
        elif report.skipped and isinstance(report.longrepr, tuple):
            self._skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self._counts[report.outcome] += 1
        self._ended += report.when == "teardown"
        self.keep()
        if self._box.left() <= 0:
            self._session.shouldstop = "out of time"

    def _fail(self, name: str, text: str) -> None:
        said = [line for line in text.strip().splitlines() if line.startswith("E ")] or text.strip().splitlines()[-1:]
        self._box.report["failures"][name] = said[0].removeprefix("E ").strip() if said else "failed"

    def keep(self) -> None:
        """Write what is known."""
        report, failed = self._box.report, self._box.report["failures"]
        counts = {"tests": self._found, "ended": self._ended, "passed": self._counts["passed"]}
        report["findings"] |= {**counts, "skipped": dict(self._skipped)}
        head = f"{self._counts['passed']} passed, {len(failed)} failed of {self._found}"
        report["table"] = "\n".join([head, *(f"skipped {n}: {why}" for why, n in self._skipped.items())])
        self._box.write()


def run(box: Box) -> None:
    """Run the tests, folder by folder; those that time did not allow are counted."""
    if box.rehearse:
        os.environ["DYNAMAX_GPU_TESTS"] = "cpu"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what else is installed shall not matter
    recorder = Recorder(box)
    for folder in TESTS:
        if box.left() <= 0:
            box.report["left_out"].append(folder)
        elif (error := unready(folder)) is not None:
            box.report["failures"][folder] = reason(error)
        else:
            pytest.main([*OPTIONS, str(ROOT / folder)], plugins=[recorder])
        recorder.keep()
    findings = box.report["findings"]
    if not findings["tests"] and not box.report["failures"]:
        raise RuntimeError("no test was found")
    if (rest := findings["tests"] - findings["ended"]) > 0:
        box.report["left_out"].append(f"{rest} tests")


def unready(folder: str) -> Exception | None:
    """Why the fixtures of a folder cannot be had, such as a package that is missing; pytest would end there."""
    if (ROOT / folder / "conftest.py").is_file():
        try:
            import_module(f"{folder.replace('/', '.')}.conftest")
        except Exception as error:
            return error
    return None
