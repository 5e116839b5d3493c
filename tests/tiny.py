"""Tiny random models of every family, with weights at unit gain so that no block is near identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dynamax.backbones.families import family as family_of
from dynamax.backbones.family_spec import FamilySpec
from tests.variants import DISTINCT, FAMILIES, RECURRENT, WINDOW, Variant

__all__ = ["DISTINCT", "EXPERTS", "FAMILIES", "RECURRENT", "WINDOW", "Variant", "redraw", "tiny"]


def _has_experts(name: str) -> bool:
    row = family_of(FAMILIES[name].model_type)
    return row.expert_share is not FamilySpec().expert_share and name != "granitemoehybrid-dense"


EXPERTS = [name for name in FAMILIES if _has_experts(name)]
"""Variants whose blocks choose experts by the values of tensors: their steps cannot be captured."""


def tiny(
    family: str,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    depth: int = 6,
    width: int = 32,
    vocab: int = 61,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model that never ends a sequence of its own accord.

    Args:
        family: Name in ``FAMILIES``.
        dtype: Type of all weights.
        seed: Seed of the weights.
        depth: Blocks.
        width: Residual stream; a multiple of 16.
        vocab: Tokens.
        **overrides: Configuration entries that win over the variant's.
    """
    variant = FAMILIES[family]
    options: dict[str, Any] = {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "vocab_size": vocab,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **({variant.types: [variant.cycle[i % len(variant.cycle)] for i in range(depth)]} if variant.cycle else {}),
        **variant.options,
    }
    config = AutoConfig.for_model(variant.model_type, **{**options, **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=variant.attention, dtype=dtype)
    if model.config.to_dict().get("num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    redraw(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Draw all weights at unit gain; vectors stay near what they were initialised to."""
    generator = torch.Generator().manual_seed(seed)
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 1:
            parameter += 0.1 * noise.to(parameter.dtype)
        else:
            fan_in = parameter.shape[0 if id(parameter) in transposed else -1]
            parameter.copy_(noise * fan_in**-0.5)
