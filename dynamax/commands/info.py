"""``dynamax info``: what a bug report must say."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from dynamax import __version__
from dynamax.device import chosen
from dynamax.errors import UserError
from dynamax.kernels import PACKAGES, backend
from dynamax.metrics.environment import environment

POSITIONS = 512
"""Positions that precisions are compared on: about a minute for a model of 135 million weights."""


def main(arguments: Sequence[str]) -> None:
    """Print versions, device and kernels; with --precision, what each precision gives and costs."""
    given = list(arguments[1:])
    if given[:1] == ["--precision"] and len(given) <= 2:
        precision(*given[1:])
        return
    if given:
        raise UserError(
            f"dynamax info was given {' '.join(given)}; wanted: nothing, or --precision [MODEL], where MODEL is what "
            f"dynamax.load takes, SmolLM2 if left out."
        )
    device = chosen("auto")
    facts = {"dynamax": __version__, **environment(device, dtype="float32", batch=1)}
    for name in ("dtype", "precision", "weights", "batch"):
        facts.pop(name)
    for package in PACKAGES:
        used = f"installed; {backend(package, device).replace('torch', 'plain PyTorch')} runs on {device}"
        facts[package] = used if find_spec(package) else "not installed; plain PyTorch is used"
    for name, value in facts.items():
        print(f"{name:<14}{value}")
    print("\nNames of exit heads, policies and all other parts, with the packages they come from: dynamax list")
    print("Speed and quality of each precision of weights on this machine: dynamax info --precision [MODEL]")


def precision(model: str = "SmolLM2") -> None:
    """Compare every precision of a model's weights on the texts that come with the project."""
    from dynamax.bench.quality import passages, qualities, table  # with the model, which versions need not
    from dynamax.engine import load

    print(f"Loading {model}", flush=True)
    engine = load(model, device="cpu")
    print(f"Reading {POSITIONS} positions in each precision", flush=True)
    print(table(list(qualities(engine, passages(), POSITIONS))))
