"""Heads on disk: ``heads.safetensors`` holds weights and record, ``heads.json`` the record for reading.

Each file is replaced as a whole. The record stands in both, so that a pair that does not belong
together is noticed. Knows how heads are named and built, not what they do.

A registered class goes by its short name, any other by ``module.Class``. Only a name with a dot is
imported, but importing runs the module: a record from somebody else names code, so read it first.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dynamax.errors import UserError
from dynamax.files import write_atomically
from dynamax.heads.base import ExitHead
from dynamax.registry import HEADS
from dynamax.types import Site, Spec

FORMAT = 1
WEIGHTS, RECORD = "heads.safetensors", "heads.json"

Factory = Callable[[Site], ExitHead]


def check_recipe(head: ExitHead) -> None:
    """Refuse a head that could not be built again from JSON, before it is trained.

    Raises:
        UserError: If an option is anything but numbers, strings, booleans, None, and lists or mappings of these.
    """
    for name, value in head.recipe.items():
        try:
            json.dumps(value)
        except TypeError:
            raise UserError(
                f"{type(head).__name__} was given {name}={value!r} of type {type(value).__name__}; saved heads are "
                f"built again from JSON, so options are numbers, strings, booleans, lists, mappings. Pass a name or a "
                f"number, and build the object inside the class."
            ) from None


def record(spec: Spec, heads: Mapping[int, tuple[ExitHead, Sequence[ExitHead]]]) -> dict[str, Any]:
    """What is needed, beside the weights, to build the heads again: for each depth a lens and gates."""
    exits = {str(depth): {"lens": entry(lens), "gates": [*map(entry, gates)]} for depth, (lens, gates) in heads.items()}
    return {"format": FORMAT, "fingerprint": spec.fingerprint, "backbone": asdict(spec), "exits": exits}


def entry(head: ExitHead) -> dict[str, Any]:
    """One head: the name of its class and its options."""
    return {"class": recorded_name(type(head)), "options": head.recipe}


def recorded_name(head: type[ExitHead]) -> str:
    """The short name of a registered class; ``module.Class`` of any other, so that it is found again."""
    name = head.__name__
    return name if name in HEADS.names() and HEADS.get(name) is head else dotted(head)


def dotted(head: type[ExitHead]) -> str:
    """``module.Class``."""
    return f"{head.__module__}.{head.__qualname__}"


def recipes(record: Mapping[str, Any]) -> dict[int, tuple[Factory, list[Factory]]]:
    """Factories of the lens and the gates, by depth.

    Raises:
        UserError: If a class is unknown.
    """
    return {int(d): (factory(e["lens"]), [*map(factory, e["gates"])]) for d, e in record["exits"].items()}


def factory(entry: Mapping[str, Any]) -> Factory:
    """The class of one saved head, with its options.

    A class need not be registered: a name with a dot is imported, which runs its module.

    Raises:
        UserError: If no class of that name is registered or imported, or none can be imported.
    """
    return partial(built, known(entry["class"]), entry["options"])


def known(name: str) -> type[ExitHead]:
    """The class a record names: registered, imported already, or imported now if its name has a dot.

    Raises:
        UserError: If there is none.
    """
    imported = {spelt: head for head in subclasses(ExitHead) for spelt in (head.__name__, dotted(head))}
    if name in imported and name not in HEADS.names():
        return imported[name]
    return fetched(name) if "." in name else HEADS.get(name)


def fetched(name: str) -> type[ExitHead]:
    """The class ``module.Class``, imported now.

    Raises:
        UserError: If it cannot be imported, or is no exit head.
    """
    module = name.rpartition(".")[0]
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"The saved heads use the class {name}, which cannot be imported: {error}. Put the folder that holds "
            f"{module} on PYTHONPATH, or install its package."
        ) from error
    if not (isinstance(found, type) and issubclass(found, ExitHead)):
        raise UserError(f"The saved heads use {name}, which is no exit head. Wanted: a subclass of Lens or Gate.")
    return found


def built(head: type[ExitHead], options: dict[str, Any], site: Site) -> ExitHead:
    """A head from its saved options.

    Raises:
        UserError: If the class no longer takes them.
    """
    try:
        return head(site, **options)
    except TypeError as error:
        raise UserError(
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
        UserError: If a file is missing or damaged, the two differ, the format is another, or the backbone is.
    """
    outer = read_record(folder)
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            inner = json.loads((file.metadata() or {}).get("record", "null"))
            # cloned: a tensor inside the file's map may lie at an address that a kernel treats otherwise
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"The heads in {folder} are damaged: {error}. Copy them again, or run fit again.") from error
    check(folder, inner, outer, spec)
    return outer, tensors


def read_record(folder: Path) -> dict[str, Any]:
    """What is said of the heads in a folder: their backbone, where it comes from, and each head's class and options.

    Raises:
        UserError: If it or the weights are missing, or it is damaged.
    """
    for path in (folder / WEIGHTS, folder / RECORD):
        if not path.is_file():
            raise UserError(
                f"There are no saved heads in {folder}: {path.name} is missing. Wanted: a folder written by fit, with "
                f"{WEIGHTS} and {RECORD}. Give that folder, or run fit."
            )
    try:
        return json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"The heads in {folder} are damaged: {error}. Copy them again, or run fit again.") from error


def check(folder: Path, inner: Any, outer: Any, spec: Spec) -> None:  # noqa: ANN401 - whatever JSON holds
    """Refuse a record that is not ours, not of this pair, or not for this backbone.

    Raises:
        UserError: Naming both sides.
    """
    if inner != outer:
        sides = [side.get("fingerprint") if isinstance(side, dict) else None for side in (inner, outer)]
        raise UserError(
            f"{WEIGHTS} and {RECORD} in {folder} do not belong together (fingerprints {sides[0]} and {sides[1]}): one "
            f"was edited or replaced. Copy both from where they were saved, or run fit again."
        )
    if not isinstance(outer, dict) or outer.get("format") != FORMAT:
        given = outer.get("format") if isinstance(outer, dict) else None
        raise UserError(
            f"The heads in {folder} are of format {given}; this version reads format {FORMAT}. Install the version "
            f"that saved them, or run fit again."
        )
    if outer["fingerprint"] != spec.fingerprint:
        raise UserError(
            f"The heads in {folder} were trained for another backbone: theirs is {outer['backbone']['family']} with "
            f"fingerprint {outer['fingerprint']}, the one given is {spec.family} with fingerprint {spec.fingerprint}. "
            f"Load them with their own backbone, or run fit on this one."
        )
