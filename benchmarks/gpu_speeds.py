"""Decode speed of one model at forced depths: eager, captured, and what memory and bare products would take.

Knows models and depths, no time boxes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import decode
from benchmarks.gpu_graphs import recorder
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.precision import capture_steps
from dynamax.types import Span

ROUNDS = 2
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


def captured(backbone: HFBackbone, prompt_BT: Tensor, depths: Depths, tokens: int) -> Finding:
    """The decoders of ``eager`` with their steps captured: milliseconds a token, and how many tokens are the same.

    Raises:
        UserError: If hidden states differ by more than the order of sums.
    """
    every, batch, record = (*depths, backbone.spec.depth), len(prompt_BT), recorder(prompt_BT.device)

    def tokens_at(depth: int) -> Tensor:
        run = decode.contenders(backbone, depths, tokens)[ours(depth, every[-1])]
        return torch.stack([step.token_B for step in run(prompt_BT)], 1)  # type: ignore[attr-defined]

    wanted = {depth: tokens_at(depth) for depth in {every[0], every[-1]}}
    choice = capture_steps(backbone, depths, recorder=record, lengths=[1], rows=batch)
    spans = backbone.captured
    assert spans is not None, "they were captured"
    try:
        same = min(float((tokens_at(depth) == told).double().mean()) for depth, told in wanted.items())
        rows = decode.measure(backbone, [prompt_BT], depths, tokens=tokens, rounds=ROUNDS, leave_out=GENERATE)
        replays = sum(spans.replays.values())
    finally:
        backbone.captured = None
    return {
        **facts(backbone, prompt_BT, tokens),
        "recorder": type(record).__name__,
        "capacity": spans.capacity,
        "graphs": choice.graphs,
        "capture_seconds": choice.compiling,
        "replays": replays,
        "same_tokens": same,
        "state_bytes": {str(depth): state_bytes(backbone, depth, batch, spans.capacity) for depth in every},
        "ms": {str(depth): rows[ours(depth, every[-1])] for depth in every},
    }


def state_bytes(backbone: HFBackbone, depth: int, batch: int, capacity: int) -> int:
    """Bytes of state that a captured step moves at least: buffered keys read, float32 states read and written."""
    costs = [backbone.block_cost(index) for index in range(depth)]
    size = backbone.output_matrix.element_size()
    return batch * sum(cost.keys * capacity * size + 2 * cost.state * 4 for cost in costs)


@torch.inference_mode()
def chunks(backbone: HFBackbone, prompt_BT: Tensor, tokens: int) -> Finding:
    """Milliseconds of one captured pass over chunks of some positions: what debts cost that ride along."""
    record, top, found = recorder(prompt_BT.device), backbone.spec.depth, {}
    capture_steps(backbone, recorder=record, lengths=CHUNKS)
    for length in CHUNKS:
        cache = backbone.new_cache(prompt_BT.shape[1] + length * (ROUNDS + 1) * (tokens + 1))
        backbone.run(backbone.embed(prompt_BT, cache), Span(0, top), cache)
        chunk_BT = prompt_BT[:, :length]

        def step() -> None:
            backbone.run(backbone.embed(chunk_BT, cache), Span(0, top), cache)  # noqa: B023

        times = []
        for _ in range(ROUNDS + 1):
            step()
            times.append(1000 * decode.seconds(lambda: [step() for _ in range(tokens)]) / tokens)  # noqa: B023
        found[str(length)] = decode.summary(times[1:])
    backbone.captured = None
    return {**facts(backbone, prompt_BT, tokens), "recorder": type(record).__name__, "ms": found}


def ours(depth: int, top: int) -> str:
    """What ``decode.contenders`` calls the library's decoder that always leaves at a depth."""
    return f"dynamax, {'all' if depth == top else 'depth'} {depth}"


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
            mine = slow["ms"][ours(int(depth), int(top))]["median"]
            cells |= {"eager": mine, "products": slow["ms"][f"floor, depth {depth}"]["median"]}
            theirs = slow["ms"].get(GENERATE) if depth == top else None
            cells["generate"] = None if theirs is None else theirs["median"]
        if fast is not None:
            cells |= {"captured": fast["ms"][depth]["median"], "state": fast["state_bytes"][depth] / rate / 1e6}
        shown = "".join(f"{'' if ms is None else f'{ms:.2f}':>9}" for ms in cells.values())
        factor = "" if cells["captured"] is None else f"{cells['captured'] / least:.2f}"
        made.append(f"{name:30}{depth:>6}{shown}{factor:>10}")
    return made
