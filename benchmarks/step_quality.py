"""What small steps cost in quality: tokens and divergence beside the whole text in one pass, in float32.

    python -m benchmarks.step_quality [--precision float16] [--compile] [--positions 2048] [--sizes 1 2 4] [--out FILE]

Decoding takes steps of one position, or of a few where debts and drafts ride along; these are recorded or compiled, and
take other code than a prompt does. The passages that come with the project are read in windows of 256 positions: the
first 16 as a prompt, the rest in steps. The reference are transformers' modules as they were loaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.bench.quality import WINDOW, compared, passages, read
from dynamax.engine import load
from dynamax.metrics.environment import environment
from dynamax.types import Span

PROMPT = 16


@torch.inference_mode()
def in_steps(backbone: Backbone, window_1T: Tensor, size: int) -> Tensor:
    """Log-probabilities ``[T, V]`` of a window that is read in steps of ``size`` positions behind a prompt."""
    cache, span = backbone.new_cache(WINDOW), Span(0, backbone.spec.depth)
    parts = [window_1T[:, :PROMPT], *window_1T[:, PROMPT:].split(size, 1)]
    states = [backbone.run(backbone.embed(part_1T, cache), span, cache) for part_1T in parts]
    return torch.cat([backbone.unembed(h_1TD)[0].log_softmax(-1) for h_1TD in states])


def main() -> None:
    """Read, print a table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    plain = load("SmolLM2", device="cpu")
    tokens_T = torch.as_tensor(plain.encode(passages(), chat=False)).flatten()[: args.positions]
    windows = [part_T[None] for part_T in tokens_T.split(WINDOW) if len(part_T) == WINDOW]
    with torch.inference_mode():
        wanted = [read(plain.backbone, window_1T) for window_1T in windows]
    fast = load("SmolLM2", precision=args.precision, compile=args.compile, device="cpu")
    print(f"{len(windows) * WINDOW} positions\n{'step':>5}{'same token':>12}{'KL, nats':>11}")
    rows = {}
    for size in args.sizes:
        same, kl = compared(fast.backbone, windows, wanted, lambda b, w, size=size: in_steps(b, w, size))
        rows[size] = {"same_argmax": same, "kl": kl}
        print(f"{size:>5}{same:>12.2%}{kl:>11.1e}", flush=True)
    if args.out is not None:
        known = environment("cpu", dtype="float32", batch=1, precision=fast.precision)
        options = {name: getattr(args, name) for name in ("precision", "compile", "positions")}
        args.out.write_text(json.dumps({"environment": known, "options": options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
