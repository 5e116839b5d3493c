"""The picture of the frontier: what is kept against what it costs. Knows rows of figures and matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dynamax.files import write_atomically
from dynamax.modules.results import PolicyRow

FULL = "Full"
# Okabe and Ito's palette, told apart with every common colour blindness; shapes tell the rest.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = ("o", "s", "^", "D", "v", "P", "X")
INK, PALE = "#222222", "#DDDDDD"
HINT = "Better is up; left for costs, right for speed-up\nA curve's thresholds are in the legend"


class Panel(NamedTuple):
    """One axis of cost: the figure drawn, where the full model stands on it, its name, its numbers' format."""

    key: str
    whole: float
    label: str
    ticks: PercentFormatter | str


class Height(NamedTuple):
    """The axis of what is kept: the figure drawn, where the full model stands on it, its name."""

    key: str
    whole: float
    label: str


AGREEMENT = Height("agreement", 1.0, "Tokens that are the full model's own")
DRAFTS = Height("drafts_kept", 0.0, "Tokens that are drafts kept")


def panels(rows: Sequence[PolicyRow], depth: int, height: Height = AGREEMENT) -> list[Panel]:
    """The panels that these rows have figures for; where nothing was decoded, only depth was counted."""
    share = PercentFormatter(1.0, decimals=0)
    wanted = [
        Panel("bytes_fraction", 1.0, "Bytes moved a token,\nshare of full decoding", share),
        Panel("flops_fraction", 1.0, "FLOPs a token,\nshare of full decoding", share),
        Panel("speed_up", 1.0, "Speed-up, measured beside\nfull decoding, interleaved", "{x:g}×"),
    ]
    blocks = Panel("blocks_per_token", float(depth), f"Blocks a token, of {depth}", "{x:g}")
    return [panel for panel in wanted if curves(rows, panel.key, height)] or [blocks]


def curves(rows: Sequence[PolicyRow], key: str, height: Height = AGREEMENT) -> dict[str, list[PolicyRow]]:
    """Rows of each policy that have both figures, from the lowest threshold to the highest; the full model left out."""
    lines: dict[str, list[PolicyRow]] = {}
    for row in rows:
        if row.policy != FULL and getattr(row, key) is not None and getattr(row, height.key) is not None:
            lines.setdefault(row.policy, []).append(row)
    return {policy: sorted(line, key=_threshold) for policy, line in lines.items()}


def _threshold(row: PolicyRow) -> float:
    """What a curve is ordered by; one point without a number is a curve of its own."""
    return row.threshold if isinstance(row.threshold, int | float) else 0.0


def draw(
    rows: Sequence[PolicyRow], *, depth: int, title: str, subtitle: str, path: Path, height: Height = AGREEMENT
) -> None:
    """Draw what is kept against each cost and against measured speed-up; the PNG appears whole or not at all.

    Args:
        rows: One a policy and threshold.
        depth: Blocks of the full model.
        title: Line above the panels.
        subtitle: Smaller line under it: on what it was measured.
        path: The PNG.
        height: What is kept: agreement, or drafts where decoding is lossless.
    """
    figure = Figure(figsize=(12.6, 5.2), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    chosen = panels(rows, depth, height)
    grid = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, panel in zip(grid, chosen, strict=True):
        _plot(axes, rows, panel, height)
        _dress(axes, panel)
    grid[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    grid[0].set_ylabel(height.label)
    figure.text(0.063, 0.95, title, va="center", fontsize=14, fontweight="bold", color=INK)
    figure.text(0.063, 0.893, subtitle, va="center", fontsize=9, color="#666666")
    figure.text(0.98, 0.922, HINT, va="center", ha="right", fontsize=9, color="#666666")
    handles, labels = grid[0].get_legend_handles_labels()
    columns = min(len(handles), 4)
    figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=9.5)
    bottom = 0.165 + 0.043 * -(-len(handles) // columns)
    figure.subplots_adjust(left=0.065, right=0.98, top=0.85, bottom=bottom, wspace=0.07)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def _plot(axes: Axes, rows: Sequence[PolicyRow], panel: Panel, height: Height) -> None:
    axes.axvline(panel.whole, color=PALE, linewidth=1, zorder=1)
    axes.axhline(height.whole, color=PALE, linewidth=1, zorder=1)
    for index, (policy, line) in enumerate(curves(rows, panel.key, height).items()):
        axes.plot(
            [getattr(row, panel.key) for row in line],
            [getattr(row, height.key) for row in line],
            color=COLOURS[index % len(COLOURS)],
            marker=SHAPES[index % len(SHAPES)],
            markersize=6,
            linewidth=1.6,
            label=_name(policy, line),
            zorder=3,
        )
    star = {"marker": "*", "markersize": 17, "color": INK, "linestyle": "none", "clip_on": False}
    axes.plot(panel.whole, height.whole, label="full model", zorder=2, **star)  # beneath curves that come as far


def _name(policy: str, line: Sequence[PolicyRow]) -> str:
    policy = short(policy)
    thresholds = [row.threshold for row in line if isinstance(row.threshold, int | float)]
    return f"{policy}, {thresholds[0]:g} to {thresholds[-1]:g}" if len(thresholds) > 1 else policy


def short(policy: str) -> str:
    """A policy as people call it: a gate's confidence goes by the gate.

    >>> short("GateConfidence(MambaGate)"), short("AnyOf(GateConfidence(MambaGate), MaxProb)")
    ('MambaGate', 'AnyOf(MambaGate, MaxProb)')
    """
    return re.sub(r"GateConfidence\((\w+)\)", r"\1", policy)


def _dress(axes: Axes, panel: Panel) -> None:
    axes.set_xlabel(panel.label)
    axes.xaxis.set_major_formatter(panel.ticks)
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.09)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
