"""What runs left in their folders: ``report.json``, the log of ``fit``, policies with a promise."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import yaml

from dynamax.errors import UserError
from dynamax.files import read_mapping

VERSIONS = (2, 3)
"""Schema versions of ``report.json`` that can be read; the last is what ``dynamax test`` writes."""
ADDED = {"bounds": [], "reliability": [], "answers": [], "command": None}
"""What version 2 does not have yet."""


class Map(NamedTuple):
    """A mapping of any keys to values of one shape."""

    of: object


TEXT, COUNT, NUMBER, MAYBE = (str,), (int,), (int, float), (int, float, NoneType)
THRESHOLD = (int, float, dict, NoneType)
HEAD = {"name": TEXT, "params": COUNT, "flops": COUNT}
PROMISE = {"promise": TEXT, "epsilon": NUMBER, "loss": MAYBE, "documents": COUNT, "tokens": COUNT}
ROW = {
    "policy": TEXT,
    "threshold": THRESHOLD,
    **dict.fromkeys(("agreement", "drafts_kept", "answer_agreement", "blocks_per_token"), MAYBE),
    **dict.fromkeys(("flops_fraction", "bytes_fraction", "ms_per_token", "speed_up", "score"), MAYBE),
    "tokens": COUNT,
    "timed_tokens": COUNT,
    "depth_counts": Map(COUNT),
}
SHAPE = {
    "task": {"name": TEXT, "headline": TEXT, "examples": COUNT},
    "backbone": {"family": TEXT, "depth": COUNT, "width": COUNT, "vocab": COUNT, "fingerprint": TEXT},
    "decoding": {"decoder": TEXT, "lossless": (bool,), "options": Map(object), "heads": (str, NoneType)},
    "environment": Map((str, int, float, bool, NoneType)),
    "exits": [{"depth": COUNT, "agreement": MAYBE, "gate_auroc": Map(MAYBE), "lens": HEAD, "gates": [HEAD]}],
    "frontier": [ROW],
    "bounds": [ROW],
    "reliability": [
        {
            "policy": TEXT,
            "depth": COUNT,
            "tokens": COUNT,
            "ece": NUMBER,
            "brier": NUMBER,
            "bins": [{"tokens": COUNT, "score": MAYBE, "right": MAYBE}],
        }
    ],
    "answers": [
        {
            "id": TEXT,
            "prompt": TEXT,
            "given": [{"policy": TEXT, "threshold": THRESHOLD, "tokens": [TEXT], "depths": [COUNT]}],
        }
    ],
    "command": (str, NoneType),
}
"""What the page reads of a report; a tuple names the types of a value. The whole is in ``docs/report.schema.json``."""


@dataclass(frozen=True)
class FitLog:
    """The last validation of ``fit``.

    Attributes:
        file: The log.
        agreement: By depth, share of held-out positions at which the lens gives the full model's token.
        auroc: By gate and depth.
        command: What makes it again; None if the run's options were not saved beside the log.
    """

    file: str
    agreement: dict[int, float]
    auroc: dict[str, dict[int, float]]
    command: str | None


@dataclass(frozen=True)
class Calibration:
    """A file of ``dynamax calibrate``: the promise in words and as fields, and the command that made it."""

    file: str
    text: str
    promise: dict[str, Any]
    command: str


@dataclass(frozen=True)
class Run:
    """All that one run left.

    Attributes:
        name: Name of its folder.
        version: Schema version of its report.
        report: The report; what its version does not have is empty.
        fit: Of the newest log of ``fit`` below the folder; None without one.
        calibrations: In the folder.
    """

    name: str
    version: int
    report: dict[str, Any]
    fit: FitLog | None
    calibrations: list[Calibration]

    @property
    def full(self) -> dict[str, Any]:
        """The full model's row."""
        return self.report["frontier"][0]


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read the folders of some runs.

    Raises:
        UserError: For a folder without a whole report of a known version, or two of one name.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    for index, run in enumerate(runs):
        if run.name in [other.name for other in runs[:index]]:
            raise UserError(
                f"Two of the runs {' '.join(folders)} have the name {run.name}, and the page could not tell them "
                f"apart. Rename a folder, or make a page for each."
            )
    return runs


def read_run(folder: Path) -> Run:
    """Read one folder; a UserError as ``read_runs``."""
    file = folder.expanduser() / "report.json"
    if not file.is_file():
        what = "has no report.json" if folder.expanduser().is_dir() else "is no folder"
        below = sorted(str(folder / each.parent.name) for each in file.parent.glob("*/report.json"))
        hint = f" These have one: {', '.join(below[:4])}." if below else ""
        raise UserError(
            f"{folder} was given, but it {what}.{hint} Wanted: the folder of a run of `dynamax test` with the callback "
            f"ExitFrontier, such as runs/demo."
        )
    try:
        report = read_mapping(file)
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}. Run `dynamax test` again.") from error
    version = report.get("schema_version")
    if version not in VERSIONS:
        raise UserError(
            f"{file} has the schema version {version}; this release reads {' and '.join(map(str, VERSIONS))}. Run "
            f"`dynamax test` again, or use the release that wrote it."
        )
    report = {**ADDED, **report} if version == VERSIONS[0] else report
    check(report, SHAPE, f"{file}: ")
    if not report["frontier"]:
        raise UserError(f"{file}: frontier is empty; wanted: the full model's row first. Run `dynamax test` again.")
    given = [each for row in report["answers"] for each in row["given"]]
    for row in (*report["frontier"], *report["bounds"], *given):
        if isinstance(row["threshold"], dict):
            check(row["threshold"], Map(NUMBER), f"{file}: threshold")
    for row in (*report["frontier"], *report["bounds"]):
        if not all(depth.isdecimal() for depth in row["depth_counts"]):
            raise UserError(f"{file}: a key of depth_counts is no depth. Run `dynamax test` again.")
        if row.get("promise") is not None:
            check(row["promise"], PROMISE, f"{file}: promise.")
    return Run(file.parent.resolve().name, version, report, fit_log(file.parent), calibrations(file.parent))


def check(value: object, shape: object, place: str) -> None:
    """Refuse (UserError) what lacks a field of a shape or has another type there; more fields may be there."""
    wanted = "a mapping" if isinstance(shape, dict | Map) else "a list" if isinstance(shape, list) else ""
    if isinstance(shape, tuple) and not isinstance(shape, Map):
        if isinstance(value, shape) and (bool in shape or not isinstance(value, bool)):
            return
        wanted = " or ".join("null" if each is NoneType else each.__name__ for each in shape)
    elif isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            if key not in value:
                raise UserError(f"{place}{key} is missing. Run `dynamax test` again.")
            check(value[key], inner, f"{place}{key}" + ("." if isinstance(inner, dict) else ""))
        return
    elif isinstance(shape, Map) and isinstance(value, dict):
        for key, inner in value.items() if shape.of is not object else ():
            check(inner, shape.of, f"{place}.{key}")
        return
    elif isinstance(shape, list) and isinstance(value, list):
        for index, inner in enumerate(value):
            check(inner, shape[0], f"{place}[{index}].")
        return
    raise UserError(f"{place.rstrip('.')} is {str(value)[:60]}; wanted: {wanted}. Run `dynamax test` again.")


def fit_log(folder: Path) -> FitLog | None:
    """The last validation with gates in the newest ``metrics.csv`` below a folder that has one.

    Raises:
        UserError: If it is damaged.
    """
    for file in sorted(folder.rglob("metrics.csv"), key=lambda each: each.stat().st_mtime, reverse=True):
        agreement: dict[int, float] = {}
        auroc: dict[str, dict[int, float]] = {}
        try:
            with file.open(encoding="utf-8", newline="") as stream:
                rows = [row for row in csv.DictReader(stream) if any(map(str.strip, gates_of(row).values()))]
            for name, value in rows[-1].items() if rows else ():
                match str(name).split("/"):
                    case ["val", "agreement", depth] if value:
                        agreement[int(depth)] = float(value)
                    case ["val", "auroc", depth, gate] if value and value != "nan":
                        auroc.setdefault(gate, {})[int(depth)] = float(value)
        except ValueError as error:  # of a number, or of UTF-8
            raise UserError(f"{file} is damaged: {error}. Run `dynamax fit` again, or move it away.") from error
        if auroc:
            config = file.with_name("config.yaml")
            command = shlex.join(["dynamax", "fit", "-c", str(config)]) if config.is_file() else None
            return FitLog(str(file), agreement, auroc, command)
    return None


def gates_of(row: dict[str, Any]) -> dict[str, str]:
    """What a line of the log says of gates."""
    return {name: value or "" for name, value in row.items() if str(name).startswith("val/auroc/")}


def calibrations(folder: Path) -> list[Calibration]:
    """Files of ``dynamax calibrate`` in a folder; other YAML files are passed over.

    Raises:
        UserError: If one is damaged.
    """
    found = []
    for file in sorted(folder.glob("*.yaml")):
        try:
            text = file.read_text("utf-8")
            content = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file} is damaged: {reason}. Mend it, or move it out of the folder.") from error
        if not isinstance(content, dict) or not isinstance(content.get("promise"), dict):
            continue
        heads = [line[2:] for line in text.splitlines()[:2] if line.startswith("# ")]
        number = {"epsilon": NUMBER, "delta": NUMBER, "loss": NUMBER, "documents": COUNT, "blocks": NUMBER}
        check(content["promise"], {**number, "method": TEXT, "reason": (str, NoneType)}, f"{file}: promise.")
        if len(heads) != 2:
            raise UserError(f"{file} does not begin with its promise and its command. Run `dynamax calibrate` again.")
        found.append(Calibration(file.name, heads[0], content["promise"], heads[1]))
    return found
