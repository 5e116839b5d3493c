"""``dynamax import-heads FOLDER``: heads that DSSD published, in the format that every other command reads.

Source: Valade, "Accelerating Large Language Model Inference with Self-Supervised Early Exits" (arXiv 2407.21082). The
layout is that of the author's code which loads them (FlorianVal/DSSD_demo, src/inference.py): ``config.json`` names the
blocks behind which heads stand, counted from 0; ``aux_heads.pt`` has ``N.norm.weight`` ``[D]`` and ``N.linear.weight``
``[V, D]`` of each head N; ``calibration.json``, which may be missing, has thresholds of the entropy in nats.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.sources import Source
from dynamax.commands.parsing import Parser, prepare
from dynamax.errors import UserError
from dynamax.files import check_folder, read_mapping
from dynamax.heads import Exit, ExitBank, UntiedLens
from dynamax.paths import InputPath
from dynamax.types import Site, Spec

CONFIG, WEIGHTS, CALIBRATION = "config.json", "aux_heads.pt", "calibration.json"
EPS = 1e-6
"""Of a norm whose model's configuration says nothing."""


def main(arguments: Sequence[str]) -> None:
    """Parse, read, write."""
    prepare()
    parser = Parser(
        prog="dynamax import-heads", description="Write heads that DSSD published in this project's format."
    )
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_argument("folder", type=InputPath, help="Folder with config.json and aux_heads.pt.")
    parser.add_function_arguments(import_heads, skip={"folder"}, sub_configs=True)
    built = parser.instantiate(parser.read_arguments(list(arguments[1:]))).as_dict()
    built.pop("config")
    import_heads(**built)


def import_heads(folder: InputPath, backbone: Source, *, out: str = "runs/dssd/heads") -> None:
    """Write the heads, and say how to decode with them.

    Args:
        folder: Folder with config.json and aux_heads.pt.
        backbone: Where the model comes from that the heads were trained on.
        out: Folder to write heads.json and heads.safetensors to.
    """
    check_folder(out, "What is imported", "--out")
    loaded = backbone.load()
    place, spec = Path(str(folder)), loaded.spec
    eps = loaded.model.config.to_dict().get("rms_norm_eps", EPS) if isinstance(loaded, HFBackbone) else EPS
    bank = from_dssd(place, spec, loaded.site, eps)
    bank.save(out, spec, backbone.recipe)
    print(f"Wrote the heads at {', '.join(map(str, bank.depths))} of {spec.depth} blocks to {out}")
    levels = dssd_thresholds(place, bank.depths, spec.vocab)
    if not levels:
        print(f"{place} has no {CALIBRATION}, so no thresholds were published with them.")
    policy = "--policy Entropy --policy.threshold"
    for level, thresholds in (levels or {"": dict.fromkeys(bank.depths, 0.9)}).items():
        said = f"Published for an accuracy of {level}" if level else "Lossless, at a threshold of your own"
        values = "{" + ", ".join(f"{depth}: {value:.6f}" for depth, value in thresholds.items()) + "}"
        print(f"{said}: dynamax generate --heads {out} --decoder SelfSpeculative {policy} '{values}' ...")


def from_dssd(folder: Path, spec: Spec, sites: Callable[[int], Site], eps: float) -> ExitBank:
    """The heads in a folder, in the precision of their file.

    Args:
        folder: Has ``config.json`` and ``aux_heads.pt``.
        spec: Of the model they belong to.
        sites: The place at a depth, such as ``backbone.site``.
        eps: Of the heads' norms: that of the model's own.

    Raises:
        UserError: If a file is missing or damaged, or the heads were trained on a model of other sizes.
    """
    config = _json(folder / CONFIG)
    try:
        sizes = {name: int(config[name]) for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_heads")}
        depths = [int(index) + 1 for index in config["head_layer_indices"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} is not as DSSD writes it: {error!r}. Download the folder again.") from error
    given, wanted = (spec.width, spec.vocab, spec.depth), tuple(sizes.values())[:3]
    if given != wanted or len(depths) != sizes["num_heads"]:
        raise UserError(
            f"The heads in {folder} are {len(depths)} for {config.get('model_name')}, of width, vocabulary and blocks "
            f"{wanted}; the model given has {given}. Name the model that they were trained on: --backbone."
        )
    try:
        tensors: dict[str, Tensor] = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}. Download the folder again.") from error
    parts = {"norm.weight": "norm.weight", "linear.weight": "output.weight"}
    names = {f"{n}.{their}": f"exits.{d}.lens.{our}" for n, d in enumerate(depths) for their, our in parts.items()}
    if set(names) != set(tensors):
        odd = sorted(set(names) ^ set(tensors))
        raise UserError(f"{folder / WEIGHTS} is not as DSSD writes it: {odd[:3]}. Download the folder again.")
    with torch.device("meta"):  # matrices as large as the model's are not drawn at random first
        bank = ExitBank({depth: Exit(partial(UntiedLens, eps=eps)) for depth in depths}, sites)
    try:
        bank.load_state_dict({names[name]: tensor for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS} has heads of other sizes than {CONFIG} says: {error}") from error
    return bank


def dssd_thresholds(folder: Path, depths: Sequence[int], vocab: int) -> dict[str, dict[int, float]]:
    """Thresholds of ``Entropy`` by accuracy and depth; none if the folder has no calibration.

    DSSD leaves below an entropy in nats; ``Entropy`` scores one less the entropy divided by the logarithm of V.
    """
    if not (folder / CALIBRATION).is_file():
        return {}
    found = _json(folder / CALIBRATION)
    try:
        if found["uncertainty_metric"] != "entropy":
            raise UserError(
                f"{folder / CALIBRATION} has thresholds of {found['uncertainty_metric']!r}; those of the entropy are "
                f"read. Remove the file, and choose a threshold yourself."
            )
        return {
            level: {depths[int(head)]: 1 - float(nats) / math.log(vocab) for head, nats in sorted(heads.items())}
            for level, heads in found["thresholds"].items()
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / CALIBRATION} is not as DSSD writes it: {error!r}. Remove or replace it.") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        return read_mapping(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read: {error}. Give a folder with {CONFIG} and {WEIGHTS}, such as a download of "
            f"DSSD-Qwen3-0.6B."
        ) from error
