"""What `dynamax train` made of the siblings: loss curves and every depth's figures, as picture and table.

    python -m benchmarks.siblings [--assets assets] [--shallow FOLDER] [--markdown FILE] [--plot docs/siblings.png]

Reads the ``training.json`` that each model was exported with; measures nothing.
"""

from __future__ import annotations

import argparse
import json
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from callbacks.drawing import COLOURS, INK, PALE
from dynamax.atomic import write_atomically

KINDS = {"llama": "Transformer", "mamba2": "Mamba-2", "granite": "hybrid"}
RUNS = {"": "with exits", "plain": "without"}
SHALLOW = "of four blocks only"

Report = dict[str, Any]


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--shallow", type=Path, default=None, help="folder of NAME-shallow/model, as `train` leaves it")
    parser.add_argument("--markdown", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=Path("docs/siblings.png"))
    args = parser.parse_args()
    found = reports(args.assets, args.shallow)
    if not found:
        parser.error(f"no training.json was found under {args.assets}; train the siblings, or name their folder")
    text = table(found)
    print(text)
    if args.markdown is not None:
        write_atomically(args.markdown, text.encode())
    draw(found, args.plot)


def reports(assets: Path, shallow: Path | None) -> dict[tuple[str, str], Report]:
    """Training reports by kind and run."""
    places = {(kind, label): assets / run / kind for kind in KINDS for run, label in RUNS.items()}
    if shallow is not None:
        places |= {(kind, SHALLOW): shallow / f"{kind}-shallow" / "model" for kind in KINDS}
    files = {key: folder / "training.json" for key, folder in places.items()}
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
            " / ".join(f"{row['agreement']:.2f}"[1:] for row in depths[:-1]) or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[tuple[str, str], Report], path: Path) -> None:
    """Loss against tokens at the left, perplexity against depth at the right; the PNG appears whole or not at all."""
    figure = Figure(figsize=(10.5, 4.2), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    losses, depths = figure.subplots(1, 2)
    for (kind, run), report in found.items():
        colour = COLOURS[list(KINDS).index(kind)]
        look = {"color": colour, "linestyle": {"with exits": "-", "without": "--", SHALLOW: ":"}[run], "linewidth": 1.6}
        label = f"{KINDS[kind]}, {run}"
        each = report["tokens"] / report["steps"] / 1e6
        losses.plot([step * each for step, _ in report["curve"]], [loss for _, loss in report["curve"]], **look)
        if run == SHALLOW:
            continue
        known = sorted(report["depths"], key=int)
        values = [report["depths"][depth]["perplexity"] for depth in known]
        depths.plot([int(depth) for depth in known], values, marker="o", markersize=4, label=label, **look)
    _dress(losses, "Training tokens, millions", "Cross-entropy of the top")
    losses.set_ylim(3.0, 6.5)
    _dress(depths, "Blocks completed", "Perplexity on held-out text")
    depths.set_yscale("log")
    ticks = (40, 60, 100, 200)
    depths.set_yticks(ticks, labels=[str(tick) for tick in ticks])
    depths.yaxis.set_minor_locator(NullLocator())
    depths.legend(frameon=False, fontsize=8)
    figure.suptitle("Siblings: same text, tokenizer and budget", x=0.02, ha="left", fontweight="bold", color=INK)
    figure.tight_layout()
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _dress(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.grid(color=PALE, linewidth=0.6)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
