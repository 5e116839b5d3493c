"""The picture of the cross table: a panel a backbone, consistency against bytes. Knows figures and matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.cross_tables import Part, Row, short
from callbacks.plots import COLOURS, INK, PALE, SHAPES
from dynamax.files import write_atomically

GREY = "#8A8A8A"
LOWEST = 0.5
"""Where the axis of consistency begins: nobody decodes with less."""
COLUMNS = 4
HINT = f"Better is up and left · the upright axis begins at {LOWEST:.0%}"
TITLE = "Every gate on every backbone: what is kept, and what it costs"


def draw(parts: Sequence[Part], path: Path) -> None:
    """Draw small multiples; the PNG appears whole or not at all.

    Args:
        parts: The figures of each backbone.
        path: The PNG.
    """
    columns = min(len(parts), COLUMNS)
    rows = -(-len(parts) // columns)
    height = 1.7 + 3.0 * rows
    width = max(6.4, 3.3 * columns)
    figure = Figure(figsize=(width, height), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    cells = list(grid.flat)
    for place, (axes, part) in enumerate(zip(cells, parts, strict=False)):
        _panel(axes, part)
        if place % columns == 0:
            axes.set_ylabel("Tokens that are the\nfull model's own", fontsize=9)
        if place + columns >= len(parts):
            axes.set_xlabel("Bytes moved a token,\nshare of full decoding", fontsize=9)
            axes.tick_params(labelbottom=True)
    for axes in cells[len(parts) :]:
        axes.set_visible(False)
    cells[0].set_xlim(*_reach(parts))
    size = min(13.0, 1.7 * width)
    figure.text(0.02, 1 - 0.3 / height, TITLE, va="center", fontsize=size, fontweight="bold", color=INK)
    figure.text(0.02, 1 - 0.55 / height, HINT, va="center", fontsize=9, color="#666666")
    _legend(figure, cells, parts)
    figure.tight_layout(rect=(0.005, 0.62 / height if len(cells) == len(parts) else 0, 0.995, 1 - 0.7 / height))
    _write(figure, path)


def _reach(parts: Sequence[Part]) -> tuple[float, float]:
    """The bytes of all points that are shown, and some room."""
    curves = [row for part in parts for known in part["gates"].values() for row in known["curve"]]
    controls = [row for part in parts for row in (*part["always"], *part["oracle_curve"])]
    shown = _bytes([row for row in (*curves, *controls) if row["agreement"] >= LOWEST])
    return min(shown) - 0.03, max(shown) + 0.03


def _panel(axes: Axes, part: Part) -> None:
    axes.axvline(1.0, color=PALE, linewidth=1, zorder=1)
    axes.axhline(1.0, color=PALE, linewidth=1, zorder=1)
    always, oracle = part["always"], part["oracle_curve"]
    axes.plot(_bytes(always), _kept(always), color=GREY, linewidth=1.4, label="always at one depth", zorder=2)
    axes.plot(_bytes(oracle), _kept(oracle), color=GREY, linewidth=1.4, linestyle=(0, (4, 2)), label="oracle gate")
    for index, (gate, known) in enumerate(part["gates"].items()):
        style = {"color": COLOURS[index], "zorder": 3}
        axes.plot(_bytes(known["curve"]), _kept(known["curve"]), linewidth=1.5, **style)
        marks = known["equal_thresholds"]
        axes.plot(_bytes(marks), _kept(marks), marker=SHAPES[index], markersize=5, linestyle="none", **style)
        axes.plot([], [], marker=SHAPES[index], markersize=5, linewidth=1.5, label=short(gate), **style)
    axes.plot(1.0, 1.0, marker="*", markersize=13, color=INK, linestyle="none", label="full model", zorder=1.5)
    axes.set_title(part["title"], fontsize=10, loc="left", color=INK)
    _dress(axes)


def _dress(axes: Axes) -> None:
    axes.set_ylim(LOWEST, 1.025)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=8.5)


def _legend(figure: Figure, cells: Sequence[Axes], parts: Sequence[Part]) -> None:
    """In the first empty cell, or below all panels."""
    handles, labels = cells[0].get_legend_handles_labels()
    marks = " ".join(f"{row['threshold']:g}" for row in next(iter(parts[0]["gates"].values()))["equal_thresholds"])
    title = f"marks: thresholds {marks}"
    if len(cells) > len(parts):
        empty = cells[len(parts)]
        empty.set_visible(True)
        empty.axis("off")
        empty.legend(handles, labels, title=title, loc="center left", frameon=False, fontsize=9.5, title_fontsize=9)
    else:
        figure.legend(
            handles,
            labels,
            title=title,
            loc="lower center",
            ncols=4,
            frameon=False,
            fontsize=8.5,
            title_fontsize=8.5,
        )


def _bytes(rows: Sequence[Row]) -> list[float]:
    return [row["bytes"] for row in rows]


def _kept(rows: Sequence[Row]) -> list[float]:
    return [row["agreement"] for row in rows]


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
