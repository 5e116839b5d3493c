"""The picture of a calibration: at each exit, how often scores of about s are right, for s from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dynamax.calibration.reliability import TREATMENTS, ExitReliability, Treatment
from dynamax.files import write_atomically

# Of Okabe and Ito's palette, for every common colour blindness; shapes differ too.
STYLES: dict[Treatment, dict[str, str]] = {
    "as scored": {"color": "#D55E00", "marker": "s"},
    "temperature": {"color": "#0072B2", "marker": "o"},
    "isotonic": {"color": "#009E73", "marker": "^"},
}
LABELS: dict[Treatment, str] = {
    "as scored": "as scored",
    "temperature": "after temperature",
    "isotonic": "after isotonic regression",
}
INK, GREY, PALE = "#222222", "#666666", "#EEEEEE"

ACROSS = 4
"""Panels in a row."""

SIDE = 3.2
"""Of a panel, in inches, its labels included."""


def draw(rows: Sequence[ExitReliability], *, title: str, path: Path) -> None:
    """Draw one panel for each exit; the PNG appears whole or not at all.

    Args:
        rows: The exits, at least one.
        title: Line above all panels.
        path: The PNG.
    """
    across = min(ACROSS, len(rows))
    down = ceil(len(rows) / across)
    width, height = max(SIDE * across, 7.4), SIDE * 1.08 * down + 1.6
    figure = Figure(figsize=(width, height), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, row in zip(panels, rows, strict=False):
        _panel(axes, row)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[::across]:
        axes.set_ylabel("Tokens that are the full model's", color=INK)
    for axes in panels[max(0, len(rows) - across) : len(rows)]:
        axes.set_xlabel("Mean score", color=INK)
        axes.tick_params(labelbottom=True)
    note = f"Each point is a tenth of {rows[0].positions:,} positions; on the diagonal, scores are probabilities."
    left = 0.74 / width
    figure.text(left, 1 - 0.26 / height, title, va="center", fontsize=13, fontweight="bold", color=INK)
    figure.text(left, 1 - 0.53 / height, note, va="center", fontsize=9, color=GREY)
    figure.legend(
        handles=panels[0].get_legend_handles_labels()[0], loc="lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.subplots_adjust(
        left=left, right=1 - 0.2 / width, top=1 - 1.28 / height, bottom=0.82 / height, wspace=0.12, hspace=0.34
    )
    content = BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def _panel(axes: Axes, row: ExitReliability) -> None:
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", zorder=1)
    for name in TREATMENTS:
        bins = row.errors[name].bins
        axes.plot(
            [each.score for each in bins],
            [each.right for each in bins],
            label=LABELS[name],
            **{"linewidth": 1.4, "markersize": 4.5, "zorder": 3, **STYLES[name]},
        )
    axes.set_title(f"Exit {row.depth}: right {row.right:.0%}", loc="left", fontsize=10, color=INK, pad=20)
    axes.annotate("ECE", (0, 1), (0, 6), "axes fraction", "offset points", fontsize=9, color=GREY)
    for place, name in enumerate(TREATMENTS):
        text, where = f"{row.errors[name].ece:.3f}", (26 + 38 * place, 6)
        axes.annotate(text, (0, 1), where, "axes fraction", "offset points", fontsize=9, color=STYLES[name]["color"])
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal", adjustable="box", anchor="W")
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=9)
