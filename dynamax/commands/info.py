"""``dynamax info``: what a bug report must say."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from dynamax import __version__
from dynamax.device import chosen
from dynamax.kernels import PACKAGES, backend
from dynamax.metrics.environment import environment


def main(arguments: Sequence[str]) -> None:
    """Print versions, device and kernels."""
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
