"""Decode speed at forced depths beside transformers' generate, interleaved in one process.

    python -m benchmarks.decode [--model smollm2] [--prompts 6] [--tokens 32] [--rounds 3] [--device cpu]
                                [--dtype float32] [--precision float16] [--compile] [--depths 10 20] [--threads N]
                                [--out FILE]

Greedy, batch 1. Each contender decodes each prompt in turn, round after round; the tokens of full depth are compared.
The floor of a depth is the matrix products of its blocks and of the output matrix, nothing else. Below it lies the time
in which memory can be read once over those weights, at the rate at which it copies (``bandwidth``).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import CONTESTANTS, load
from dynamax.backbones.experts import matrices_of
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.precision import set_precision
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.heads.bank import Exit, ExitBank
from dynamax.kernels.products import Product
from dynamax.metrics.environment import environment
from dynamax.policies.schedule import AtDepth

Depths = tuple[int, ...]


def contenders(
    backbone: HFBackbone, depths: Depths, tokens: int, plain: HFBackbone | None = None
) -> dict[str, Callable[[Tensor], object]]:
    """Name to a function that decodes ``tokens`` tokens after a prompt; ``plain`` is what transformers runs."""
    theirs: Any = (plain or backbone).model
    theirs.generation_config.eos_token_id = None  # else it may not say the end token, which ours may
    bank = ExitBank({depth: Exit(lens=None, gates=[]) for depth in depths}, backbone.site) if depths else None

    def generate(prompt_1T: Tensor) -> Tensor:
        return theirs.generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )

    def ours(decoder: Full | EarlyExit) -> Callable[[Tensor], object]:
        return lambda prompt_1T: list(decoder.decode(prompt_1T, max_new_tokens=tokens))

    full = {"transformers generate": generate, f"dynamax, all {backbone.spec.depth}": ours(Full(backbone))}
    return {**full, **{f"dynamax, depth {d}": ours(EarlyExit(backbone, bank, AtDepth(d))) for d in depths}}


def matrices(backbone: HFBackbone, depth: int) -> list[Tensor]:
    """The matrices of ``depth`` blocks that a position is multiplied with, and the output matrix."""
    packed = products(backbone, depth)
    if packed:
        return [product.dense() for product in packed]
    share = backbone.row.expert_share(backbone.model.config)
    found: list[Tensor] = []
    for module in (module for block in backbone._blocks[:depth] for module in block.modules()):
        found += [module.weight] if isinstance(module, nn.Linear) else []
        for weight_EOI in matrices_of(module).values():
            found += weight_EOI[: round(share * len(weight_EOI))]
    return [*found, backbone.output_matrix]


def products(backbone: HFBackbone, depth: int) -> list[Product]:
    """The packed products of ``depth`` blocks that a position is multiplied with, and the output matrix's."""
    modules = [module for block in backbone._blocks[:depth] for module in block.modules()]
    share = backbone.row.expert_share(backbone.model.config)
    lists = [module for module in modules if isinstance(module, nn.ModuleList)]
    idle = {id(expert) for experts in lists for expert in list(experts)[round(share * len(experts)) :]}
    used = [module for module in modules if id(module) not in idle]
    return [module for module in (*used, backbone.model.get_output_embeddings()) if isinstance(module, Product)]


def floor(backbone: HFBackbone, depth: int, batch: int = 1) -> Callable[[], None]:
    """The bare matrix products of ``depth`` blocks and the output matrix, for one position of every row."""
    packed = products(backbone, depth)
    if packed:
        return bare(packed, batch)
    weights = matrices(backbone, depth)
    rows = [torch.randn(batch, weight.shape[1], dtype=weight.dtype, device=weight.device) for weight in weights]

    def run() -> None:
        for weight, row in zip(weights, rows, strict=True):
            F.linear(row, weight)

    return run


def bare(packed: list[Product], batch: int) -> Callable[[], None]:
    """Packed products, one after the other."""
    rows = [torch.ones(batch, product.in_features, dtype=product.dtype) for product in packed]

    def run() -> None:
        for product, row in zip(packed, rows, strict=True):
            product(row)

    return run


def bandwidth(device: torch.device, *, size: int = 2**29, rounds: int = 10) -> float:
    """Bytes a second that memory moves: the best of some copies, each of which reads and writes ``size`` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return 2 * size / min(seconds(lambda: copy.copy_(source)) for _ in range(rounds))


def memory_ms(backbone: HFBackbone, depths: Depths, rate: float) -> dict[str, float]:
    """Milliseconds in which the weights of each depth can be read once."""
    held = {depth: sum(w.numel() for w in matrices(backbone, depth)) * backbone.weight_bytes for depth in depths}
    return {str(depth): 1000 * size / rate for depth, size in held.items()}


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """A GPU answers before it is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def measure(
    backbone: HFBackbone,
    prompts: list[Tensor],
    depths: Depths,
    *,
    tokens: int,
    rounds: int,
    leave_out: str = "",
    plain: HFBackbone | None = None,
    said: dict[str, list[Any]] | None = None,
) -> dict[str, dict[str, float]]:
    """Milliseconds a token: decode alone, the prefill's time taken off by a one-token run of the same prompt.

    ``said`` takes what each contender answered in the last round, prompt by prompt.
    """
    longer, shorter = contenders(backbone, depths, tokens, plain), contenders(backbone, depths, 1, plain)
    longer.pop(leave_out, None)
    times: dict[str, list[float]] = {name: [] for name in longer}
    floors: dict[int, list[float]] = {depth: [] for depth in (*depths, backbone.spec.depth)}
    floors_of = {depth: floor(backbone, depth, len(prompts[0])) for depth in floors}
    said = {} if said is None else said
    for number in range(rounds + 1):
        said.update({name: [] for name in longer})
        for prompt_1T in prompts if number else prompts[:1]:
            for name in longer:
                spent = seconds(lambda: said[name].append(longer[name](prompt_1T)))  # noqa: B023
                spent -= seconds(lambda: shorter[name](prompt_1T))  # noqa: B023
                if number:
                    times[name].append(1000 * spent / (tokens - 1))
            for depth, known in floors.items():
                run = floors_of[depth]
                run()
                spent = seconds(lambda: [run() for _ in range(5)]) / 5  # noqa: B023
                if number:
                    known.append(1000 * spent)
    rows = {name: summary(values) for name, values in times.items()}
    for depth, values in floors.items():
        rows[f"floor, depth {depth}"] = summary(values)
    return rows


def same_tokens(said: dict[str, list[Any]], depth: int, tokens: int) -> dict[str, int]:
    """Tokens of full depth that are those of generate, up to the first that differs; of how many; answers alike."""
    equal = alike = 0
    pairs = list(zip(said["transformers generate"], said[f"dynamax, all {depth}"], strict=True))
    for theirs_1T, steps in pairs:
        ours = [int(step.token_B[0]) for step in steps]
        differs = [a != b for a, b in zip(theirs_1T[0, -tokens:].tolist(), ours, strict=True)]
        equal += differs.index(True) if True in differs else tokens
        alike += True not in differs
    return {"tokens": equal, "of": tokens * len(pairs), "answers": alike, "prompts": len(pairs)}


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def table(rows: dict[str, dict[str, float]], depths: Depths, depth: int) -> str:
    """The rows as text, with the speed-up over generate and the distance from the floor."""
    base = rows["transformers generate"]["median"]
    lines = [f"{'':24}{'ms/token':>10}{'min':>8}{'max':>8}{'speed-up':>10}{'x floor':>9}"]
    for name, row in rows.items():
        known = next((d for d in depths if name.endswith(f" depth {d}")), depth)
        ratio = row["median"] / rows[f"floor, depth {known}"]["median"]
        lines.append(
            f"{name:24}{row['median']:>10.2f}{row['min']:>8.2f}{row['max']:>8.2f}"
            f"{base / row['median']:>10.2f}{ratio:>9.2f}"
        )
    return "\n".join(lines)


def memory(report: dict[str, Any]) -> str:
    """The time that memory alone would take, as a line."""
    times = ", ".join(f"depth {depth}: {ms:.2f} ms" for depth, ms in report["memory_ms"].items())
    return f"weights read once at {report['bandwidth_gb_s']:.1f} GB/s: {times}"


def main() -> None:
    """Measure, print a table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONTESTANTS, default="smollm2")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--precision", default=None, help="of our weights, such as float16; as loaded if left out")
    parser.add_argument("--compile", action="store_true", help="our steps by inductor; needs a precision")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--depths", type=int, nargs="*", default=None, help="exits to force; the model's if left out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.depths = CONTESTANTS[args.model].depths if args.depths is None else tuple(args.depths)
    report = measured(args)
    print(table(report["ms"], args.depths, report["depth"]))
    print(memory(report))
    print("tokens of full depth that are those of generate: {tokens} of {of}".format(**report["same"]))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model and measure; the report with all that the figures must come with."""
    backbone, prompts = load(args.model, dtype=args.dtype, device=args.device, prompts=args.prompts)
    depths, plain, said = args.depths, copy.deepcopy(backbone), {}
    precision = None
    if args.precision is not None:
        precision = set_precision(backbone, args.precision, compiled=args.compile)
    rate = bandwidth(torch.device(args.device))
    return {
        "environment": environment(args.device, dtype=args.dtype, batch=1, precision=precision),
        "options": {"model": args.model, "prompts": args.prompts, "tokens": args.tokens, "rounds": args.rounds},
        "depth": backbone.spec.depth,
        "bandwidth_gb_s": rate / 1e9,
        "memory_ms": memory_ms(backbone, (*depths, backbone.spec.depth), rate),
        "ms": measure(backbone, prompts, depths, tokens=args.tokens, rounds=args.rounds, plain=plain, said=said),
        "same": same_tokens(said, backbone.spec.depth, args.tokens),
    }


if __name__ == "__main__":
    main()
