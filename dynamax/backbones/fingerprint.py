"""The identity of a checkpoint: a short hash that heads are bound to. Knows tensors, no files.

The hash covers what a checkpoint *is*, not how it is run. Of every tensor: its name, its shape and 4096 values, 64
evenly spaced runs of 64, rounded to bfloat16. Of the configuration: every entry, except those that are known to have
no effect on results; an entry that nobody thought of is therefore covered. One checkpoint has one fingerprint, whether
it runs in float64, float32 or bfloat16, on whatever device. (A cast to float16 rounds on its own terms, and
transformers may rename tensors as it loads them: whoever loads from files hashes the files, see ``checkpoint``.)

Whether the output matrix is the embedding is told by the tensors, not by the configuration, since that is how
transformers decides it: a matrix that repeats the embedding is left out, as files may leave it out; any other counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from dynamax.backbones.families import family

RUNS = 64
RUN = 64

NO_EFFECT = frozenset(
    (
        *("architectures", "auto_map", "transformers_version", "problem_type", "id2label", "label2id"),  # names
        *("dtype", "torch_dtype", "mamba_ssm_cache_dtype"),  # the type to compute in is chosen when loading
        "tie_word_embeddings",  # the tensors tell
        *("return_dict", "output_router_logits", "num_logits_to_keep"),  # what a call returns
        *("chunk_size", "mamba_chunk_size", "chunk_size_feed_forward", "pretraining_tp"),  # how a product is cut
        *("use_mamba_kernels", "use_mambapy", "use_associative_scan", "use_mem_eff_path"),  # by which code
        *("router_aux_loss_coef", "router_jitter_noise", "z_loss_coefficient"),  # training
        *("rescale_prenorm_residual", "time_step_init_scheme"),  # how weights begin
        *GenerationConfig().to_dict(),  # sampling, token ids, use_cache: no part of the model
    )
)
NO_EFFECT_PATTERN = re.compile(r"^_|^initializer_|^summary_|dropout|_pdrop$|_token_id$")
"""Entries of a configuration that change no logits: bookkeeping, initialisation, dropout (models are in eval mode),
classification heads, ids of special tokens (embeddings of padding are weights like others)."""


def fingerprint_of(config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> str:
    """Hash over a configuration and its weights.

    Args:
        config: The model's configuration.
        tensors: Weights by name: a state dict, or files that are read as they are asked for.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(facts(config), sort_keys=True).encode())
    row = family(config.model_type)
    ending = re.compile(rf"(^|\.){row.embedding}\.weight$")
    embedding = next((sampled(tensors[name]) for name in sorted(tensors) if ending.search(name)), None)
    for name in sorted(tensors):
        values = sampled(tensors[name])
        inside = re.search(rf"(^|\.){row.blocks}\.\d+\.", name) or ending.search(name)
        if inside or values != embedding:
            digest.update(name.encode() + values)
    return digest.hexdigest()[:16]


def facts(config: PretrainedConfig) -> dict[str, str]:
    """The entries of a configuration that may change results, as JSON, where they differ from its class's defaults.

    What equals the default is the same as not being said, so that a later version of transformers which adds an
    entry, with a default that does what was done before, changes no fingerprint.
    """
    try:
        defaults: dict[str, Any] = type(config)().to_dict()
    except TypeError:  # a class that cannot be made without arguments has no defaults: all entries count
        defaults = {}
    known: dict[str, Any] = config.to_dict()
    rope = known.get("rope_parameters") or {}
    kinds = {entry.get("rope_type", "default") for entry in (rope, *rope.values()) if isinstance(entry, dict)}
    plain_rotary = kinds <= {"default"}  # other angles may depend on the longest position
    found = {"model_type": json.dumps(config.model_type)}
    for name, value in known.items():
        if name in NO_EFFECT or NO_EFFECT_PATTERN.search(name) or (name == "max_position_embeddings" and plain_rotary):
            continue
        told, default = (json.dumps(each, sort_keys=True, default=str) for each in (value, defaults.get(name)))
        if told != default:
            found[name] = told
    return found


def sampled(tensor: Tensor) -> bytes:
    """Shape, and up to 4096 values in bfloat16; runs, so that few pages of a file are read."""
    flat = tensor.detach().flatten()
    if flat.numel() > RUNS * RUN:
        starts = torch.linspace(0, flat.numel() - RUN, RUNS, dtype=torch.float64, device=flat.device).long()
        flat = flat[(starts[:, None] + torch.arange(RUN, device=flat.device)).flatten()]
    return f"{list(tensor.shape)}".encode() + flat.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
