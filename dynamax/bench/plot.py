"""The picture of a measurement: milliseconds a token of each contender, with its spread and its floor."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dynamax.bench.results import Row
from dynamax.files import write_atomically

# Of Okabe and Ito's palette, for every common colour blindness.
OURS, OTHERS, INK, PALE = "#0072B2", "#B8BEC4", "#222222", "#E6E6E6"


def draw(found: Sequence[Row], *, title: str, subtitle: str, path: Path) -> None:
    """Draw the contenders, the fastest at the top; the PNG appears whole or not at all.

    Args:
        found: The figures; contenders without a second token are left out.
        title: Line above the bars.
        subtitle: Smaller line under it: on what it was measured.
        path: The PNG.
    """
    timed = [(row, row.ms_per_token) for row in found if row.ms_per_token is not None]
    timed.sort(key=lambda pair: -pair[1]["p50"])
    figure = Figure(figsize=(9.6, 1.7 + 0.42 * max(len(timed), 2)), dpi=140, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (row, ms) in enumerate(timed):
        _bar(axes, place, row, ms)
    axes.set_yticks(range(len(timed)), [row.name for row, _ in timed])
    widest = max((ms["p95"] for _, ms in timed), default=1.0)
    axes.set_xlim(0, widest * 1.42)
    axes.set_ylim(-0.7, max(len(timed), 2) - 0.3)
    axes.set_xlabel("Milliseconds a token, after the first token", color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(subtitle, loc="left", fontsize=8.5, color="#555555")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    _legend(figure, timed)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _bar(axes: Axes, place: int, row: Row, ms: dict[str, float]) -> None:
    axes.barh(place, ms["p50"], height=0.62, color=OURS if row.ours else OTHERS)
    axes.hlines(place, ms["p10"], ms["p95"], color=INK, linewidth=1.2)
    axes.vlines([ms["p10"], ms["p95"]], place - 0.12, place + 0.12, color=INK, linewidth=1.2)
    if row.floor_ms is not None:
        axes.vlines(row.floor_ms, place - 0.4, place + 0.4, color="#D55E00", linewidth=2)
    same = "" if row.identical is None else f" · {row.equal_share:.0%} of tokens equal"
    edge = max(ms["p95"], row.floor_ms or 0.0)
    axes.annotate(
        f"{ms['p50']:.1f} ms{same}",
        (edge, place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=INK,
        backgroundcolor="white",
    )


def _legend(figure: Figure, timed: Sequence[tuple[Row, dict[str, float]]]) -> None:
    handles: list[Patch | Line2D] = [Patch(color=OURS, label="dynamax"), Patch(color=OTHERS, label="others")]
    handles.append(Line2D([], [], color=INK, linewidth=1.2, label="p10 to p95"))
    if any(row.floor_ms is not None for row, _ in timed):
        handles.append(
            Line2D([], [], color="#D55E00", linewidth=2, label="floor: the bare products of its weights, by torch")
        )
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=8.5)
