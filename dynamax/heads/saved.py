"""Heads on disk: ``heads.safetensors`` holds weights and record, ``heads.json`` the record for reading.

Each file is replaced as a whole. The record stands in both, so that a pair that does not belong
together is noticed. Knows how heads are named and built, not what they do.

A registered class is recorded by its short name, any other as ``module.Class``. Only a name with a dot is
imported, but importing runs the module: a record from somebody else names code, so read it first.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dynamax.errors import UserError
from dynamax.files import read_mapping, write_atomically
from dynamax.heads.base import ExitHead
from dynamax.heads.inputs import GateInput
from dynamax.registry import GATE_INPUTS, HEADS
from dynamax.types import Site, Spec

FORMAT = 1
WEIGHTS, RECORD = "heads.safetensors", "heads.json"


def recorded(part: ExitHead | GateInput) -> dict[str, Any]:
    """Class and options of a head or of a gate's input, as JSON values; inputs among the options are parts too."""
    options = {name: _plain(value) for name, value in part.recipe.items()}
    return {"class": recorded_name(type(part)), "options": options}


def _plain(value: object) -> object:
    if isinstance(value, GateInput):
        return recorded(value)
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def recorded_name(part: type) -> str:
    """The short name of a registered class; ``module.Class`` of any other, so that it is found again."""
    registry = HEADS if issubclass(part, ExitHead) else GATE_INPUTS
    name = part.__name__
    return name if name in registry.names() and registry.get(name) is part else f"{part.__module__}.{part.__qualname__}"


def recorded_class(name: str, base: type[ExitHead] | type[GateInput] = ExitHead) -> Any:  # noqa: ANN401 - a class
    """The class that a record names: registered, imported already, or imported now if its name has a dot.

    A UserError if there is none, it cannot be imported, or it is not of the kind.
    """
    registry = HEADS if base is ExitHead else GATE_INPUTS
    if name in registry.names():
        return registry.get(name)
    imported: dict[str, type] = {}
    left: list[type] = [base]
    for part in left:  # which grows: all imported classes below the base, level by level
        imported |= {part.__name__: part, f"{part.__module__}.{part.__qualname__}": part}
        left += part.__subclasses__()
    if name in imported:
        return imported[name]
    if "." not in name:
        return registry.get(name)  # which says what names there are
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"The saved heads use the class {name}, which cannot be imported: {error}. Put the folder that holds "
            f"{name.rpartition('.')[0]} on PYTHONPATH, or install its package."
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        wanted = "a subclass of Lens or Gate" if base is ExitHead else "a subclass of GateInput"
        raise UserError(f"The saved heads use {name}, which is no {registry.kind}. Wanted: {wanted}.")
    return found


def factory(entry: Mapping[str, Any]) -> Callable[[Site], Any]:
    """What builds a saved lens or gate again at its site, from the name of its class and its options.

    A UserError if the class is not found; when called, if it or an input no longer takes the options.
    """
    head = recorded_class(entry["class"])

    def built(site: Site) -> ExitHead:
        options = {name: _built(value, site) for name, value in entry["options"].items()}
        _check_options(head, options, site, None, site)
        return head(site, **options)

    return built


def _built(value: object, site: Site) -> object:
    """An option as it was given: an input that was recorded is built again."""
    if isinstance(value, list):
        return [_built(each, site) for each in value]
    if not isinstance(value, dict) or set(value) != {"class", "options"}:
        return value
    part = recorded_class(value["class"], GateInput)
    _check_options(part, value["options"], site, None)
    return part(**value["options"])


def _check_options(part: type, options: Mapping[str, Any], site: Site, *first: object) -> None:
    try:
        inspect.signature(part.__init__).bind(*first, **options)
    except TypeError as error:
        raise UserError(
            f"A saved {part.__name__} at depth {site.depth} cannot be built from its options {dict(options)}: {error}. "
            f"The class has changed since. Train it again, or install the version that saved it."
        ) from error


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
        UserError: If a file is missing or damaged, the two differ, the format or the backbone is another, or a number
            is NaN or infinite: such a head would decode nonsense and report nothing.
    """
    outer = read_record(folder)
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            inner = json.loads((file.metadata() or {}).get("record", "null"))
            # cloned: a tensor inside the file's map may lie at an address that a kernel treats otherwise
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, ValueError) as error:
        raise damaged(folder, error) from error
    if inner != outer:
        sides = [side.get("fingerprint") if isinstance(side, dict) else None for side in (inner, outer)]
        raise UserError(
            f"{WEIGHTS} and {RECORD} in {folder} do not belong together (fingerprints {sides[0]} and {sides[1]}): one "
            f"was edited or replaced. Copy both from where they were saved, or run fit again."
        )
    given = outer.get("format") if isinstance(outer, dict) else None
    if given != FORMAT:
        raise UserError(
            f"The heads in {folder} are of format {given}; this version reads format {FORMAT}. Install the version "
            f"that saved them, or run fit again."
        )
    check_record(outer, folder)
    if outer["fingerprint"] != spec.fingerprint:
        raise UserError(
            f"The heads in {folder} were trained for another backbone: theirs is {outer['backbone']['family']} with "
            f"fingerprint {outer['fingerprint']}, the one given is {spec.family} with fingerprint {spec.fingerprint}. "
            f"Load them with their own backbone, or run fit on this one."
        )
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"The heads in {folder} hold numbers that are NaN or infinite, in {len(broken)} of {len(tensors)} tensors, "
            f"such as {broken[0]}: their training had diverged. Run fit again with a smaller learning rate, or give "
            f"other heads."
        )
    return outer, tensors


def read_record(folder: Path) -> dict[str, Any]:
    """The record of the heads in a folder: backbone, where it comes from, each head's class and options.

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
        return read_mapping(folder / RECORD)
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error


def check_record(record: Mapping[str, Any], folder: Path) -> None:
    """Refuse (UserError) a record that lacks what the heads are built from."""
    try:
        heads = [head for exit_ in record["exits"].values() for head in (exit_["lens"], *exit_["gates"])]
        texts = [record["fingerprint"], record["backbone"]["family"], *(head["class"] for head in heads)]
        for depth in record["exits"]:
            int(depth)
        for head in heads:
            dict(head["options"])
    except KeyError as error:
        raise damaged(folder, f"{RECORD} lacks {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise damaged(folder, f"{RECORD} is not as fit writes it, {error}") from error
    for text in texts:
        if not isinstance(text, str):
            raise damaged(folder, f"{RECORD} has {text!r} where a name is wanted")


def damaged(folder: Path, reason: object) -> UserError:
    """The error of files that are not as they were written."""
    return UserError(f"The heads in {folder} are damaged: {reason}. Copy them again, or run fit again.")
