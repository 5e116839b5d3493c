"""A model folder to a backbone that has proved itself. Knows folders, not where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dynamax.backbones.check import QUICK, check_modes
from dynamax.backbones.checkpoint import Checkpoint
from dynamax.backbones.families import family
from dynamax.backbones.fingerprint import fingerprint_of
from dynamax.backbones.hf import HFBackbone
from dynamax.errors import UserError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load_backbone(folder: Path, *, dtype: str, device: str) -> HFBackbone:
    """Load a folder in transformers' layout, and compare a short prompt's logits with transformers' own.

    Args:
        folder: Configuration and safetensors.
        dtype: Name of the type to run in.
        device: Name of the device to run on.

    Raises:
        UserError: If the family is unknown, a weight is missing, or the logits differ.
    """
    kind, place = dtype_of(dtype), device_of(device)
    config = config_of(folder)
    row = family(config.model_type)
    tensors = Checkpoint(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=kind, attn_implementation=row.attention, local_files_only=True, output_loading_info=True
    )
    model, report = loaded
    check_report(report, folder)
    backbone = HFBackbone(exact_experts(model), fingerprint=fingerprint_of(config, tensors)).to(place)
    check_modes(backbone, backbone.reference, QUICK)
    return backbone


def config_of(folder: Path) -> PretrainedConfig:
    """The configuration of a folder.

    Raises:
        UserError: If there is none.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json. Give a folder in transformers' layout, as save_pretrained writes it."
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def check_report(report: dict[str, Any], folder: Path) -> None:
    """Refuse a model of which some weights were not read; transformers would leave them random.

    Raises:
        UserError: Naming the first.
    """
    faults = [f"{key.replace('_', ' ')}: {sorted(map(str, report[key]))[:3]}" for key in FAULTS if report.get(key)]
    if faults:
        raise UserError(f"{folder} does not fit its own config.json; {'; '.join(faults)}. Fetch the folder again.")


FAULTS = ("missing_keys", "mismatched_keys", "error_msgs")


def exact_experts(model: PreTrainedModel) -> PreTrainedModel:
    """The same model; in float64 its experts run one by one, as the grouped product knows no float64."""
    if model.dtype == torch.float64 and family(model.config.model_type).experts(model.config) < 1.0:
        model.set_experts_implementation("eager")
    return model


def dtype_of(name: str) -> torch.dtype:
    """A dtype by name.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in DTYPES:
        raise UserError(f"The dtype {name!r} was given; one of {', '.join(DTYPES)} is wanted.")
    return DTYPES[name]


def device_of(name: str) -> torch.device:
    """A device by name.

    Raises:
        UserError: If there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The device {name!r} was given, but cannot be used: {reason} 'cpu' always can.") from error
    return device
