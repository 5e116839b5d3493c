"""Pictures as SVG text: curves, stacked bars. Colours are names of the page's style, so that both themes work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = 8
SHAPES = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "M-3.6,-3.6h7.2v7.2h-7.2Z",
    "M0,-4.6L4.4,3.4H-4.4Z",
    "M0,-5L5,0L0,5L-5,0Z",
    "M0,4.6L4.4,-3.4H-4.4Z",
    "M-1.4,-4.6h2.8v3.2h3.2v2.8h-3.2v3.2h-2.8v-3.2h-3.2v-2.8h3.2Z",
)
"""Marks of curves: disc, square, triangle, diamond, triangle on its tip, cross."""
TICK = "M-1.3,-5h2.6v10h-2.6Z"
STAR = "M0,-7L1.8,-2.3L6.7,-2.2L2.8,0.9L4.1,5.7L0,2.9L-4.1,5.7L-2.8,0.9L-6.7,-2.2L-1.8,-2.3Z"
RING = "M-5.5,0a5.5,5.5 0 1,0 11,0a5.5,5.5 0 1,0 -11,0ZM-2.8,0a2.8,2.8 0 1,1 5.6,0a2.8,2.8 0 1,1 -5.6,0Z"
WIDTH, HEIGHT = 360, 268
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 46


class Series(NamedTuple):
    """One curve.

    Attributes:
        label: Its name.
        points: x, y, and what is told of each point.
        colour: Number of its colour; negative for the colour of text.
        mark: Path of its marks, around 0.
        line: ``solid``, ``dashed`` or ``none``.
    """

    label: str
    points: list[tuple[float, float, str]]
    colour: int
    mark: str
    line: str = "solid"

    @property
    def style(self) -> str:
        """Class of its colour."""
        return "ink" if self.colour < 0 else f"c{self.colour % COLOURS}"


class Axis(NamedTuple):
    """One axis.

    Attributes:
        label: What is on it.
        share: Whether numbers are told in percent.
        low: Where it begins; None for where the points do.
        high: Where it ends.
        marked: Values with a line across the picture.
    """

    label: str
    share: bool = True
    low: float | None = None
    high: float | None = None
    marked: tuple[float, ...] = ()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within a range, about ``count`` of them.

    >>> ticks(0.0, 1.0), ticks(0.62, 1.07)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.7, 0.8, 0.9, 1.0])
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def extent(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """Where an axis begins and ends: a little beyond its values."""
    low, high = min([*values, *axis.marked]), max([*values, *axis.marked])
    gap = 0.07 * (high - low) or 0.05 * abs(high) or 0.5
    least = 0.0 if low - gap < 0 <= low else low - gap  # figures that cannot be negative begin at 0
    return (least if axis.low is None else axis.low), (high + gap if axis.high is None else axis.high)


def plot(
    series: Sequence[Series], x: Axis, y: Axis, *, title: str, diagonal: bool = False, counts: Sequence[int] = ()
) -> str:
    """Curves over two axes.

    Args:
        series: The curves, the lowest first; at least one point among them.
        x: Axis from left to right.
        y: Axis from bottom to top.
        title: What the picture shows, for those who do not see it.
        diagonal: Whether to draw where both are equal.
        counts: Bars from the bottom, side by side: how many of each part of x.
    """
    x0, x1 = extent(x, [point[0] for each in series for point in each.points])
    y0, y1 = extent(y, [point[1] for each in series for point in each.points])
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(a: float, b: float) -> str:
        return f"{LEFT + across * (a - x0) / (x1 - x0):.1f},{TOP + up * (y1 - b) / (y1 - y0):.1f}"

    def line(a: tuple[float, float], b: tuple[float, float], style: str) -> str:
        return f'<path class="{style}" d="M{at(*a)}L{at(*b)}"/>'

    parts = [line((x0, level), (x1, level), "grid") for level in ticks(y0, y1)]
    parts += [line((level, y0), (level, y1), "mark") for level in x.marked]
    parts += [line((x0, level), (x1, level), "mark") for level in y.marked]
    for index, count in enumerate(counts):
        width, tall = (x1 - x0) / len(counts), 0.3 * (y1 - y0) * count / max(counts)
        a, b, c, d = index * width + x0, (index + 1) * width + x0, y0 + tall, y0
        parts.append(f'<path class="count" d="M{at(a, d)}L{at(a, c)}L{at(b, c)}L{at(b, d)}Z"/>')
    parts += [line((x0, y0), (x1, y1), "mark")] if diagonal else []
    for level in ticks(x0, x1):
        place = at(level, y0).split(",")[0]
        parts.append(f'<text x="{place}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(level, x)}</text>')
    for level in ticks(y0, y1):
        place = float(at(x0, level).split(",")[1]) + 4
        parts.append(f'<text x="{LEFT - 6}" y="{place:.1f}" text-anchor="end">{number(level, y)}</text>')
    parts.append(line((x0, y0), (x1, y0), "axis"))
    for each in series:
        if len(each.points) > 1 and each.line != "none":
            path = "L".join(at(a, b) for a, b, _ in each.points)
            parts.append(f'<path class="curve {each.style} {each.line}" d="M{path}"/>')
        parts += [
            f'<path class="dot {each.style}" transform="translate({at(a, b)})" d="{each.mark}">'
            f"<title>{escape(f'{each.label}, {told}' if told else each.label)}</title></path>"
            for a, b, told in each.points
        ]
    middle = LEFT + across / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    place = f'x="{-(TOP + up / 2):.0f}" y="11" transform="rotate(-90)"'
    parts.append(f'<text {place} text-anchor="middle">{escape(y.label)}</text>')
    return picture(WIDTH, HEIGHT, title, parts)


def stacked(parts: Sequence[tuple[float, str, str]], title: str) -> str:
    """One bar of shares that add up to 1.

    Args:
        parts: Share, style, and what is told of each; a share that is wide enough shows it.
        title: What the bar shows.
    """
    width, height, done, drawn = 600, 22, 0.0, []
    for share, style, told in parts:
        box = f'x="{width * done:.1f}" width="{width * share:.1f}" height="{height}"'
        drawn.append(f'<rect class="depth" style="{style}" {box}><title>{escape(told)}</title></rect>')
        done += share
    return picture(width, height, title, drawn, stretched=True)


def bullet(value: float, limit: float, style: str, title: str) -> str:
    """A bar from 0 to a value, and a line at the limit that it should not pass."""
    width, height, most = 600, 22, 1.25 * max(value, limit)
    bar = f'<rect class="value {style}" y="5" width="{width * value / most:.1f}" height="12"/>'
    line = f'<rect class="limit" x="{width * limit / most:.1f}" width="5" height="{height}"/>'
    return picture(width, height, title, [bar, line], stretched=True)


def picture(width: int, height: int, title: str, parts: Sequence[str], *, stretched: bool = False) -> str:
    """Parts as one SVG picture with a name."""
    fit = ' preserveAspectRatio="none"' if stretched else ""
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"{fit}>'
    return head + "".join(parts) + "</svg>"


def key(style: str, mark: str, line: str = "none") -> str:
    """The sign of a curve for a legend."""
    curve = f'<path class="curve {style} {line}" d="M0,8H28"/>' if line != "none" else ""
    dot = f'<path class="dot {style}" transform="translate(14,8)" d="{mark}"/>' if mark else ""
    return f'<svg class="key" viewBox="0 0 28 16" aria-hidden="true">{curve}{dot}</svg>'


def number(value: float, axis: Axis) -> str:
    """A number of an axis."""
    return f"{100 * value:g}%" if axis.share else f"{value:g}"
