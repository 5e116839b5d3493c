"""Heads on disk: ``heads.safetensors`` holds weights and record, ``heads.json`` the record for reading.

Each file is replaced as a whole. The record stands in both, so that a pair that does not belong
together is noticed. Knows how heads are named and built, not what they do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dynamax.atomic import write_atomically
from dynamax.heads.base import ExitHead
from dynamax.registry import HEADS
from dynamax.types import Site, Spec

FORMAT = 1
WEIGHTS, RECORD = "heads.safetensors", "heads.json"

Factory = Callable[[Site], ExitHead]


def check_recipe(head: ExitHead) -> None:
    """Refuse a head that could not be built again from JSON, before it is trained.

    Raises:
        ValueError: If an option is anything but numbers, strings, booleans, None, and lists or mappings of these.
    """
    for name, value in head.recipe.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(
                f"{type(head).__name__} was given {name}={value!r} of type {type(value).__name__}; saved heads are "
                f"built again from JSON, so options are numbers, strings, booleans, lists, mappings. Pass a name or a "
                f"number, and build the object inside the class."
            ) from None


def record(spec: Spec, heads: Mapping[int, tuple[ExitHead, Sequence[ExitHead]]]) -> dict[str, Any]:
    """What is needed, beside the weights, to build the heads again: for each depth a lens and gates."""
    exits = {str(depth): {"lens": entry(lens), "gates": [*map(entry, gates)]} for depth, (lens, gates) in heads.items()}
    return {"format": FORMAT, "fingerprint": spec.fingerprint, "backbone": asdict(spec), "exits": exits}


def entry(head: ExitHead) -> dict[str, Any]:
    """One head: its class name and options."""
    return {"class": type(head).__name__, "options": head.recipe}


def recipes(record: Mapping[str, Any]) -> dict[int, tuple[Factory, list[Factory]]]:
    """Factories of the lens and the gates, by depth.

    Raises:
        ValueError: If a class is unknown.
    """
    return {int(d): (factory(e["lens"]), [*map(factory, e["gates"])]) for d, e in record["exits"].items()}


def factory(entry: Mapping[str, Any]) -> Factory:
    """The class of one saved head, with its options.

    A class need not be registered if it has been imported: short names in YAML work the same way.

    Raises:
        ValueError: If no class of that name is registered or imported.
    """
    name = entry["class"]
    imported = {head.__name__: head for head in subclasses(ExitHead)}
    head = imported[name] if name in imported and name not in HEADS.points() else HEADS.get(name)
    return partial(built, head, entry["options"])


def built(head: type[ExitHead], options: dict[str, Any], site: Site) -> ExitHead:
    """A head from its saved options.

    Raises:
        ValueError: If the class no longer takes them.
    """
    try:
        return head(site, **options)
    except TypeError as error:
        raise ValueError(
            f"A saved {head.__name__} at depth {site.depth} cannot be built from its options {options}: {error}. "
            f"The class has changed since. Train it again, or install the version that saved it."
        ) from error


def subclasses(head: type[ExitHead]) -> list[type[ExitHead]]:
    """All imported classes below ``head``, oldest first on each level."""
    below = head.__subclasses__()
    return [*below, *(deeper for child in below for deeper in subclasses(child))]


def write(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS, safetensors.torch.save(own, {"record": text}))
    write_atomically(folder / RECORD, text.encode())


def read(folder: Path, spec: Spec) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the weights, if they belong to this backbone.

    Raises:
        ValueError: If a file is missing or damaged, the two differ, the format is another, or the backbone is.
    """
    for path in (folder / WEIGHTS, folder / RECORD):
        if not path.is_file():
            raise ValueError(
                f"There are no saved heads in {folder}: {path.name} is missing. Wanted: a folder written by fit, with "
                f"{WEIGHTS} and {RECORD}. Give that folder, or run fit."
            )
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            inner = json.loads((file.metadata() or {}).get("record", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        outer = json.loads((folder / RECORD).read_text())
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"The heads in {folder} are damaged: {error}. Copy them again, or run fit again.") from error
    check(folder, inner, outer, spec)
    return outer, tensors


def check(folder: Path, inner: Any, outer: Any, spec: Spec) -> None:  # noqa: ANN401 - whatever JSON holds
    """Refuse a record that is not ours, not of this pair, or not for this backbone.

    Raises:
        ValueError: Naming both sides.
    """
    if inner != outer:
        sides = [side.get("fingerprint") if isinstance(side, dict) else None for side in (inner, outer)]
        raise ValueError(
            f"{WEIGHTS} and {RECORD} in {folder} do not belong together (fingerprints {sides[0]} and {sides[1]}): one "
            f"was edited or replaced. Copy both from where they were saved, or run fit again."
        )
    if not isinstance(outer, dict) or outer.get("format") != FORMAT:
        given = outer.get("format") if isinstance(outer, dict) else None
        raise ValueError(
            f"The heads in {folder} are of format {given}; this version reads format {FORMAT}. Install the version "
            f"that saved them, or run fit again."
        )
    if outer["fingerprint"] != spec.fingerprint:
        raise ValueError(
            f"The heads in {folder} were trained for another backbone: theirs is {outer['backbone']['family']} with "
            f"fingerprint {outer['fingerprint']}, the one given is {spec.family} with fingerprint {spec.fingerprint}. "
            f"Load them with their own backbone, or run fit on this one."
        )
