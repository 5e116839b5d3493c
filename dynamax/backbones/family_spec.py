"""What a row of the family table says: how one model type of transformers is driven block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PretrainedConfig

from dynamax.backbones import family_functions as functions
from dynamax.backbones.attention_functions import AttentionCost, attention_cost, projected, turned_by_its_module
from dynamax.backbones.mixers import Mixer
from dynamax.backbones.plan import Plan, Rotary
from dynamax.backbones.state import LayerView, StateKind


@dataclass(frozen=True)
class FamilySpec:
    """How one model type is driven block by block: all that is special of it, with Llama's ways as defaults.

    ``base`` is the model without its output matrix, ``config`` its configuration; a list has an entry for each block.

    Attributes:
        embedding: Name of the embedding matrix in ``base``.
        blocks: Name of the list of blocks in ``base``.
        final_norm: Name of the final norm in ``base``.
        cache_argument: Keyword by which a block takes its cache.
        attention: Attention implementation to load with: ``sdpa``, or ``eager`` where nothing else is exact.
        windows: ``config`` to a list: how many positions a row of the block sees, its own included; None for all.
        rotary_types: ``config`` to a list: which of the model's rotary angles the block takes; None for the only ones.
        rotary: ``base`` to the function that gives rotary angles; None for a model without.
        after_embedding: ``(base, h_BTD, plan)`` to the input of block 0; ``h_BTD`` are the word embeddings.
        scale_logits: ``(config, logits)`` to logits, of one shape: a factor or a cap behind the output matrix.
        expert_share: ``config`` to the part, in (0, 1], of a block's experts that one position uses.
        state_kinds: ``config`` to a list: what the block keeps: keys, a recurrent state, both, neither.
        mixer: A block to what continues its recurrent state; None for a block without.
        call_block: ``(block, h_BTD, index, keywords)`` to ``h_BTD``, the block's output.
        residual_stream: ``(config, h_BTD)`` to the channels of ``h_BTD`` that the final norm reads.
        uses_parameter: ``(config, index, name)``: whether the block uses a parameter that it holds, for its costs.
        input_norm: Name of the norm that a block's input passes before it is projected, or names of which a block has
            one; None for none.
        keys_and_values: ``(block, u_BTD)`` to ``(k_BHTD, v_BHTD)``, not yet turned to their positions.
        turned: Which of the two is turned by the rotary angles.
        turn: ``(block, k_BHTD, cos_BTR, sin_BTR)`` to ``k_BHTD``, turned by these angles as the block does it.
        slopes: ``config`` to the slopes of ALiBi, one a head: what a score loses for each position between; None for
            a model without.
        attention_cost: ``(config, block)`` to what the block's attention costs.
        refuse: ``config`` to why a model of this type cannot be driven; None if it can.
        write: How a block's state is written where more than norm and projections has to run; None elsewhere.
    """

    embedding: str = "embed_tokens"
    blocks: str = "layers"
    final_norm: str = "norm"
    cache_argument: str = "past_key_values"
    attention: str = "sdpa"
    windows: Callable[[PretrainedConfig], list[int | None]] = lambda config: [None] * config.num_hidden_layers
    rotary_types: Callable[[PretrainedConfig], list[str | None]] = lambda config: [None] * config.num_hidden_layers
    rotary: Callable[[nn.Module], Rotary | None] = functions.model_rotary
    after_embedding: Callable[[Any, Tensor, Plan], Tensor] = lambda base, h_BTD, plan: h_BTD
    scale_logits: Callable[[PretrainedConfig, Tensor], Tensor] = lambda config, logits: logits
    expert_share: Callable[[PretrainedConfig], float] = lambda config: 1.0
    state_kinds: Callable[[PretrainedConfig], list[tuple[StateKind, ...]]] = lambda config: (
        [("keys",)] * config.num_hidden_layers
    )
    mixer: Callable[[nn.Module], Mixer | None] = lambda block: None
    call_block: Callable[[nn.Module, Tensor, int, dict[str, Any]], Tensor] = functions.call_with_keywords
    residual_stream: Callable[[PretrainedConfig, Tensor], Tensor] = lambda config, h_BTD: h_BTD
    uses_parameter: Callable[[PretrainedConfig, int, str], bool] = lambda config, index, name: True
    input_norm: str | tuple[str, ...] | None = "input_layernorm"
    keys_and_values: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = lambda block, u_BTD: projected(
        block.get_submodule("self_attn"), u_BTD
    )
    turned: Literal["keys", "values"] = "keys"
    turn: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] = turned_by_its_module
    slopes: Callable[[PretrainedConfig], Tensor | None] = lambda config: None
    attention_cost: Callable[[PretrainedConfig, nn.Module], AttentionCost] = attention_cost
    refuse: Callable[[PretrainedConfig], str | None] = lambda config: None
    write: Callable[[nn.Module, Tensor, int, dict[str, Any], LayerView, Mixer], None] | None = None
