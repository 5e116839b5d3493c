"""What `dynamax train` made of the siblings: loss curves and every depth's figures, as picture and table.

    python -m benchmarks.siblings [--assets assets] [--markdown FILE] [--plot docs/siblings.png]

Reads the ``training.json`` that each model was exported with; measures nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from callbacks.plots import COLOURS, INK, PALE
from dynamax.files import write_atomically

KINDS = {"llama": "Transformer", "mamba2": "Mamba-2", "granite": "hybrid"}
RUNS = {"": "with exits", "plain": "without", "shallow": "of four blocks only"}
LOOKS: dict[str, dict[str, Any]] = {
    "with exits": {"linestyle": "-", "linewidth": 2.0, "marker": "o"},
    "without": {"linestyle": (0, (5, 2.5)), "linewidth": 1.2, "marker": "s"},
    "of four blocks only": {"linestyle": (0, (1, 1.4)), "linewidth": 1.6, "marker": "^"},
}
STEEP = 0.1
"""Part of a run, its first, whose losses may lie above the picture."""

Report = dict[str, Any]


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--markdown", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=Path("docs/siblings.png"))
    args = parser.parse_args()
    found = reports(args.assets)
    if not found:
        parser.error(f"no training.json was found under {args.assets}; train the siblings, or name their folder")
    text = table(found)
    print(text)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.markdown, text.encode())
    draw(found, args.plot)


def reports(assets: Path) -> dict[tuple[str, str], Report]:
    """Training reports by kind and run, models of equal depth side by side."""
    equal = [(kind, run) for kind in KINDS for run in ("", "plain")]
    places = [*equal, *((kind, "shallow") for kind in KINDS)]
    files = {(kind, RUNS[run]): assets / run / kind / "training.json" for kind, run in places}
    return {key: json.loads(file.read_text()) for key, file in files.items() if file.is_file()}


def table(found: dict[tuple[str, str], Report]) -> str:
    """A Markdown row for each model: perplexity and agreement with the top, from the shallowest exit up."""
    lines = [
        "| model | trained | parameters | tokens | perplexity by exit, top last | agreement by exit |",
        "|---|---|---|---|---|---|",
    ]
    for (kind, run), report in found.items():
        depths = [report["depths"][depth] for depth in sorted(report["depths"], key=int)]
        cells = (
            KINDS[kind],
            run,
            f"{report['parameters'] / 1e6:.2f} M",
            f"{report['tokens'] / 1e6:.2f} M",
            " / ".join(f"{row['perplexity']:.1f}" for row in depths),
            " / ".join(f"{row['agreement']:.2f}".removeprefix("0") for row in depths[:-1]) or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[tuple[str, str], Report], path: Path) -> None:
    """Loss against tokens at the left, perplexity against depth at the right; the PNG appears whole or not at all."""
    figure = Figure(figsize=(10.5, 4.9), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    losses, depths = figure.subplots(1, 2)
    for (kind, run), report in found.items():
        look = {"color": colour(kind), **LOOKS[run]}
        each = report["tokens"] / report["steps"] / 1e6
        losses.plot(
            *zip(*((step * each, loss) for step, loss in report["curve"]), strict=True), **look | {"marker": ""}
        )
        known = sorted(map(int, report["depths"]))
        depths.plot(known, [report["depths"][str(depth)]["perplexity"] for depth in known], markersize=5, **look)
    _dress(losses, "Training tokens, millions", "Cross-entropy of the top")
    losses.set_ylim(*reach(list(found.values())))
    _dress(depths, "Blocks completed", "Perplexity on held-out text")
    depths.set_xticks(sorted({int(depth) for report in found.values() for depth in report["depths"]}))
    depths.set_yscale("log")
    depths.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    depths.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    depths.yaxis.set_minor_locator(NullLocator())
    _legend(figure, found)
    figure.suptitle("Siblings: same text, tokenizer and budget", x=0.02, ha="left", fontweight="bold", color=INK)
    figure.text(0.985, 0.955, "lower is better", ha="right", va="center", fontsize=9, color="#666666")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def colour(kind: str) -> str:
    """One for each kind of model."""
    return COLOURS[list(KINDS).index(kind)]


def reach(found: Sequence[Report]) -> tuple[float, float]:
    """Limits of the losses: all of them but those of the steep beginning, and some room."""
    curves = [(step / report["steps"], loss) for report in found for step, loss in report["curve"]]
    low, high = min(loss for _, loss in curves), max(loss for part, loss in curves if part >= STEEP)
    room = 0.05 * (high - low) or 0.1
    return low - room, high + room


def _legend(figure: Figure, found: dict[tuple[str, str], Report]) -> None:
    """For both panels: colours tell the kind of model, lines and marks tell how it was trained."""
    kinds = [kind for kind in KINDS if any(kind == known for known, _ in found)]
    runs = [run for run in LOOKS if any(run == known for _, known in found)]
    handles = [Line2D([], [], color=colour(kind), linewidth=5, label=KINDS[kind]) for kind in kinds]
    handles += [Line2D([], [], color=INK, markersize=5, label=run, **LOOKS[run]) for run in runs]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9, handlelength=3)


def _dress(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.grid(color=PALE, linewidth=0.6)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
