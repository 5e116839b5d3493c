"""What the observers share: which module they watch, how figures reach the loggers, and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer

from dynamax.errors import UserError
from dynamax.modules.decoding import DecodingModule
from dynamax.modules.heads import HeadsModule
from dynamax.modules.results import PolicyRow

Watched = TypeVar("Watched", DecodingModule, HeadsModule)
WATCHED = {DecodingModule: ("decoding", "test"), HeadsModule: ("the training of heads", "fit")}
"""What each module does, and the command for it."""


def watched(pl_module: LightningModule, kind: type[Watched], observer: object) -> Watched:
    """The module; a UserError if it is not of the kind that the observer watches."""
    if not isinstance(pl_module, kind):
        does, command = WATCHED[kind]
        raise UserError(
            f"{type(observer).__name__} watches {does}, but the model is {type(pl_module).__name__}. "
            f"Use it with {kind.__name__}, as in `dynamax {command}`, or take it out of trainer.callbacks."
        )
    return pl_module


def by_step(rows: Sequence[PolicyRow]) -> Iterator[tuple[int, PolicyRow]]:
    """Rows with a logger's step each: it counts the thresholds of the row's policy."""
    seen: Counter[str] = Counter()
    for row in rows:
        yield seen[row.policy], row
        seen[row.policy] += 1


def log(trainer: Trainer, figures: Mapping[str, Any], step: int) -> None:
    """Send figures to every logger; what is no number, such as None for not measured, is left out."""
    known = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
    for logger in trainer.loggers:
        logger.log_metrics(known, step=step)


def table(title: str, heads: Sequence[str], rows: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """A table for an 80-column terminal.

    Args:
        title: The line above.
        heads: Names of the columns; a name may have several lines.
        rows: Group, name and cells of each line. A group's name stands once, above its lines; a line
            without a name of its own is named by its group.
    """
    parts = [head.split("\n") for head in heads]
    height = max(map(len, parts))
    lines = [("", [([""] * height + part)[level - height] for part in parts]) for level in range(height)]
    last = None
    for group, name, cells in rows:
        if name and group and group != last:
            lines.append((group, []))
        lines.append((f"  {name}" if name else group, list(cells)))
        last = group
    first = max([len(name or group) for group, name, _ in rows], default=0) + 2
    widths = [max(len(cells[place]) for _, cells in lines if cells) for place in range(len(heads))]
    written = [title, ""]
    for name, cells in lines:
        texts = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)]  # a group's line has no cells
        written.append("  ".join([f"{name:<{first}}", *texts]).rstrip())
    return "\n".join(written) + "\n"


def threshold(value: float | Mapping[int, float] | None) -> str:
    """A threshold as tables show it; empty for none."""
    if isinstance(value, Mapping):
        return "by depth"
    return "" if value is None else f"at {value:g}"
