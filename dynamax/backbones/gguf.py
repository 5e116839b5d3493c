"""GGUF files to model folders: weights dequantised to float32, configuration and tokenizer rebuilt.

Covers what has been compared with other readers: the ``llama`` architecture (SmolLM, Llama, Mistral) without rotary
scaling and experts, with a byte-level BPE. Everything else is refused by name. The copy is float32, which is exact: a
4- or 8-bit weight is a float16 scale times an integer plus a float16 offset, more digits than float16 or bfloat16 hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from dynamax.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader  # imported where a file is opened: a fifth of a second

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensors of the ``llama`` architecture: GGUF's names and transformers'."""

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
}
"""How text is cut before BPE, by ``tokenizer.ggml.pre``."""

LAYOUT = 2
"""Version of what ``dequantise`` writes; raised when it changes, so that no older copy is taken for a newer one."""

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


@dataclass(frozen=True)
class Metadata:
    """The key-value part of a GGUF file.

    Attributes:
        reader: The opened file.
        path: Its path, for messages.
    """

    reader: GGUFReader
    path: Path

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401  (a GGUF value has any type)
        """A value, or the default."""
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.path} has no entry {key!r}. Convert the model to GGUF with a current llama.cpp.")
        return value


def dequantise(path: Path, folder: Path) -> None:
    """Write a GGUF file as a folder in transformers' layout.

    Args:
        path: The GGUF file.
        folder: An empty folder.

    Raises:
        UserError: If it is not GGUF, or holds something this module does not cover, which is named.
    """
    try:
        from gguf import GGUFReader

        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} is not a readable GGUF file ({error}). Fetch it again.") from error
    metadata = Metadata(reader, path)
    arch = metadata["general.architecture"]
    scaling = metadata.get("llama.rope.scaling.type", "none")
    faults = {
        f"architecture {arch!r} (covered: 'llama')": arch != "llama",
        "experts": metadata.get("llama.expert_count", 0) > 0,
        f"rotary scaling {scaling!r}": scaling != "none",
        "rotary frequencies of its own": any(t.name == "rope_freqs.weight" for t in reader.tensors),
    }
    found = [fault for fault, there in faults.items() if there]
    if found:
        raise UserError(
            f"{path} has {' and '.join(found)}, which the GGUF reader does not cover. Use the model's "
            f"safetensors instead: backbone Hub (a name) or Folder (a path)."
        )
    end, *more = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    ids = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id", end),
    }
    config = config_of(metadata, ids)
    save_file(tensors_of(metadata, config), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    ends = list(dict.fromkeys(each for each in (end, *more) if each is not None))  # of text, turn and message
    GenerationConfig(**{**ids, "eos_token_id": ends or None}).save_pretrained(folder)
    tokenizer_of(metadata, ids).save_pretrained(folder)


def config_of(metadata: Metadata, ids: dict[str, Any]) -> LlamaConfig:
    """The configuration, from the file's entries and the ids of its special tokens."""
    shapes = {tensor.name: tensor.shape for tensor in metadata.reader.tensors}
    heads = metadata["llama.attention.head_count"]
    width = metadata["llama.embedding_length"]
    epsilon = np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])
    return LlamaConfig(
        vocab_size=int(shapes["token_embd.weight"][1]),
        hidden_size=width,
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=metadata.get("llama.attention.key_length", width // heads),
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=float(str(epsilon)),  # 1e-05, not the float32 next to it
        rope_parameters={"rope_type": "default", "rope_theta": metadata.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in shapes,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **ids,
    )


def tensors_of(metadata: Metadata, config: LlamaConfig) -> dict[str, Tensor]:
    """All tensors in float32, by transformers' names (``model.layers.3.self_attn.q_proj.weight``) and in its order.

    Raises:
        UserError: If the file holds a tensor that no llama has, or lacks one.
    """
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found: dict[str, Tensor] = {}
    reader, path = metadata.reader, metadata.path
    for tensor in tqdm(reader.tensors, desc=f"Dequantising {path.name}", unit="tensor"):
        stem, _, kind = tensor.name.rpartition(".")
        block, _, part = stem.rpartition(".")
        if part not in NAMES or kind != "weight":
            raise UserError(
                f"{path} holds the tensor {tensor.name!r}, which no llama has. Use the model's safetensors instead."
            )
        weights = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weights = halves(weights, heads[part]) if part in heads else weights
        name = f"{block.replace('blk', 'model.layers')}.{NAMES[part]}".removeprefix(".")
        found[f"{name}.weight"] = torch.from_numpy(np.array(weights))
    outside = ["model.embed_tokens", "model.norm", "lm_head"]
    parts = [part for part in NAMES.values() if part not in outside]
    wanted = outside[:2] if config.tie_word_embeddings else outside
    wanted = wanted + [f"model.layers.{i}.{part}" for i in range(config.num_hidden_layers) for part in parts]
    missing = [name for name in wanted if f"{name}.weight" not in found]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} tensors, {missing[0]!r} first. Fetch the file again.")
    return found


def halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs side by side (GGUF) to pairs half a head apart (transformers)."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tokenizer_of(metadata: Metadata, ids: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE, its special tokens and the chat template.

    Raises:
        UserError: If the file's tokenizer is of another kind.
    """
    kind, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "(none)")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{metadata.path} has a tokenizer of kind {kind!r} cut by {pre!r}; covered are 'gpt2' cut by "
            f"{' or '.join(map(repr, PRE_TOKENIZERS))}. Use the model's safetensors instead: backbone Hub or Folder."
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = PRE_TOKENIZERS[pre]
    core.decoder = decoders.ByteLevel()
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        first = tokens[ids["bos_token_id"]]
        core.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, ids["bos_token_id"])]
        )
    for token, of_kind in zip(tokens, metadata.get("tokenizer.ggml.token_type", []), strict=False):
        if of_kind == CONTROL:  # never cut, and skipped by decoding where asked
            core.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif of_kind == USER_DEFINED:  # never cut
            core.add_tokens([AddedToken(token, special=False, normalized=False)])
    special = {key.removesuffix("_id"): tokens[i] for key, i in ids.items() if i is not None}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is not None:
        special["unk_token"] = tokens[unknown]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata["llama.context_length"],
        chat_template=metadata.get("tokenizer.chat_template"),
        padding_side="left",
        **special,
    )
