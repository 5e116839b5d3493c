"""Greedy tokens from an int8 copy of the output matrix, certified to be those of the whole product.

    python -m benchmarks.certified [--precision float16] [--prompts 100] [--tokens 64] [--timed 10] [--threads N]
                                   [--out FILE]

SmolLM2 answers questions that come with the project, through its chat template, always so many tokens. At every step
the whole product says the token and the certified reading is compared with it. Of the first prompts both are timed,
and the product in other formats beside them. The blocks run in between, so that matrices come from memory.

How a reading is certified. The matrix is held as codes of eight bits with a scale for each row; ``e_v`` bounds what row
``v`` lost. The state ``u`` is split into two rows of whole numbers, so that FBGEMM's product of int8 is exact but for
one rounding. By Cauchy-Schwarz the true logit lies within ``|u| e_v`` of what it says. Tokens whose upper bound reaches
the best lower bound are scored again with their own rows, in float64. The best of them is the answer if it leads by
more than the whole product's rounding could turn; else the whole product is asked.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.data.generated import questions
from dynamax.engine import Engine, load
from dynamax.errors import UserError
from dynamax.kernels.products import BFloat16, Columns, Float16, Int8, Product, Rows
from dynamax.metrics.environment import environment
from dynamax.types import Span

MOST = 512
"""Candidates beyond which the whole product is asked."""
ROUNDING = 2.0**-24
"""Largest relative error of one float32 operation."""


class Certified:
    """Reads the most likely token of one state.

    Args:
        product: The output matrix as the model multiplies with it, in float32 sums.

    Raises:
        UserError: If this machine's product of int8 is not exact.
    """

    def __init__(self, product: Product) -> None:
        self._product, weight_VD = product, product.dense()
        size, width = weight_VD.shape
        self._levels = next((levels for levels in (127, 63) if exact(levels)), 0)
        if not self._levels:
            raise UserError("The product of int8 is not exact on this machine. Read the whole matrix.")
        scale_V = weight_VD.abs().amax(1).clamp_min(1e-12) / 127
        codes_VD = (weight_VD / scale_V[:, None]).round().clamp_(-127, 127)
        lost_V = (weight_VD.double() - scale_V.double()[:, None] * codes_VD.double()).norm(dim=1)
        length_V = weight_VD.double().norm(dim=1)
        # The state's split loses at most half a step of its second row in each channel. A sum of `width` products in
        # float32 loses at most `sum_error` of the sum of their absolute values.
        self._sum_error = 1.01 * width * ROUNDING
        split = 1.01 * width**0.5 / (4 * self._levels**2)
        self._error_V = (1.01 * lost_V + (split + 3 * self._sum_error) * length_V).float()
        self._packed, self._rows_2P = pack_int8(codes_VD, scale_V), padded(torch.zeros(2, width), self._levels)

    def __call__(self, u_D: Tensor) -> tuple[int, int]:
        """The token, and how many candidates there were; 0 if the whole product was asked."""
        scale = self._levels / float(u_D.abs().amax())
        coarse_D, fine_D = self._rows_2P[:, : len(u_D)]
        scaled_D = u_D * scale
        torch.round(scaled_D, out=coarse_D)
        torch.sub(scaled_D, coarse_D, out=fine_D).mul_(2 * self._levels).round_()
        high_V, low_V = torch.ops.quantized.linear_dynamic(self._rows_2P, self._packed, self._levels < 127)
        score_V = high_V.add_(low_V, alpha=0.5 / self._levels)
        reach, best = scale * float(u_D.norm()), int(score_V.argmax())
        least = float(score_V[best]) - reach * float(self._error_V[best])
        chosen_C = score_V.add_(self._error_V, alpha=reach).ge(least).nonzero()[:, 0]
        if len(chosen_C) == 1:
            return best, 1
        if len(chosen_C) <= MOST:
            rows_CD, wide_D = self._product.rows(chosen_C).double(), u_D.double()
            (first, second), at = (rows_CD @ wide_D).topk(2)
            if first - second > 2 * self._sum_error * (rows_CD.abs_() @ wide_D.abs_()).amax():
                return int(chosen_C[at[0]]), len(chosen_C)
        return int(self._product(u_D[None]).argmax()), 0


def pack_int8(codes_VD: Tensor, scale_V: Tensor) -> Any:  # noqa: ANN401 - FBGEMM's object
    """Codes as FBGEMM takes them, with 16 columns of zeros for those of ``padded``."""
    padded_VD = F.pad(codes_VD * scale_V[:, None], (0, 16))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # deprecated, without another in its place
        zeros_V = torch.zeros(len(scale_V), dtype=torch.long)
        held = torch.quantize_per_channel(padded_VD, scale_V.double(), zeros_V, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(held, None)


def padded(rows_ND: Tensor, levels: int) -> Tensor:
    """Rows of whole numbers in ``[-levels, levels]`` behind which two more stand, for FBGEMM.

    It takes a step from the least and the greatest number; these make the step 1.
    """
    ends = rows_ND.new_tensor([[-levels - 1.0, float(levels)] + [0.0] * 14])
    return torch.cat([rows_ND, ends.expand(len(rows_ND), -1)], 1)


def exact(levels: int) -> bool:
    """Whether products of the largest numbers come out right; without VNNI they overflow at 127."""
    rows_ND = torch.full((2, 576), float(levels))
    rows_ND[1, ::2] = -levels
    codes_VD = torch.full((64, 576), 127.0)
    codes_VD[1::2, ::2] = -127
    packed = pack_int8(codes_VD, torch.ones(64))
    found_NV = torch.ops.quantized.linear_dynamic(padded(rows_ND, levels), packed, levels < 127)
    return torch.equal(found_NV, rows_ND @ codes_VD.t())


@torch.inference_mode()
def measured(engine: Engine, prompts: list[str], tokens: int, timed: int) -> dict[str, Any]:
    """Tokens compared at every step; milliseconds of the steps of the first ``timed`` prompts."""
    backbone: Any = engine.backbone
    product: Product = backbone.model.get_output_embeddings()
    reading, span, dense_VD = Certified(product), Span(0, backbone.spec.depth), product.dense()
    others = {f"whole, {kind.__name__}": kind(dense_VD) for kind in (Rows, Columns, Float16, BFloat16, Int8)}
    times: dict[str, list[float]] = {name: [] for name in ("blocks", *others, "certified")}
    found: Counter[str] = Counter()
    candidates: list[int] = []
    for number, prompt in enumerate(prompts):
        cache, token_1T = backbone.new_cache(), engine.encode(prompt).reshape(1, -1)
        for _ in range(tokens):
            begin = time.perf_counter()
            u_D = backbone.normalize(backbone.run(backbone.embed(token_1T, cache), span, cache)[:, -1])[0]
            spent = {"blocks": time.perf_counter() - begin}
            for name, other in others.items() if number < timed else ():
                begin = time.perf_counter()
                other(u_D[None]).argmax()
                spent[name] = time.perf_counter() - begin
            begin = time.perf_counter()
            said, count = reading(u_D)
            spent["certified"] = time.perf_counter() - begin
            token_1T = product(u_D[None]).argmax(-1, keepdim=True)
            found.update(steps=1, equal=said == int(token_1T), asked=not count)
            candidates += [count] if count else []
            if number < timed:
                for name, value in spent.items():
                    times[name].append(1000 * value)
    candidates.sort()
    share = {f"p{p}": candidates[len(candidates) * p // 100] for p in (50, 90, 99)}
    return {
        "tokens": dict(found),
        "candidates": {**share, "most": candidates[-1]},
        "ms": {name: statistics.median(each) for name, each in times.items() if each},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("float32", "float16"), default="float16")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--timed", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = load("SmolLM2", precision=args.precision, device="cpu")
    prompts = [each.question for each in random.Random(1).sample(questions(), args.prompts)]
    found = measured(engine, prompts, args.tokens, args.timed)
    print(json.dumps(found, indent=1))
    if args.out is not None:
        known = environment("cpu", dtype="float32", batch=1, precision=engine.precision)
        options = {name: getattr(args, name) for name in ("precision", "prompts", "tokens", "timed")}
        args.out.write_text(json.dumps({"environment": known, "options": options, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
