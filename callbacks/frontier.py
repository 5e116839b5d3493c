"""The frontier of a sweep: a table, a picture and a report that a program can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import common
from dynamax.errors import UserError
from dynamax.files import check_folder, write_atomically
from dynamax.modules.decoding import DecodingModule
from dynamax.modules.results import DecodingResults

COLUMNS = {
    "agreement": ("same\ntokens", "{:.1%}"),
    "drafts_kept": ("drafts\nkept", "{:.1%}"),
    "answer_agreement": ("same\nanswers", "{:.0%}"),
    "blocks_per_token": ("blocks\na token", "{:.1f}"),
    "flops_fraction": ("FLOPs", "{:.0%}"),
    "bytes_fraction": ("bytes", "{:.0%}"),
    "ms_per_token": ("ms a\ntoken", "{:.2f}"),
    "speed_up": ("speed-\nup", "{:.2f}×"),
    "score": ("", "{:.3f}"),
}
"""Figures of the frontier, with head and format in the table; the score's head is the name of the task's score."""


class ExitFrontier(Callback):
    """Prints the table of a sweep, and writes ``report.json`` and ``frontier.png``.

    Logs ``frontier/<policy>/<figure>``; the logger's step counts the policy's thresholds.

    Args:
        folder: Where the two files go; None for the trainer's log folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._place = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder, so that one that cannot be written is refused before the sweep.

        Raises:
            UserError: If it cannot be made, or something lies where a file should go.
        """
        if stage != "test" or not trainer.is_global_zero:
            return
        common.watched(pl_module, DecodingModule, self)
        self._place = folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        check_folder(folder, "The report of ExitFrontier", "its option folder")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "frontier.png"):
            if (folder / name).is_dir():
                raise UserError(f"ExitFrontier writes {folder / name}, but that is a folder. Name another folder.")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, print, draw, write."""
        found = common.watched(pl_module, DecodingModule, self).results
        for step, row in common.by_step(found.frontier):
            named = {f"frontier/{row.policy}/{name}": getattr(row, name) for name in ("threshold", *COLUMNS)}
            common.log(trainer, named, step=step)
        if not trainer.is_global_zero:
            return
        folder = self._place
        write(found.as_json(), folder / "report.json")
        picture(found, folder / "frontier.png")
        print(table(found))
        for row in found.frontier:
            if row.promise is not None:
                print(f"{row.policy}: {row.promise.text}")
        print(f"Wrote {folder / 'report.json'} and {folder / 'frontier.png'}")


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON whole or not at all; a list of single values takes one line."""
    write_atomically(path, f"{_lines(content, '')}\n".encode())


def _lines(value: Any, indent: str) -> str:  # noqa: ANN401 - any value of JSON
    inner = indent + "  "
    if isinstance(value, Mapping) and value:
        parts = [f"{json.dumps(key)}: {_lines(each, inner)}" for key, each in value.items()]
    elif isinstance(value, list) and any(isinstance(each, Mapping | list) for each in value):
        parts = [_lines(each, inner) for each in value]
    else:
        return json.dumps(value, allow_nan=False)
    first, last = "{}" if isinstance(value, Mapping) else "[]"
    return f"{first}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{last}"


def picture(found: DecodingResults, path: Path) -> None:
    """Draw ``frontier.png``."""
    from callbacks.plots import AGREEMENT, DRAFTS, draw  # matplotlib is slow to import, and no other command needs it

    draw(
        found.frontier,
        depth=found.backbone["depth"],
        title=f"Leaving early on {found.task.name}: what is kept, and what it costs",
        subtitle=_measured_on(found),
        path=path,
        height=DRAFTS if _drafts(found) else AGREEMENT,
    )


def _measured_on(found: DecodingResults) -> str:
    backbone, where = found.backbone, found.environment
    name = f"{backbone['family']}, {backbone['depth']} blocks of width {backbone['width']}"
    machine = ", ".join(str(where[key]) for key in ("device", "dtype") if key in where)
    return " · ".join([name, f"{found.task.examples} examples", machine, *_manner(found)])


def _manner(found: DecodingResults) -> list[str]:
    """How decoding was done, where it was not as usual: early exit, exact state, greedy."""
    known = found.decoding
    parts = [] if known.decoder == "EarlyExit" else [known.decoder]
    parts += [f"{name} {value}" for name, value in known.options.items() if value != "Exact"]
    if known.sampler is not None and known.sampler["name"] != "Greedy":
        parts.append(f"sampler {known.sampler['name']}")
    return parts


def table(found: DecodingResults) -> str:
    """The frontier, a line for each policy and threshold."""
    # lossless text is the full model's whatever the policy: there policies differ by the drafts kept
    hidden = "agreement" if _drafts(found) else "drafts_kept"
    columns = {name: column for name, column in COLUMNS.items() if name != hidden}
    heads = [head or found.task.headline.replace("_", "\n") for head, _ in columns.values()]
    lines = []
    for row in found.frontier:
        values = [(getattr(row, name), form) for name, (_, form) in columns.items()]
        cells = ["" if value is None else form.format(value) for value, form in values]
        lines.append((row.policy, common.threshold(row.threshold), cells))
    title = f"{found.task.name}, {found.task.examples} examples: each policy beside the full model"
    if manner := _manner(found):
        title = f"{title}\nDecoding: {', '.join(manner)}"
    return common.table(title, heads, lines)


def _drafts(found: DecodingResults) -> bool:
    return any(row.drafts_kept is not None for row in found.frontier)
