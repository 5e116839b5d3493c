"""Reports and folders of runs, made by hand; every figure in them is another number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LINE = "dynamax test -c a.yaml --model.heads 'my heads'"
FITTED = """epoch,step,val/agreement/2,val/agreement/4,val/auroc/2/LinearGate,val/auroc/4/LinearGate
0,9,,,,
0,9,0.1112,0.2223,0.5115,0.5226
1,19,0.3137,0.4148,0.6159,0.7161
1,20,,,,
"""
CALIBRATED = """# share of tokens unlike the full model's: at most 12.5% with probability 90% (ltt, 77 documents)
# dynamax calibrate runs/a --epsilon 0.125
policy: {class_path: MaxProb, init_args: {threshold: 0.9}}
promise: {level: document, epsilon: 0.125, delta: 0.1, method: ltt, documents: 77, tokens: 900, loss: 0.0871,
  blocks: 4.4, data: aa, model: bb, reason: null}
"""


def row(policy: str, threshold: Any, **figures: Any) -> dict[str, Any]:  # noqa: ANN401 - any figure
    names = ("agreement", "drafts_kept", "answer_agreement", "blocks_per_token", "flops_fraction", "bytes_fraction")
    empty = dict.fromkeys((*names, "ms_per_token", "speed_up", "score"))
    usual = {"scores": {}, "tokens": 90, "timed_tokens": 31, "depth_counts": {"2": 31, "6": 59}, "promise": None}
    return {"policy": policy, "threshold": threshold, **empty, **usual, **figures}


def report(**changed: Any) -> dict[str, Any]:  # noqa: ANN401 - any part of a report
    promise = CALIBRATED.splitlines()[0][2:]
    kept = {"promise": promise, "epsilon": 0.125, "loss": 0.0533, "documents": 3, "tokens": 90}
    full = {"agreement": 1.0, "blocks_per_token": 6.0, "flops_fraction": 1.0, "bytes_fraction": 1.0, "speed_up": 1.0}
    first = {
        "agreement": 0.8123,
        "flops_fraction": 0.7345,
        "bytes_fraction": 0.6456,
        "speed_up": 1.2567,
        "score": 0.3171,
    }
    first |= {"blocks_per_token": 4.6289, "ms_per_token": 8.1492, "answer_agreement": 0.37}
    bound = {"blocks_per_token": 3.2194, "flops_fraction": 0.5432, "bytes_fraction": 0.4321}
    bins = [{"tokens": 0, "score": None, "right": None}] * 8
    bins += [{"tokens": 30, "score": 0.85, "right": 0.6}, {"tokens": 60, "score": 0.95, "right": 0.9}]
    given = [{"policy": "Full", "threshold": None, "tokens": ["Pa", "ris", "."], "depths": [6, 6, 6]}]
    given.append({"policy": "MaxProb", "threshold": 0.5, "tokens": ["Pa", "ris", ""], "depths": [6, 2, 4]})
    head = {"name": "TunedLens", "params": 10, "flops": 20}
    exits = [
        {"depth": depth, "agreement": share, "gate_auroc": {"LinearGate": area}, "latency_ms": {"p50": 1.0, "p95": 2.0}}
        | {"lens": head, "gates": [head]}
        for depth, share, area in ((2, 0.4411, 0.8172), (4, 0.5522, 0.9183))
    ]
    return {
        "task": {"name": "Questions", "headline": "accuracy", "examples": 3},
        "backbone": {"family": "llama", "depth": 6, "width": 32, "vocab": 257, "context": 64, "fingerprint": "f00d"},
        "decoding": {"decoder": "EarlyExit", "lossless": False, "options": {"skipped_state": "Exact"}}
        | {"sampler": {"name": "Greedy"}, "chat": True, "heads": "runs/a/heads"},
        "environment": {"device": "a machine", "threads": 2, "dtype": "float32", "cuda": None, "torch": "2.99.1"},
        "exits": exits,
        "frontier": [
            row("Full", None, ms_per_token=10.2413, score=0.4142, depth_counts={"6": 90}, **full),
            row("MaxProb", 0.5, **first),
            row("OnlyAt(MaxProb, 2)", {"2": 0.625}, promise=kept, agreement=0.9467, blocks_per_token=5.5),
        ],
        "bounds": [
            row("Oracle", None, agreement=1.0, **bound),
            row("AtDepth", 2, agreement=0.4244, blocks_per_token=2.0, flops_fraction=0.3535, speed_up=2.8282),
        ],
        "reliability": [{"policy": "MaxProb", "depth": 2, "tokens": 90, "ece": 0.1167, "brier": 0.2345, "bins": bins}],
        "answers": [{"id": "q7", "prompt": "What is the capital of France?", "given": given}],
        "command": LINE,
        "schema_version": 3,
        **changed,
    }


def run_folder(folder: Path, content: dict[str, Any] | None = None) -> Path:
    """A folder as ``test``, ``fit`` and ``calibrate`` leave it."""
    log = folder / "fit" / "version_0"
    log.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report() if content is None else content))
    (log / "metrics.csv").write_text(FITTED)
    (log / "config.yaml").write_text("seed_everything: 0\n")
    (folder / "calibrated.yaml").write_text(CALIBRATED)
    return folder
