"""The picture of a study: how often each lens is right, and how many tokens could leave beside how many must."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dynamax.files import write_atomically
from dynamax.suitability.prices import LENSES, Lens
from dynamax.suitability.study import Study

# Of Okabe and Ito's palette, for every common colour blindness; shapes differ too.
STYLES: dict[Lens, dict[str, str]] = {
    "logit": {"color": "#D55E00", "marker": "s"},
    "ridge": {"color": "#0072B2", "marker": "o"},
}
INK, GREY, PALE = "#222222", "#666666", "#EEEEEE"


def draw(found: Study, *, title: str, subtitle: str, path: Path) -> None:
    """Draw a study; the PNG appears whole or not at all.

    Args:
        found: The study.
        title: Line above both panels.
        subtitle: Smaller lines under it.
        path: The PNG.
    """
    figure = Figure(figsize=(11.4, 5.0), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    right, leave = figure.subplots(1, 2)
    depths = [row.depth for row in found.rows]
    marks = {"linewidth": 1.8, "markersize": 4 if len(depths) > 12 else 6, "zorder": 3}
    for lens in LENSES:
        style = {**STYLES[lens], **marks}
        readings = [row.readings[lens] for row in found.rows]
        right.plot(depths, [each.agreement for each in readings], label=f"{lens} lens", **style)
        right.axvline(found.oracle[lens].depth, color=style["color"], linestyle=":", linewidth=1.6)
        leave.plot(depths, [each.leaves for each in readings], **style)
    for name, dashes in (("bytes", "--"), ("time", ":")):
        prices = [getattr(row, name) for row in found.rows]
        if None not in prices:
            shares = [price.break_even("logit") for price in prices]
            places = [(depth, share) for depth, share in zip(depths, shares, strict=True) if share is not None]
            label = "must leave so that reading costs nothing, by " + ("bytes" if name == "bytes" else "time here")
            leave.plot(*zip(*places, strict=True), color=INK, linestyle=dashes, linewidth=1.8, label=label, zorder=2)
    right.plot([], [], color=GREY, linestyle=":", linewidth=1.6, label="mean depth of the perfect gate")
    _finish(right, found.blocks, "Tokens at which the lens says what the top says")
    _finish(
        leave, found.blocks, f"Tokens that could leave at this exit alone, {found.keep:.0%} of all staying the top's"
    )
    figure.text(0.05, 0.955, title, va="center", fontsize=14, fontweight="bold", color=INK)
    figure.text(0.05, 0.925, subtitle, va="top", fontsize=9, color=GREY, linespacing=1.35)
    handles = [handle for axes in (right, leave) for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="lower center", ncols=5, frameon=False, fontsize=9, handlelength=2.2)
    figure.subplots_adjust(left=0.05, right=0.985, top=0.765, bottom=0.18, wspace=0.12)
    content = BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def _finish(axes: Axes, blocks: int, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlim(0, blocks)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel(f"Depth, of {blocks} blocks", color=INK)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=9)
