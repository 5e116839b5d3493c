"""What a measurement was made with and on: model, machine, versions, options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dynamax import __version__
from dynamax.bench.base import Subject
from dynamax.bench.memory import available
from dynamax.bench.outline import Outline
from dynamax.metrics.environment import environment

PEERS = ("economize", "ctranslate2", "llama-cpp-python")


def facts() -> dict[str, Any]:
    """When and where a measurement was made."""
    return {
        "dynamax": __version__,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {
            **environment("cpu", dtype="float32", batch=1),
            "packages": {name: _version(name) for name in PEERS},
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "memory_available_bytes": available(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def model_facts(name: str, subject: Subject, sizes: Outline | None) -> dict[str, Any]:
    """The model, its exits, and when it leaves.

    Args:
        name: What the user called it.
        subject: What contenders decoded with.
        sizes: Of the model; None where they are unknown.
    """
    known = {} if sizes is None else asdict(sizes)
    known.pop("linears", None)
    return {
        "name": name,
        "source": subject.source.recipe,
        "sizes": known or None,
        "end_tokens": list(subject.ends),
        "heads": None if subject.heads is None else str(subject.heads),
        "exits": None if subject.exits is None else sorted(subject.exits),
        "policy": None if subject.policy is None else subject.policy.label,
    }


def title(name: str, sizes: Outline | None) -> str:
    """Of the picture."""
    return f"Decoding {name}" + ("" if sizes is None else f" ({sizes.family}, {sizes.depth} blocks)")


def where(options: Mapping[str, Any], loading: str) -> str:
    """On what and how it was measured, in one line.

    Args:
        options: Of the measurement.
        loading: Whether contenders were in memory together.
    """
    here = environment("cpu", dtype="float32", batch=1)
    prompts, rounds = _count(len(options["prompts"]), "prompt"), _count(options["rounds"], "round")
    asked = f"{prompts}, {rounds}, up to {options['max_new_tokens']} tokens"
    return f"{here['device']} · {_count(here['threads'], 'thread')} · {asked} · loaded {loading}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
