"""The frontier of a sweep: a table, a picture and a report that a program can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import common
from dynamax.errors import UserError
from dynamax.files import write_atomically
from dynamax.modules.results import DecodingResults

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
FORMATS = ("{:.1%}", "{:.0%}", "{:.1f}", "{:.0%}", "{:.0%}", "{:.2f}", "{:.2f}×", "{:.3f}")
"""Of the figures; a table has one of the first two."""


class ExitFrontier(Callback):
    """Prints the table of a sweep, and writes ``report.json`` and ``frontier.png``.

    Logs ``frontier/<policy>/<figure>``; the logger's step counts the policy's thresholds.

    Args:
        folder: Where the two files go; None for the trainer's log folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder: one that cannot be written is told before the sweep, not after it.

        Raises:
            UserError: If it cannot be made, or something lies where a file should go.
        """
        if stage != "test" or not trainer.is_global_zero:
            return
        common.decoding(pl_module, self)
        folder = self._place(trainer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"ExitFrontier cannot make the folder {folder}: {error}. Name another folder.") from error
        for name in ("report.json", "frontier.png"):
            if (folder / name).is_dir():
                raise UserError(f"ExitFrontier writes {folder / name}, but that is a folder. Name another folder.")

    def _place(self, trainer: Trainer) -> Path:
        return Path(self.folder or trainer.log_dir or trainer.default_root_dir)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, print, draw, write."""
        found = common.results(pl_module, self)
        for step, row in common.by_step(found.frontier):
            named = {f"frontier/{row.policy}/{name}": getattr(row, name) for name in ("threshold", *FIGURES)}
            common.log(trainer, named, step=step)
        if not trainer.is_global_zero:
            return
        folder = self._place(trainer)
        write(found.as_json(), folder / "report.json")
        picture(found, folder / "frontier.png")
        print(table(found))
        print(f"Wrote {folder / 'report.json'} and {folder / 'frontier.png'}")


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON whole or not at all."""
    write_atomically(path, f"{json.dumps(content, indent=2, allow_nan=False)}\n".encode())


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
    parts = (name, f"{found.task.examples} examples", machine, *_manner(found))
    return " · ".join(parts)


def _manner(found: DecodingResults) -> list[str]:
    """How decoding was done, where it was not as usual: early exit, exact state, greedy."""
    known = found.decoding
    told = [] if known.decoder == "EarlyExit" else [known.decoder]
    told += [f"{name} {value}" for name, value in known.options.items() if value != "Exact"]
    if known.sampler is not None and known.sampler["name"] != "Greedy":
        told.append(f"sampler {known.sampler['name']}")
    return told


def _drafts(found: DecodingResults) -> bool:
    return any(row.drafts_kept is not None for row in found.frontier)


def table(found: DecodingResults) -> str:
    """The frontier, a line for each policy and threshold."""
    name, headline = found.task.name, found.task.headline
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
    # lossless text is the full model's whatever the policy: there the drafts kept tell policies apart
    columns = [name for name in FIGURES if name != ("agreement" if _drafts(found) else "drafts_kept")]
    lines = []
    for row in found.frontier:
        values = [getattr(row, name) for name in columns]
        cells = ["" if value is None else form.format(value) for form, value in zip(FORMATS, values, strict=True)]
        lines.append((row.policy, common.threshold(row.threshold), cells))
    title = f"{name}, {found.task.examples} examples: each policy beside the full model"
    manner = _manner(found)
    return common.table("\n".join([title, *(["Decoding: " + ", ".join(manner)] if manner else [])]), heads, lines)
