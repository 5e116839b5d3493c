"""The cross table: every gate on every backbone, with the controls that tell whether a gate is worth its place.

    python -m benchmarks.cross [--out benchmarks/results/cross.json] [--backbones llama smollm2 ...] [--assets assets]
                               [--lens LogitLens] [--markdown FILE] [--plot docs/cross.png] [--fresh] [--threads N]

Backbones: SmolLM2 and the siblings, which lie in folders of their own under ``--assets``. All gates of a backbone are
trained in one fit on the same labels, from text it writes itself; then everything is read off the stored states of
held-out documents. On a CPU, float32, batch 1. Each backbone is written down as soon as it is finished; one that is
there, with the same options, weights and accounting, is not measured again unless ``--fresh`` is given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cross_backbones import LENSES, NAMES, Contender, Training, contender, fit, options
from benchmarks.cross_figures import ACCOUNTING, CONSISTENCIES, NOTES, THRESHOLDS, measure
from benchmarks.cross_plot import draw
from benchmarks.cross_readings import read
from benchmarks.cross_tables import markdown, text
from dynamax.files import write_atomically
from dynamax.metrics.environment import environment


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the tables, write the files."""
    parser = _parser()
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    try:
        chosen = [contender(name, assets=args.assets, lens=args.lens) for name in args.backbones]
    except ValueError as error:
        parser.error(str(error))
    training = Training(args.lens_epochs, args.gate_epochs, args.validation, args.seed)
    parts = [finished(each, training, out=args.out, store=args.store, fresh=args.fresh) for each in chosen]
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(parts, NOTES))
    if args.plot is not None:
        draw(parts, args.plot)


def finished(given: Contender, training: Training, *, out: Path, store: str, fresh: bool) -> dict[str, Any]:
    """The figures of one backbone: those written down if they still hold, else measured and written down."""
    known = json.loads(out.read_text())["backbones"] if out.is_file() else {}
    wanted = wished(given, training)
    part = known.get(given.name)
    if fresh or part is None or part["options"] != wanted:
        part = {
            "title": given.title,
            "options": wanted,
            "environment": environment("cpu", dtype="float32", batch=1),
            **measured(given, training, store=store),
        }
        written = {"notes": NOTES, "backbones": {**known, given.name: part}}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, f"{json.dumps(written, indent=1, allow_nan=False)}\n".encode())
    print(text(part), "\n", flush=True)
    return part


def wished(given: Contender, training: Training) -> dict[str, Any]:
    """What a part must have been measured with, as it stands in the file."""
    fixed = {"thresholds": THRESHOLDS, "consistencies": CONSISTENCIES, "accounting": ACCOUNTING}
    return json.loads(json.dumps({**options(given, training), **fixed}))


def measured(given: Contender, training: Training, *, store: str) -> dict[str, Any]:
    """Train the heads of a backbone and measure them."""
    fitted = fit(given, training, store=store)
    with torch.inference_mode():
        readings = read(fitted.bank, fitted.sites, fitted.held_out)
    return measure(readings, given.source.load(), fitted.bank)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Training()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cross.json"))
    parser.add_argument("--backbones", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="where the siblings' folders lie")
    parser.add_argument("--lens", choices=LENSES, help="for all; else LogitLens where exits were trained, LowRankLens")
    parser.add_argument("--store", default="runs/store", help="where hidden states are kept")
    parser.add_argument("--lens-epochs", type=int, default=usual.lens_epochs)
    parser.add_argument("--gate-epochs", type=int, default=usual.gate_epochs)
    parser.add_argument("--validation", type=float, default=usual.validation, help="part of the prompts held out")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--markdown", type=Path, help="file for the tables in Markdown")
    parser.add_argument("--plot", type=Path, help="PNG with a panel a backbone")
    return parser


if __name__ == "__main__":
    main()
