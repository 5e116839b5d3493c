"""What a chunk of a few positions costs, which is what paying debts takes, beside transformers' own, interleaved.

    python -m benchmarks.chunks [--model mamba2-130m] [--rounds 20] [--device cpu] [--dtype float32]
                                [--precision float16] [--compile] [--threads N] [--out FILE]

Each contender takes the same rows through all blocks behind a prompt of 16, on a cache that is put back in between, and
gives the logits of all of them, as a verification needs.
The last column is our convolution beside PyTorch's grouped one, over as many positions.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from benchmarks.decode import seconds
from benchmarks.models import CONTESTANTS, load
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.precision import set_precision
from dynamax.kernels.convolution import convolve
from dynamax.metrics.environment import environment
from dynamax.types import Span

SIZES = (1, 2, 4, 8, 16)
CHANNELS, TAPS = 1792, 4
Row = dict[str, float]


def contenders(
    backbone: HFBackbone, plain: HFBackbone, prompt_1T: torch.Tensor, size: int
) -> dict[str, Callable[[], Callable[[], object]]]:
    """Name to a function that gets ready, untimed, and answers with what is timed."""
    rows_1T = prompt_1T[:, :size]
    keyword, whole = backbone.row.cache_argument, Span(0, backbone.spec.depth)
    keyword = "past_key_values" if keyword == "layer_past" else keyword
    theirs = DynamicCache(config=plain.model.config)
    plain.model(prompt_1T, use_cache=True, **{keyword: theirs})
    ours = backbone.new_cache()
    backbone.run(backbone.embed(prompt_1T, ours), whole, ours)
    before = ours.snapshot()
    for _ in range(2):  # at two places: then the step is recorded
        backbone.run(backbone.embed(rows_1T, ours), whole, ours)

    def transformers() -> Callable[[], object]:
        cache = copy.deepcopy(theirs)
        return lambda: plain.model(rows_1T, use_cache=True, **{keyword: cache})

    def dynamax() -> Callable[[], object]:
        ours.rollback(before)
        return lambda: backbone.unembed(backbone.run(backbone.embed(rows_1T, ours), whole, ours))

    return {"transformers": transformers, "dynamax": dynamax}


def convolutions(size: int, device: str) -> dict[str, Callable[[], object]]:
    """Our convolution, and PyTorch's over the same inputs, laid out as the blocks have them."""
    x_BTC, window_BWC = torch.randn(1, size, CHANNELS, device=device), torch.randn(1, TAPS - 1, CHANNELS, device=device)
    weight_CK, bias_C = torch.randn(CHANNELS, TAPS, device=device), torch.randn(CHANNELS, device=device)

    def grouped() -> torch.Tensor:
        whole_BCT = torch.cat([window_BWC, x_BTC], 1).transpose(1, 2)
        return F.conv1d(whole_BCT, weight_CK[:, None], bias_C, groups=CHANNELS).transpose(1, 2)

    return {"convolve": lambda: convolve(x_BTC, window_BWC, weight_CK, bias_C), "grouped": grouped}


@torch.inference_mode()
def measure(
    backbone: HFBackbone, prompt_1T: torch.Tensor, *, rounds: int, device: str, plain: HFBackbone | None = None
) -> dict[str, Row]:
    """Median milliseconds of each contender, by positions in the chunk."""
    found = {}
    for size in SIZES:
        models, convs = contenders(backbone, plain or backbone, prompt_1T, size), convolutions(size, device)
        times: dict[str, list[float]] = {name: [] for name in (*models, *convs)}
        for _ in range(rounds + 2):
            for name, ready in models.items():
                times[name].append(seconds(ready()))
            for name, run in convs.items():
                times[name].append(seconds(run))
        found[str(size)] = {name: 1000 * statistics.median(values[2:]) for name, values in times.items()}
    return found


def table(found: dict[str, Row]) -> str:
    """The rows as text: milliseconds, each over a single step of its own, and the two convolutions."""
    single = found["1"]
    lines = [
        f"{'positions':>9}{'transformers':>14}{'x step':>8}{'dynamax':>10}{'x step':>8}{'convolve':>11}{'grouped':>9}"
    ]
    for size, row in found.items():
        ratios = {name: row[name] / single[name] for name in ("transformers", "dynamax")}
        lines.append(
            f"{size:>9}{row['transformers']:>14.2f}{ratios['transformers']:>8.2f}{row['dynamax']:>10.2f}"
            f"{ratios['dynamax']:>8.2f}{row['convolve']:>11.3f}{row['grouped']:>9.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONTESTANTS, default="mamba2-130m")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--precision", default=None, help="of our weights, such as float16; as loaded if left out")
    parser.add_argument("--compile", action="store_true", help="our steps by inductor; needs a precision")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone, (prompt_1T,) = load(args.model, dtype=args.dtype, device=args.device, prompts=1)
    plain = copy.deepcopy(backbone)
    precision = None
    if args.precision is not None:
        precision = set_precision(backbone, args.precision, compiled=args.compile)
    found = measure(backbone, prompt_1T[:, :16], rounds=args.rounds, device=args.device, plain=plain)
    print(table(found))
    if args.out is not None:
        known = environment(args.device, dtype=args.dtype, batch=1, precision=precision)
        report = {"environment": known, "options": {"model": args.model, "rounds": args.rounds}, "ms": found}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
