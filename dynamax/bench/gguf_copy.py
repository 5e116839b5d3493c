"""A model of the plain Llama layout as a GGUF file in float32, without its tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from dynamax.backbones.checkpoint import Checkpoint
from dynamax.backbones.gguf import NAMES
from dynamax.backbones.loading import read_config

LAYOUT = 1
"""Version of what ``write_gguf`` writes; raised when it changes."""


def uncovered(config: PretrainedConfig) -> str | None:
    """Why a model cannot be written; None if it can."""
    if config.model_type != "llama":
        return f"a GGUF copy is written of Llama models only, and this is {config.model_type}"
    kind = (config.to_dict().get("rope_parameters") or {}).get("rope_type", "default")
    if kind != "default":
        return f"a GGUF copy is written without rotary scaling, and this model has {kind!r}"
    if config.attention_bias or config.mlp_bias:
        return "a GGUF copy is written without biases, and this model has some"
    return None


def write_gguf(folder: Path, fresh: Path) -> None:
    """Write ``model.gguf``; a model that is ``uncovered`` must not be given.

    Args:
        folder: The model in transformers' layout.
        fresh: Where the file goes.
    """
    from gguf import GGUFWriter

    config = read_config(folder)
    writer = GGUFWriter(fresh / "model.gguf", "llama", use_temp_file=True)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(0)
    writer.add_tokenizer_model("no_vocab")
    _add_tensors(writer, Checkpoint(folder), config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensors(writer: object, tensors: Checkpoint, config: PretrainedConfig) -> None:
    names = {theirs: ours for ours, theirs in NAMES.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name in tensors:
        stem = name.removesuffix(".weight")
        block = ""
        if stem.startswith("model.layers."):
            _, _, index, stem = stem.split(".", 3)
            block = f"blk.{index}."
        elif stem == "lm_head" and config.tie_word_embeddings:
            continue
        part = names[stem]
        values = tensors[name].float().numpy()
        values = neighbours(values, heads[part]) if part in heads else values
        writer.add_tensor(f"{block}{part}.weight", np.ascontiguousarray(values))  # type: ignore[attr-defined]


def neighbours(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs half a head apart (transformers) to pairs side by side (GGUF)."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
