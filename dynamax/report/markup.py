"""Pieces of HTML: tables, commands, legends, figures of numbers. All text goes through ``text``."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dynamax.report.charts import Series, key

OLDER = "The report has schema version 2, from before dynamax test wrote this. Run dynamax test again."
"""Why an older report lacks a part."""


def text(value: object) -> str:
    """Any value as text of HTML."""
    return escape(str(value), quote=True)


def share(value: float | None, digits: int = 1) -> str:
    """A share in percent; a dash for what was not measured."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def figure(value: float | None, digits: int = 2) -> str:
    """A number; a dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def threshold(value: Any) -> str:  # noqa: ANN401 - a number, a mapping, or none
    """A threshold in words.

    >>> threshold(0.5), threshold({"15": 0.25}), threshold(None)
    ('0.5', '0.25 at 15', '')
    """
    if value is None:
        return ""
    return (
        ", ".join(f"{level:g} at {depth}" for depth, level in value.items())
        if isinstance(value, dict)
        else f"{value:g}"
    )


def point(row: dict[str, Any]) -> str:
    """A policy at a threshold, in words."""
    level = threshold(row["threshold"])
    return f"{row['policy']} at {level}" if level else row["policy"]


def table(caption: str, heads: Sequence[str], lines: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table in a box that scrolls by itself where the screen is narrow.

    Args:
        caption: What it shows; text.
        heads: Of the columns; text.
        lines: Cells, text too; the first of a line is its head.
        words: How many columns, from the left, hold words; the others hold numbers.
    """
    side = ['class="n"' if index >= words else "" for index in range(len(heads))]
    head = "".join(f'<th scope="col" {kind}>{text(each)}</th>' for each, kind in zip(heads, side, strict=True))
    body = ""
    for first, *others in lines:
        kinds = ['class="long"' if len(each) > 48 else kind for each, kind in zip(others, side[1:], strict=True)]
        cells = "".join(f"<td {kind}>{text(each)}</td>" for each, kind in zip(others, kinds, strict=True))
        body += f'<tr><th scope="row">{text(first)}</th>{cells}</tr>\n'
    return (
        f'<div class="wide" role="region" aria-label="{text(caption)}" tabindex="0"><table>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )


def made(command: str | None, what: str = "Made by") -> str:
    """The command that made what stands above."""
    if command is None:
        return f'<p class="made">{text(what)}: not known; this report does not hold its command line.</p>\n'
    return f'<p class="made">{text(what)} <code>{text(command)}</code></p>\n'


def missing(what: str, why: str) -> str:
    """What is not there, and why."""
    return f'<p class="missing"><strong>Not here: {text(what)}.</strong> {text(why)}</p>\n'


def legend(series: Sequence[Series]) -> str:
    """Signs and names of curves, each once."""
    known = {each.label: each for each in series}
    lines = [f"<li>{key(each.style, each.mark, each.line)} {text(each.label)}</li>" for each in known.values()]
    return f'<ul class="legend">{"".join(lines)}</ul>\n'


def panels(pictures: Sequence[str], *, small: bool = False) -> str:
    """Pictures side by side, below one another where the screen is narrow."""
    return f'<div class="panels{" small" if small else ""}">' + "".join(pictures) + "</div>\n"


def panel(heading: str, picture: str) -> str:
    """One picture with a heading."""
    return f"<figure><figcaption>{text(heading)}</figcaption>{picture}</figure>"
