"""Where the time of one decoded token goes, as loaded and in a precision; a table, a JSON file, a picture.

    python -m benchmarks.parts_of_a_token [--model smollm2] [--precision float16] [--context 64] [--threads N]
                                          [--out FILE] [--plot FILE]

A step of one position behind ``context`` others is timed as a whole, and so are its parts alone: the products, the
queries against keys and values, the norms. What is left is everything else: small operations, the cache, Python. Each
part runs on tensors of its own for every block, as in the step, so that they come from memory and not from a cache.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch

from benchmarks.decode import floor, seconds
from benchmarks.models import CONTESTANTS, load
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.precision import set_precision
from dynamax.metrics.environment import environment
from dynamax.types import Span

mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - behind the choice of a canvas

Parts = dict[str, float]
COLOURS = {"products": "#4c72b0", "attention": "#dd8452", "norms": "#55a868", "everything else": "#c7c7c7"}
ROUNDS = 30


@torch.inference_mode()
def parts(backbone: HFBackbone, prompt_1T: torch.Tensor) -> Parts:
    """Milliseconds of each part of a step, and of the step (``whole``), in turn, medians."""
    span, cache = Span(0, backbone.spec.depth), backbone.new_cache()
    backbone.run(backbone.embed(prompt_1T, cache), span, cache)

    def step() -> object:
        return backbone.unembed(backbone.run(backbone.embed(prompt_1T[:, :1], cache), span, cache))

    runs: dict[str, Callable[[], object]] = {
        "whole": step,
        "products": floor(backbone, backbone.spec.depth),
        "attention": attention(backbone, prompt_1T.shape[1]),
        "norms": norms(backbone),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 4):
        for name, run in runs.items():
            times[name].append(1000 * seconds(run))
    found = {name: statistics.median(values[4:]) for name, values in times.items()}
    whole = found.pop("whole")
    return {**found, "everything else": max(0.0, whole - sum(found.values())), "whole": whole}


def attention(backbone: HFBackbone, context: int) -> Callable[[], object]:
    """One query a head against ``context`` keys, for every block that has some."""
    config, pairs = backbone.model.config, []
    for index in range(backbone.spec.depth):
        if "keys" in backbone.state_kinds(index):
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            size = getattr(config, "head_dim", None) or config.hidden_size // heads
            pairs.append((torch.randn(1, heads, 1, size), *torch.randn(2, 1, groups, context, size)))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: [attend(q, k, v, enable_gqa=True) for q, k, v in pairs]


def norms(backbone: HFBackbone) -> Callable[[], object]:
    """Every norm over the model's width, on a row of its own."""
    width = backbone.spec.width
    found = [
        (module, torch.randn(1, 1, width))
        for module in backbone.model.modules()
        if "Norm" in type(module).__name__ and getattr(module, "weight", torch.ones(0)).shape == (width,)
    ]
    return lambda: [module(x) for module, x in found]


def table(found: dict[str, Parts]) -> str:
    """Milliseconds, a line for each way to run."""
    names = [*COLOURS, "whole"]
    lines = [f"{'':<14}" + "".join(f"{name:>17}" for name in names)]
    lines += [f"{way:<14}" + "".join(f"{row[name]:>17.2f}" for name in names) for way, row in found.items()]
    return "\n".join(lines)


def plot(found: dict[str, Parts], title: str, file: Path) -> None:
    """Stacked bars, a bar for each way to run."""
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.7 * len(found)), layout="constrained")
    for place, row in enumerate(found.values()):
        left = 0.0
        for name, colour in COLOURS.items():
            axes.barh(place, row[name], left=left, color=colour, label=name if place == 0 else None)
            if row[name] > 0.04 * max(each["whole"] for each in found.values()):
                axes.text(left + row[name] / 2, place, f"{row[name]:.1f}", ha="center", va="center", fontsize=9)
            left += row[name]
        axes.text(left, place, f"  {row['whole']:.1f} ms", va="center")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(row["whole"] for row in found.values()))
    axes.set_xlabel("milliseconds a token")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONTESTANTS, default="smollm2")
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain, (prompt_1T,) = load(args.model, dtype="float32", device="cpu", prompts=1)
    fast = copy.deepcopy(plain)
    precision = set_precision(fast, args.precision)
    prompt_1T = prompt_1T.repeat(1, args.context)[:, : args.context]
    found = {"as loaded": parts(plain, prompt_1T), args.precision: parts(fast, prompt_1T)}
    print(table(found))
    known = environment("cpu", dtype="float32", batch=1, precision=precision)
    if args.out is not None:
        options = {"model": args.model, "context": args.context}
        args.out.write_text(json.dumps({"environment": known, "options": options, "ms": found}, indent=1) + "\n")
    if args.plot is not None:
        where = f"{known['device']}, {args.threads} thread{'s' * (args.threads > 1)}"
        plot(found, f"Where a token's time goes: {args.model}, {where}", args.plot)


if __name__ == "__main__":
    main()
