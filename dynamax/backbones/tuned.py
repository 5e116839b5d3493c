"""A model that ``dynamax tune`` changed a little: its base, and a low-rank adapter that is merged as it is loaded.

The adapter's files are those of PEFT, which reads them too; here they are read without it.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dynamax.backbones.checkpoint import fingerprint_of
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.sources import Source, source_from
from dynamax.errors import UserError
from dynamax.files import read_mapping
from dynamax.paths import InputPath

TUNED, ADAPTER, WEIGHTS = "tuning.json", "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT writes before the name of a module."""
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}
"""Settings of PEFT under which an adapter is a product of two matrices for each weight, and nothing else."""


@final
class Tuned(Source):
    """A model with a low-rank adapter merged into its weights, from a folder that ``dynamax tune`` wrote.

    Merged is W + s B A in float32, where s is the adapter's scale; then the weights are cast to the type that is asked
    for. It is another model than its base, with a fingerprint of its own: heads of one do not fit the other.

    Args:
        folder: The folder.
        base: Where the base comes from; left out, as the folder says. It must be the same model.
    """

    paths = ("folder",)

    def __init__(self, folder: InputPath, base: Source | None = None) -> None:
        self.folder, self.base = str(folder), base

    def load(self, *, dtype: str = "float32", device: str = "cpu") -> HFBackbone:
        """The merged backbone."""
        record, config, tensors = read_adapter(Path(self.folder).expanduser())
        source = self._base(record)
        backbone = source.load()
        if not isinstance(backbone, HFBackbone):
            raise UserError(f"The base is a {type(backbone).__name__}; a model of transformers is wanted. Name one.")
        if backbone.spec.fingerprint != record["base_fingerprint"]:
            raise UserError(
                f"The adapter in {self.folder} was made for a base with fingerprint {record['base_fingerprint']}, and "
                f"the base given has {backbone.spec.fingerprint}. Give the base that it was made for."
            )
        model = backbone.model
        merge(model, config, tensors)
        fingerprint = fingerprint_of(model.config, model.state_dict())
        if dtype != "float32":
            cast = source.load(dtype=dtype)
            assert isinstance(cast, HFBackbone), "it was one in float32"
            cast.model.load_state_dict(model.state_dict())
            model = cast.model
        return HFBackbone(model, fingerprint=fingerprint).to(device)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's."""
        return self._base().tokenizer()

    def generation_config(self) -> GenerationConfig:
        """The base's."""
        return self._base().generation_config()

    def _base(self, record: dict[str, Any] | None = None) -> Source:
        return self.base or source_from((record or read_record(Path(self.folder).expanduser()))["base"])


def read_record(folder: Path) -> dict[str, Any]:
    """What ``dynamax tune`` wrote beside the adapter.

    Raises:
        UserError: If it is missing or damaged.
    """
    file = folder / TUNED
    if not file.is_file():
        raise UserError(f"{folder} has no {TUNED}. Give a folder that dynamax tune wrote.")
    try:
        record = read_mapping(file)
        if {"base", "base_fingerprint", "adapter_sha256"} <= set(record) and {"class", "options"} <= set(
            record["base"]
        ):
            return record
        fault: object = "it does not say what the adapter belongs to"
    except (ValueError, TypeError) as error:
        fault = error
    raise UserError(f"{file} is damaged: {fault}. Copy the folder again, or run dynamax tune again.")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Record, configuration and weights of an adapter.

    Raises:
        UserError: If a file is missing or damaged, they do not belong together, a weight is not finite, or the adapter
            is of a kind that cannot be merged here.
    """
    record = read_record(folder)
    try:
        known = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() == record["adapter_sha256"]
        read = (read_mapping(folder / ADAPTER), load_file(folder / WEIGHTS)) if known else None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"The adapter in {folder} cannot be read: {error}. Copy the folder again.") from error
    if read is None:
        raise UserError(
            f"{folder / WEIGHTS} is not the file that {TUNED} describes: it is damaged, or one of the two was "
            f"replaced. Copy the folder again."
        )
    config, tensors = read
    if other := {
        name: config.get(name) for name, plain in PLAIN.items() if config.get(name, plain) not in (plain, None)
    }:
        raise UserError(
            f"The adapter in {folder} has {other}, which is not merged here. Merge it with PEFT's merge_and_unload, "
            f"save that with save_pretrained, and give the folder."
        )
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"The adapter in {folder} holds numbers that are NaN or infinite, in {broken[0]}. Tune anew.")
    return record, config, tensors


@torch.no_grad()
def merge(model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Add a low-rank adapter to the weights of a model, in place.

    Args:
        model: The base, in float32.
        config: Of PEFT; ``PLAIN``.
        tensors: ``PREFIX`` + module + ``.lora_A.weight`` ``[r, in]`` and ``.lora_B.weight`` ``[out, r]``.

    Raises:
        UserError: If a tensor belongs to no weight of the model.
    """
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    left = dict(tensors)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        low_RI, high_OR = left.pop(name), left.pop(f"{module}.lora_B.weight", None)
        try:
            owner: Any = model.get_submodule(module.removeprefix(PREFIX))
            assert high_OR is not None
            delta_OI = scale * (high_OR.float() @ low_RI.float())
            owner.weight += delta_OI.T if isinstance(owner, Conv1D) else delta_OI
        except (AttributeError, AssertionError, RuntimeError) as error:
            raise UserError(
                f"The adapter has {name}, which does not fit its base. Copy its folder again, or name its own base."
            ) from error
    if left:
        raise UserError(f"The adapter has {min(left)}, which is no low-rank matrix. Copy its folder again.")
