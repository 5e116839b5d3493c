"""The identity of a checkpoint: a short hash that heads are bound to. Knows tensors, no files.

The hash covers what a checkpoint *is*, not how it is run: of every tensor its name, its shape and
4096 values, 64 evenly spaced runs of 64, rounded to bfloat16; of the configuration the facts that
change results and leave no trace in shapes. One checkpoint therefore has one fingerprint, whether
it runs in float64, float32 or bfloat16, on whatever device. (A cast to float16 rounds on its own
terms, and transformers may rename tensors as it loads them: whoever loads from files hashes the
files, see ``dynamax.backbones.checkpoint``.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dynamax.backbones.families import family

RUNS = 64
RUN = 64
FACTS = (
    "rope_parameters",
    "use_parallel_residual",
    "num_experts_per_tok",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "time_step_limit",
    "n_groups",
    "mamba_n_groups",
    "mamba_ngroups",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "lm_head_multiplier",
    "key_multiplier",
    "mlp_multipliers",
    "ssm_multipliers",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
)
"""Entries of a configuration that change results and no shape, where a family has them."""


def fingerprint_of(config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> str:
    """Hash over a configuration and its weights.

    Args:
        config: The model's configuration.
        tensors: Weights by name: a state dict, or files that are read as they are asked for.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(facts(config), sort_keys=True).encode())
    for name in sorted(tensors):
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue  # the embedding matrix once more; files may leave it out
        tensor = tensors[name]
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(sample(tensor).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def facts(config: PretrainedConfig) -> dict[str, object]:
    """What of a configuration changes results without changing a shape."""
    known = config.to_dict()
    return {
        "family": config.model_type,
        "depth": config.num_hidden_layers,
        "heads": getattr(config, "num_attention_heads", None),
        "windows": family(config.model_type).windows(config),
        **{key: known[key] for key in FACTS if key in known},
    }


def sample(tensor: Tensor) -> Tensor:
    """Up to 4096 values of a tensor in bfloat16; runs, so that few pages of a file are read."""
    flat = tensor.detach().flatten()
    if flat.numel() > RUNS * RUN:
        starts = torch.linspace(0, flat.numel() - RUN, RUNS, dtype=torch.float64, device=flat.device).long()
        flat = flat[(starts[:, None] + torch.arange(RUN, device=flat.device)).flatten()]
    return flat.to(torch.bfloat16)
