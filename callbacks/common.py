"""What the observers share: whose results they may read, and how figures reach the loggers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from dynamax.errors import UserError
from dynamax.modules.decoding import DecodingModule
from dynamax.modules.heads import HeadsModule
from dynamax.modules.results import DecodingResults, PolicyRow


def decoding(pl_module: LightningModule, observer: object) -> DecodingModule:
    """The module, if it is one that decodes.

    Raises:
        UserError: If it is another.
    """
    if not isinstance(pl_module, DecodingModule):
        raise UserError(
            f"{type(observer).__name__} watches decoding, but the model is {type(pl_module).__name__}. "
            f"Use it with DecodingModule, as in `dynamax test`, or take it out of trainer.callbacks."
        )
    return pl_module


def results(pl_module: LightningModule, observer: object) -> DecodingResults:
    """What a finished test found."""
    return decoding(pl_module, observer).results


def heads(pl_module: LightningModule, observer: object) -> HeadsModule:
    """The module, if it is one that trains heads.

    Raises:
        UserError: If it is another.
    """
    if not isinstance(pl_module, HeadsModule):
        raise UserError(
            f"{type(observer).__name__} watches the training of heads, but the model is {type(pl_module).__name__}. "
            f"Use it with HeadsModule, as in `dynamax fit`, or take it out of trainer.callbacks."
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
    names = [name or group for group, name, _ in rows]
    first = max([len(name) for name in names], default=0) + 2
    columns = [[cells[place] for *_, cells in rows] for place in range(len(heads))]
    parts = [head.split("\n") for head in heads]
    widths = [max(map(len, (*part, *cells))) for part, cells in zip(parts, columns, strict=True)]
    height = max(map(len, parts))
    lines = [title, ""]
    for level in range(height):
        texts = [part[level - height + len(part)] if level - height + len(part) >= 0 else "" for part in parts]
        lines.append(_line("", texts, first, widths))
    last = None
    for group, name, cells in rows:
        if name and group and group != last:
            lines.append(group)
        lines.append(_line(f"  {name}" if name else group, cells, first, widths))
        last = group
    return "\n".join(lines) + "\n"


def _line(name: str, cells: Sequence[str], first: int, widths: Sequence[int]) -> str:
    texts = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return "  ".join((f"{name:<{first}}", *texts)).rstrip()


def threshold(value: float | Mapping[int, float] | None) -> str:
    """A threshold as tables show it; empty for none."""
    if isinstance(value, Mapping):
        return "by depth"
    return "" if value is None else f"at {value:g}"
