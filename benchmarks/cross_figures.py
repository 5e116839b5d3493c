"""The figures of one backbone: its exits, each gate at equal thresholds and at equal consistency, the controls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cross_readings import Ledger, Readings, always, first, oracle
from dynamax.backbones.base import Backbone
from dynamax.heads.bank import ExitBank
from dynamax.metrics.exits import auroc
from dynamax.testing import toy_evidence
from dynamax.types import Memory

THRESHOLDS = (0.5, 0.7, 0.8, 0.9)
CONSISTENCIES = (0.99, 0.98, 0.95, 0.90)
ACCOUNTING = 2
"""Which costs are counted, and how: raised when that changes, so that older parts are measured again. 2: gates are
charged for their memory."""
NEVER = 2.0
"""A threshold that no confidence reaches; 1 would be reached by one that float32 rounds to 1."""
POINTS = 12
"""Points of a gate's curve, evenly spread over the share of positions that leave early."""
CANDIDATES = 512
"""Thresholds tried for a consistency: quantiles of the confidences themselves."""
HELD = 64
"""Positions a gate has read before it is timed."""
NOTES = (
    "Read off the full model's own text: held-out documents, every position after the first of the answer; state is "
    "exact. Tokens kept: share of them that are the full model's. Blocks, FLOPs and bytes: share of the full model's, "
    "all gates asked, lenses and output matrix included.",
    "Equal thresholds and the picture: all held-out documents. Equal consistency: one threshold for all exits, the "
    "lowest that reached it on the documents of every other held-out prompt; all figures are of the other half.",
    "Always leaving at the same mean depth: part of the documents at the nearest exit below, the others at the nearest "
    "above. Oracle: the least mean depth that any gate could reach with these lenses; no gate is charged.",
    "Parameters: of one exit. ms: median time of one step of one gate with its state, 64 positions before it.",
    "Siblings: most held-out prompts are held out from the gates only; the backbones themselves were trained on "
    "SmolLM2's answers to the same questions.",
)

Row = dict[str, Any]


def measure(readings: Readings, backbone: Backbone, bank: ExitBank) -> dict[str, Any]:
    """Everything that tables and pictures of a backbone show."""
    choosing, reporting = readings.halves()
    plain = Ledger(backbone, bank, None)
    steady, steady_half = fixed(readings, plain), fixed(reporting, plain)
    times = head_ms(bank, backbone.spec.width)
    gates = {}
    for name, said_EN in readings.confidence.items():
        ledger, heads = Ledger(backbone, bank, name), [bank.gates(depth)[name] for depth in bank.depths]
        levels = [choose(choosing, name, wanted) for wanted in CONSISTENCIES]
        gates[name] = {
            "parameters": sum(p.numel() for p in heads[0].parameters()),
            "flops": heads[0].flops(),
            "ms": times[name],
            "auroc": [_number(auroc(*pair)) for pair in zip(said_EN, readings.right_EN, strict=True)],
            "equal_thresholds": [at(readings, name, level, ledger, steady) for level in THRESHOLDS],
            "equal_consistency": [
                {"wanted": wanted, **at(reporting, name, level, ledger, steady_half)}
                for wanted, level in zip(CONSISTENCIES, levels, strict=True)
            ],
            "curve": [at(readings, name, level, ledger, steady) for level in spread(readings, name)],
        }
    return {
        "depth": readings.total,
        "exits": list(readings.depths),
        "documents": len(readings.document_N.unique()),
        "positions": {"all": len(readings.document_N), "reporting": len(reporting.document_N)},
        "lens_agreement": readings.right_EN.float().mean(1).tolist(),
        "gates": gates,
        "always": steady,
        "oracle": [{"wanted": c, **figures(reporting, oracle(reporting, c), plain)} for c in CONSISTENCIES],
        "oracle_curve": [figures(readings, oracle(readings, c), plain) for c in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)],
    }


def figures(readings: Readings, stop_N: Tensor, ledger: Ledger) -> Row:
    """Agreement and cost where positions stop at ``stop_N``."""
    spent, full = ledger.charge(readings, stop_N)
    blocks = float(readings.depth(stop_N).double().mean())
    return {
        "agreement": float(readings.agreed(stop_N).double().mean()),
        "mean_depth": blocks,
        "blocks": blocks / readings.total,
        "flops": spent.flops / full.flops,
        "bytes": spent.bytes / full.bytes,
    }


def at(readings: Readings, gate: str, threshold: float, ledger: Ledger, steady: Sequence[Row]) -> Row:
    """A gate at a threshold, and what always leaving does at the same mean depth."""
    row = figures(readings, first(readings.confidence[gate] >= threshold), ledger)
    return {"threshold": threshold, **row, "same_depth": mixed(steady, row["mean_depth"])}


# -- thresholds ------------------------------------------------------------------------------------


def choose(readings: Readings, gate: str, wanted: float) -> float:
    """The lowest threshold at which a gate is consistent enough; ``NEVER`` if none is."""
    for level in levels(readings.confidence[gate], CANDIDATES):
        if float(readings.agreed(first(readings.confidence[gate] >= level)).double().mean()) >= wanted:
            return level
    return NEVER


def spread(readings: Readings, gate: str) -> list[float]:
    """Thresholds at which evenly growing shares of the positions leave at none of the exits."""
    return levels(readings.confidence[gate].amax(0), POINTS)


def levels(said: Tensor, count: int) -> list[float]:
    """Evenly spaced quantiles, ascending, without repeats."""
    ordered_N = said.flatten().sort().values
    places = torch.linspace(0, len(ordered_N) - 1, count).long()
    return ordered_N[places].unique().tolist()


# -- controls --------------------------------------------------------------------------------------


def fixed(readings: Readings, ledger: Ledger) -> list[Row]:
    """Always leaving at each exit, and never."""
    return [figures(readings, always(readings, exit_), ledger) for exit_ in range(len(readings.depths) + 1)]


def mixed(steady: Sequence[Row], depth: float) -> Row:
    """Part of the documents at the nearest exit below a depth, the others at the nearest above."""
    above = next(place for place, row in enumerate(steady) if row["mean_depth"] >= depth - 1e-9)
    high, low = steady[above], steady[max(above - 1, 0)]
    wide = high["mean_depth"] - low["mean_depth"]
    part = (high["mean_depth"] - depth) / wide if wide else 0.0
    return {name: (1 - part) * high[name] + part * low[name] for name in ("agreement", "blocks", "flops", "bytes")}


# -- time ------------------------------------------------------------------------------------------


@torch.inference_mode()
def head_ms(bank: ExitBank, width: int, *, rounds: int = 300) -> dict[str, float]:
    """Milliseconds of one step of each gate of the deepest exit, in turn: the median."""
    gates = bank.gates(bank.depths[-1])
    past, now = (toy_evidence(torch.randn(1, length, width), recurrent=True) for length in (HELD, 1))
    memories = {name: Memory() for name in gates}
    for name, gate in gates.items():
        gate.score(past, memories[name])
        memories[name].read = HELD
    times: dict[str, list[float]] = {name: [] for name in gates}
    for _ in range(rounds):
        for name, gate in gates.items():
            memory = memories[name].copy()
            start = time.perf_counter()
            gate.score(now, memory)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(spent) for name, spent in times.items()}


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)
