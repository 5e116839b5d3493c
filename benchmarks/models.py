"""The models that benchmarks decode with: SmolLM2, and random weights in the shapes of models too large to ship."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.loading import dtype_of


@dataclass(frozen=True)
class Contestant:
    """A model to time.

    Attributes:
        depths: Exits to force.
        config: Shape to fill with random weights; None for SmolLM2 with its own.
    """

    depths: tuple[int, ...]
    config: dict[str, Any] | None = None


CONTESTANTS = {
    "smollm2": Contestant((10, 15, 20, 25)),
    "mamba2-130m": Contestant(
        (8, 12, 16, 20),
        {
            "model_type": "mamba2",
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "state_size": 128,
            "num_heads": 24,
            "head_dim": 64,
            "n_groups": 1,
            "vocab_size": 50288,
            "tie_word_embeddings": True,
        },
    ),
    "mamba-130m": Contestant(
        (8, 12, 16, 20),
        {
            "model_type": "mamba",
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "state_size": 16,
            "vocab_size": 50280,
            "tie_word_embeddings": True,
        },
    ),
    "granite-hybrid-small": Contestant(
        (8,),
        {
            "model_type": "granitemoehybrid",
            "hidden_size": 768,
            "num_hidden_layers": 16,
            "layer_types": [*["linear_attention"] * 3, "full_attention"] * 4,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "mamba_n_heads": 24,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 2048,
            "position_embedding_type": "rope",
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral-small": Contestant(
        (4,),
        {
            "model_type": "mixtral",
            "hidden_size": 512,
            "intermediate_size": 1792,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "vocab_size": 32000,
            "tie_word_embeddings": False,
        },
    ),
    "pythia-160m": Contestant(
        (6,),
        {
            "model_type": "gpt_neox",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 50304,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3-small": Contestant(
        (9,),
        {
            "model_type": "gemma3_text",
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
            "vocab_size": 65536,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-small": Contestant(
        (8,),
        {
            "model_type": "qwen3",
            "hidden_size": 768,
            "intermediate_size": 2304,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "vocab_size": 65536,
            "tie_word_embeddings": True,
        },
    ),
    "mistral-7b": Contestant(
        (16, 20, 24, 28),
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768,
            "vocab_size": 32768,
            "tie_word_embeddings": False,
        },
    ),
    "codestral-7b": Contestant(
        (32, 40, 48, 56),
        {
            "model_type": "mamba2",
            "hidden_size": 4096,
            "num_hidden_layers": 64,
            "state_size": 128,
            "num_heads": 128,
            "head_dim": 64,
            "n_groups": 8,
            "vocab_size": 32768,
            "tie_word_embeddings": False,
        },
    ),
}
"""By name; small ones of other families have their layouts, with a smaller vocabulary where theirs is very large.

DYNAMAX's exits for Mistral-7B v0.3 and Codestral-Mamba-7B."""


def load(name: str, *, dtype: str, device: str, prompts: int) -> tuple[HFBackbone, list[Tensor]]:
    """The backbone, and prompts ``tokens_1T`` for it."""
    config = CONTESTANTS[name].config
    if config is None:
        from dynamax.backbones.sources import SmolLM2  # these two need packages that random weights do without
        from dynamax.data.generated import questions

        source = SmolLM2()
        tokenizer = source.tokenizer()
        texts = [question.question for question in questions()[:prompts]]
        rows = [tokenizer(text)["input_ids"] for text in texts]
        return source.load(dtype=dtype, device=device), [torch.tensor([row], device=device) for row in rows]
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoConfig.for_model(**config, bos_token_id=None, eos_token_id=None, pad_token_id=None)
        model = AutoModelForCausalLM.from_config(made, dtype=dtype_of(dtype))
    rows = [torch.randint(config["vocab_size"], (1, 16), device=device) for _ in range(prompts)]
    return HFBackbone(model, fingerprint="random weights"), rows
