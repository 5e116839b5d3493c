"""A Mamba-2 student out of a Transformer teacher: its configuration and its first weights. Knows tensors, no training.

The student is a dense Granite hybrid, since its block is Llama's with another mixer: attention in the blocks that are
kept, Mamba-2 in the others. Mamba-2 without decay, convolution and gate is attention without a softmax: values are
its input x, keys its B, queries its C (The Mamba in the Llama, https://arxiv.org/abs/2408.15237, section 2). Queries
differ between the heads that share keys and values, and C is shared by a group; so every head is a group of its own,
and the rows of keys and values are repeated, as the paper repeats its channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from dynamax.errors import UserError

TEACHERS = ("llama", "mistral")
COPIED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
CHUNK = 64
STEPS = (0.001, 0.1)
DECAYS = (1.0, 16.0)
"""Step sizes and decay rates that Mamba-2 begins with, drawn between these."""


def student_configuration(teacher: PretrainedConfig, keep: Collection[int]) -> PretrainedConfig:
    """The configuration of a student whose blocks ``keep`` attend as the teacher's do.

    Args:
        teacher: A Llama, or a Mistral without a window.
        keep: Blocks that stay, counted from 0; the others become Mamba-2.

    Raises:
        UserError: If the teacher is of another layout, or a block is not one of its own or stands twice.
    """
    check_teacher(teacher)
    depth = teacher.num_hidden_layers
    if len(set(keep)) < len(keep) or not all(0 <= block < depth for block in keep):
        raise UserError(
            f"keep {list(keep)} was given for a teacher of {depth} blocks; wanted different blocks in 0 to {depth - 1}."
        )
    known = teacher.to_dict()
    size, bias = teacher.hidden_size // teacher.num_attention_heads, bool(known.get("attention_bias"))
    return AutoConfig.for_model(
        "granitemoehybrid",
        **{name: known[name] for name in COPIED},
        layer_types=["full_attention" if block in keep else "linear_attention" for block in range(depth)],
        shared_intermediate_size=teacher.intermediate_size,
        num_local_experts=0,
        num_experts_per_tok=0,
        attention_bias=bias,
        attention_multiplier=size**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        position_embedding_type="rope",
        mamba_expand=1,
        mamba_n_heads=teacher.num_attention_heads,
        mamba_n_groups=teacher.num_attention_heads,
        mamba_d_head=size,
        mamba_d_state=size,
        mamba_chunk_size=CHUNK,
        mamba_proj_bias=bias,
    )


def check_teacher(config: PretrainedConfig) -> None:
    """Refuse a teacher with parts that the student has no place for.

    Raises:
        UserError: Naming the part.
    """
    if config.model_type not in TEACHERS:
        raise UserError(
            f"The teacher is a {config.model_type}; only {' and '.join(TEACHERS)} have the layout that is converted."
        )
    known = config.to_dict()
    heads, width = config.num_attention_heads, config.hidden_size
    size = known.get("head_dim") or width // heads
    faults = {
        f"biases in its MLPs (mlp_bias {known.get('mlp_bias')})": bool(known.get("mlp_bias")),
        f"a window (sliding_window {known.get('sliding_window')})": known.get("sliding_window") is not None,
        f"{heads} heads of {size} beside a width of {width}": heads * size != width,
    }
    for fault, there in faults.items():
        if there:
            raise UserError(f"The teacher has {fault}, for which the student has no place. Take another teacher.")


def student_weights(
    config: PretrainedConfig, teacher: Mapping[str, Tensor], *, generator: torch.Generator
) -> dict[str, Tensor]:
    """All of a student's tensors, by name, from those of the teacher.

    What attention has no counterpart for (gate, step size, decay, skip, convolution, gated norm) begins as in Mamba-2;
    it is drawn block after block, so that a block's draw depends on the converted blocks below it.

    Args:
        config: See ``student_configuration``.
        teacher: The teacher's tensors, by name.
        generator: Drawn from; on the CPU.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in teacher.items():
        if not re.search(r"\.(self_attn|mlp)\.", name):
            tensors[name] = tensor
    for block, kind in enumerate(config.layer_types):
        place = f"model.layers.{block}."
        held = {name.removeprefix(place): tensor for name, tensor in teacher.items() if name.startswith(place)}
        attention = {name: tensor for name, tensor in held.items() if name.startswith("self_attn.")}
        mixer = attention if kind == "full_attention" else mamba(config, attention, generator)
        mlp = {
            "shared_mlp.input_linear.weight": torch.cat([held["mlp.gate_proj.weight"], held["mlp.up_proj.weight"]]),
            "shared_mlp.output_linear.weight": held["mlp.down_proj.weight"],
        }
        tensors |= {place + name: tensor for name, tensor in {**mixer, **mlp}.items()}
    return tensors


def mamba(config: PretrainedConfig, attention: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The Mamba-2 that takes the place of attention."""
    like = attention["self_attn.q_proj.weight"]
    heads, inner, taps = config.mamba_n_heads, config.hidden_size, config.mamba_d_conv

    def drawn(*shape: int, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(*shape, generator=generator)).to(like)

    def linear(rows: int, kind: str) -> Tensor:
        bound = inner**-0.5
        return drawn(rows, inner, low=-bound, high=bound) if kind == "weight" else like.new_zeros(rows)

    step_H = drawn(heads, low=math.log(STEPS[0]), high=math.log(STEPS[1])).exp()
    tensors = {
        "mamba.dt_bias": step_H + (-(-step_H).expm1()).log(),  # softplus of it is the step
        "mamba.A_log": drawn(heads, low=DECAYS[0], high=DECAYS[1]).log(),
        "mamba.D": like.new_ones(heads),
        "mamba.norm.weight": like.new_ones(inner),
        "mamba.conv1d.weight": drawn(3 * inner, 1, taps, low=-(taps**-0.5), high=taps**-0.5),
        "mamba.conv1d.bias": drawn(3 * inner, low=-(taps**-0.5), high=taps**-0.5),
    }
    for kind in ("weight", "bias") if config.attention_bias else ("weight",):
        values, keys, queries = (attention[f"self_attn.{name}_proj.{kind}"] for name in "vkq")
        values, keys = (  # one head's rows for each head that reads them
            rows.unflatten(0, (config.num_key_value_heads, -1))
            .repeat_interleave(heads // config.num_key_value_heads, 0)
            .flatten(0, 1)
            for rows in (values, keys)
        )
        rows = [linear(inner, kind), values, keys, queries, linear(heads, kind)]
        tensors[f"mamba.in_proj.{kind}"] = torch.cat(rows)
        tensors[f"mamba.out_proj.{kind}"] = attention[f"self_attn.o_proj.{kind}"]
    return tensors
