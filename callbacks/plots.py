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
# Okabe and Ito's palette, for every common colour blindness; shapes differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = ("o", "s", "^", "D", "v", "P", "X")
INK, PALE = "#222222", "#DDDDDD"
HINT = "Better is up; left for costs, right for speed-up\nA curve's thresholds are in the legend"


class Quantity(NamedTuple):
    """One axis: the figure drawn, the full model's value, its label, its numbers' format."""

    key: str
    whole: float
    label: str
    ticks: str = "share"


AGREEMENT = Quantity("agreement", 1.0, "Tokens that are the full model's own")
DRAFTS = Quantity("drafts_kept", 0.0, "Tokens that are drafts kept")
COSTS = (
    Quantity("bytes_fraction", 1.0, "Bytes moved a token,\nshare of full decoding"),
    Quantity("flops_fraction", 1.0, "FLOPs a token,\nshare of full decoding"),
    Quantity("speed_up", 1.0, "Speed-up, measured beside\nfull decoding, interleaved", "{x:g}×"),
)


def panels(rows: Sequence[PolicyRow], depth: int, height: Quantity = AGREEMENT) -> list[Quantity]:
    """The costs that these rows have figures for; where nothing was decoded, only depth was counted."""
    blocks = Quantity("blocks_per_token", float(depth), f"Blocks a token, of {depth}", "{x:g}")
    return [cost for cost in COSTS if curves(rows, cost.key, height)] or [blocks]


def curves(rows: Sequence[PolicyRow], key: str, height: Quantity = AGREEMENT) -> dict[str, list[PolicyRow]]:
    """Rows of each policy that have both figures, from the lowest threshold to the highest; the full model left out."""
    lines: dict[str, list[PolicyRow]] = {}
    for row in rows:
        if row.policy != FULL and getattr(row, key) is not None and getattr(row, height.key) is not None:
            lines.setdefault(row.policy, []).append(row)
    for line in lines.values():  # a threshold that is no number belongs to a curve of one point
        line.sort(key=lambda row: row.threshold if isinstance(row.threshold, int | float) else 0.0)
    return lines


def draw(
    rows: Sequence[PolicyRow], *, depth: int, title: str, subtitle: str, path: Path, height: Quantity = AGREEMENT
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


def _plot(axes: Axes, rows: Sequence[PolicyRow], panel: Quantity, height: Quantity) -> None:
    axes.axvline(panel.whole, color=PALE, linewidth=1, zorder=1)
    axes.axhline(height.whole, color=PALE, linewidth=1, zorder=1)
    for index, (policy, line) in enumerate(curves(rows, panel.key, height).items()):
        # a gate's confidence is named by the gate: GateConfidence(MambaGate) is MambaGate
        name = re.sub(r"GateConfidence\((\w+)\)", r"\1", policy)
        thresholds = [row.threshold for row in line if isinstance(row.threshold, int | float)]
        axes.plot(
            [getattr(row, panel.key) for row in line],
            [getattr(row, height.key) for row in line],
            color=COLOURS[index % len(COLOURS)],
            marker=SHAPES[index % len(SHAPES)],
            markersize=6,
            linewidth=1.6,
            label=f"{name}, {thresholds[0]:g} to {thresholds[-1]:g}" if len(thresholds) > 1 else name,
            zorder=3,
        )
    star = {"marker": "*", "markersize": 17, "color": INK, "linestyle": "none", "clip_on": False}
    axes.plot(panel.whole, height.whole, label="full model", zorder=2, **star)  # beneath curves that come as far
    axes.set_xlabel(panel.label)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0) if panel.ticks == "share" else panel.ticks)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.09)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=9)
