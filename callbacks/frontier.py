"""The frontier of a sweep: a table, a picture and a report that a program can read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import common
from dynamax.files import write_atomically
from dynamax.modules.results import DecodingResults, PolicyRow

FIGURES = (
    "agreement",
    "drafts_kept",
    "answer_agreement",
    "blocks_per_token",
    "flops_fraction",
    "bytes_fraction",
    "ms_per_token",
    "speed_up",
    "score",
)


class ExitFrontier(Callback):
    """Prints the table of a sweep, and writes ``report.json`` and ``frontier.png``.

    Logs ``frontier/<policy>/<figure>``; the logger's step counts the policy's thresholds.

    Args:
        folder: Where the two files go; None for the trainer's log folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, print, draw, write."""
        found = common.results(pl_module, self)
        _log(trainer, found.frontier)
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write(found.as_json(), folder / "report.json")
        picture(found, folder / "frontier.png")
        print(table(found))
        print(f"Wrote {folder / 'report.json'} and {folder / 'frontier.png'}")


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON whole or not at all; figures that are not finite become null."""
    write_atomically(path, f"{json.dumps(_finite(content), indent=2, allow_nan=False)}\n".encode())


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def picture(found: DecodingResults, path: Path) -> None:
    """Draw ``frontier.png``."""
    from callbacks.plots import AGREEMENT, DRAFTS, draw  # matplotlib is slow to import, and no other command needs it

    draw(
        found.frontier,
        depth=found.backbone["depth"],
        title=f"Leaving early on {found.task['name']}: what is kept, and what it costs",
        subtitle=_measured_on(found),
        path=path,
        height=DRAFTS if _drafts(found) else AGREEMENT,
    )


def _measured_on(found: DecodingResults) -> str:
    backbone, where = found.backbone, found.environment
    name = f"{backbone['family']}, {backbone['depth']} blocks of width {backbone['width']}"
    machine = ", ".join(str(where[key]) for key in ("device", "dtype") if key in where)
    parts = (name, f"{found.task['examples']} examples", machine, *_manner(found))
    return " · ".join(parts)


def _manner(found: DecodingResults) -> list[str]:
    """How decoding was done, where it was not as usual: early exit, exact state, greedy."""
    known = found.decoding
    told = [] if known["decoder"] == "EarlyExit" else [known["decoder"]]
    told += [f"{name} {value}" for name, value in known["options"].items() if value != "Exact"]
    sampler = known["sampler"]
    return told + ([f"sampler {sampler['name']}"] if sampler is not None and sampler["name"] != "Greedy" else [])


def _drafts(found: DecodingResults) -> bool:
    return any(row.drafts_kept is not None for row in found.frontier)


def table(found: DecodingResults) -> str:
    """The frontier, a line for each policy and threshold."""
    name, headline = found.task["name"], found.task["headline"]
    heads = [
        "drafts\nkept" if _drafts(found) else "same\ntokens",
        "same\nanswers",
        "blocks\na token",
        "FLOPs",
        "bytes",
        "ms a\ntoken",
        "speed-\nup",
    ]
    heads.append(headline.replace("_", "\n"))
    lines = [(row.policy, common.threshold(row.threshold), _cells(row, _columns(found))) for row in found.frontier]
    title = f"{name}, {found.task['examples']} examples: each policy beside the full model"
    manner = _manner(found)
    return common.table("\n".join([title, *(["Decoding: " + ", ".join(manner)] if manner else [])]), heads, lines)


def _columns(found: DecodingResults) -> list[str]:
    """Lossless text is the full model's whatever the policy: there the drafts kept tell policies apart."""
    return [name for name in FIGURES if name != ("agreement" if _drafts(found) else "drafts_kept")]


def _cells(row: PolicyRow, columns: Sequence[str]) -> list[str]:
    formats = ("{:.1%}", "{:.0%}", "{:.1f}", "{:.0%}", "{:.0%}", "{:.2f}", "{:.2f}×", "{:.3f}")
    values = [getattr(row, figure) for figure in columns]
    return ["" if value is None else form.format(value) for form, value in zip(formats, values, strict=True)]


def _log(trainer: Trainer, rows: Sequence[PolicyRow]) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        policy = row.policy
        seen[policy] = seen.get(policy, -1) + 1
        named = {f"frontier/{policy}/{name}": getattr(row, name) for name in ("threshold", *FIGURES)}
        common.log(trainer, named, step=seen[policy])
