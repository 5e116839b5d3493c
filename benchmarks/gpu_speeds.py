"""Decode speed of one model at forced depths: eager, captured, and what memory and bare products would take.

Knows models and depths, no time boxes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import decode
from benchmarks.gpu_graphs import CapturedDecoder, distance, recorder
from dynamax.backbones.cache import Cache
from dynamax.backbones.hf import HFBackbone
from dynamax.errors import UserError
from dynamax.types import Span

ROUNDS = 2
CHECKED = 3
"""Steps over which captured and eager hidden states are compared."""
BOUNDS = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-3, torch.float64: 1e-9}
"""Relative distance of hidden states that the order of sums may make; attention with a mask takes another kernel."""
CHUNKS = (1, 2, 4, 8)
GENERATE = "transformers generate"

Depths = tuple[int, ...]
Finding = dict[str, Any]


def facts(backbone: HFBackbone, prompt_BT: Tensor, tokens: int) -> Finding:
    """What the figures of one measurement come with."""
    weight = backbone.output_matrix
    parameters = sum(p.numel() for p in backbone.model.parameters())
    return {
        "family": backbone.spec.family,
        "depth": backbone.spec.depth,
        "width": backbone.spec.width,
        "vocabulary": backbone.spec.vocab,
        "parameters": parameters,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "batch": prompt_BT.shape[0],
        "prompt": prompt_BT.shape[1],
        "tokens": tokens,
    }


def eager(backbone: HFBackbone, prompt_BT: Tensor, depths: Depths, tokens: int) -> Finding:
    """The library's decoders beside transformers' generate, and bare products: milliseconds a token of every row.

    Without its kernels, Mamba-2 of some versions of transformers needs 4 GB a row for a prompt of Codestral, so batches
    of recurrent models go without ``generate``.
    """
    recurrent = any("recurrent" in backbone.state_kinds(index) for index in range(backbone.spec.depth))
    leave_out = GENERATE if recurrent and len(prompt_BT) > 1 else ""
    rows = decode.measure(backbone, [prompt_BT], depths, tokens=tokens, rounds=ROUNDS, leave_out=leave_out)
    return {**facts(backbone, prompt_BT, tokens), "left_out": leave_out, "ms": rows}


@torch.inference_mode()
def captured(backbone: HFBackbone, prompt_BT: Tensor, depths: Depths, tokens: int) -> Finding:
    """Captured spans, checked against ``Backbone.run`` and against plain calls of the same function.

    Raises:
        UserError: If hidden states differ by more than the order of sums.
    """
    record = recorder(prompt_BT.device)
    every, capacity = (*depths, backbone.spec.depth), room(prompt_BT.shape[1] + 2 * tokens)
    cache, token_B1 = prefilled(backbone, prompt_BT)
    decoder = CapturedDecoder(backbone, cache, token_B1, every, capacity=capacity, record=record)
    apart = max(from_run(backbone, decoder, prompt_BT, depth) for depth in (every[0], every[-1]))
    same = all(repeats(decoder, cache, token_B1, depth) for depth in every)
    times: dict[int, list[float]] = {depth: [] for depth in every}
    for _ in range(ROUNDS + 1):
        for depth in every:
            decoder.load(cache, token_B1)
            decoder.step(depth)  # the first is a warm-up
            spent = decode.seconds(lambda: [decoder.step(depth) for _ in range(tokens)])  # noqa: B023
            times[depth].append(1000 * spent / tokens)
    return {
        **facts(backbone, prompt_BT, tokens),
        "recorder": type(record).__name__,
        "capacity": capacity,
        "distance_from_run": apart,
        "equals_plain_calls": same,
        "state_bytes": {str(depth): decoder.state_bytes(depth) for depth in every},
        "ms": {str(depth): decode.summary(found[1:]) for depth, found in times.items()},
    }


def from_run(backbone: HFBackbone, decoder: CapturedDecoder, prompt_BT: Tensor, depth: int) -> float:
    """How far hidden states are from those of ``Backbone.run``; refuses (UserError) what is more than rounding."""
    cache, token_B1 = prefilled(backbone, prompt_BT)
    decoder.load(cache, token_B1)
    found, bound = distance(decoder, cache, depth, CHECKED), BOUNDS[backbone.output_matrix.dtype]
    if not found <= bound:
        raise UserError(
            f"Captured hidden states at depth {depth} differ by {found:.2g} from Backbone.run; {bound} is allowed."
        )
    return found


def repeats(decoder: CapturedDecoder, cache: Cache, token_B1: Tensor, depth: int) -> bool:
    """Whether some captured steps give the bits of plain calls."""
    found = []
    for step in (decoder.step, decoder.step_plainly):
        decoder.load(cache, token_B1)
        for _ in range(CHECKED):
            step(depth)
        found.append((decoder.hidden[depth].clone(), decoder.token_BT.clone()))
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.inference_mode()
def chunks(backbone: HFBackbone, prompt_BT: Tensor, tokens: int) -> Finding:
    """Milliseconds of one captured pass over chunks of some positions: what debts cost that ride along."""
    record, top = recorder(prompt_BT.device), backbone.spec.depth
    cache, token_B1 = prefilled(backbone, prompt_BT)
    found = {}
    for rows in CHUNKS:
        capacity = room(prompt_BT.shape[1] + rows * (tokens + 1))
        decoder = CapturedDecoder(backbone, cache, token_B1, [top], capacity=capacity, record=record, rows=rows)
        from_run(backbone, decoder, prompt_BT, top)
        times = []
        for _ in range(ROUNDS + 1):
            decoder.load(cache, token_B1)
            decoder.step(top)
            spent = decode.seconds(lambda: [decoder.step(top) for _ in range(tokens)])  # noqa: B023
            times.append(1000 * spent / tokens)
        found[str(rows)] = decode.summary(times[1:])
    return {**facts(backbone, prompt_BT, tokens), "recorder": type(record).__name__, "ms": found}


def prefilled(backbone: HFBackbone, prompt_BT: Tensor) -> tuple[Cache, Tensor]:
    """The state after a prompt, and the token that follows."""
    cache = backbone.new_cache(prompt_BT.shape[1])
    h_BTD = backbone.run(backbone.embed(prompt_BT, cache), Span(0, backbone.spec.depth), cache)
    return cache, backbone.unembed(h_BTD[:, -1:]).argmax(-1)


def room(positions: int) -> int:
    """Positions rounded up to what attention kernels like."""
    return -(-positions // 64) * 64


COLUMNS = ("generate", "eager", "captured", "products", "weights", "state")
HEAD = f"{'ms a token':30}{'depth':>6}{''.join(f'{name:>9}' for name in COLUMNS)}{'x weights':>10}"
"""``weights``: read once, at the rate at which memory copies; ``state``: moved besides; the factor is of captured."""


def lines(
    name: str, slow: Finding | None, fast: Finding | None, rate: float, weights_ms: dict[str, float]
) -> list[str]:
    """Rows of the table, one for each depth.

    Args:
        name: Model and batch.
        slow: What ``eager`` found; None if it failed.
        fast: What ``captured`` found, likewise.
        rate: GB a second that memory moves.
        weights_ms: For each depth the time in which its weights are read.
    """
    made, top = [], list(weights_ms)[-1]
    for depth, least in weights_ms.items():
        cells: dict[str, float | None] = dict.fromkeys(COLUMNS)
        cells["weights"] = least
        if slow is not None:
            ours = f"dynamax, {'all' if depth == top else 'depth'} {depth}"
            cells |= {"eager": slow["ms"][ours]["median"], "products": slow["ms"][f"floor, depth {depth}"]["median"]}
            theirs = slow["ms"].get(GENERATE) if depth == top else None
            cells["generate"] = None if theirs is None else theirs["median"]
        if fast is not None:
            cells |= {"captured": fast["ms"][depth]["median"], "state": fast["state_bytes"][depth] / rate / 1e6}
        shown = "".join(f"{'' if ms is None else f'{ms:.2f}':>9}" for ms in cells.values())
        factor = "" if cells["captured"] is None else f"{cells['captured'] / least:.2f}"
        made.append(f"{name:30}{depth:>6}{shown}{factor:>10}")
    return made
