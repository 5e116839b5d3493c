"""What model types differ in, as small functions that rows of the family table name.

Knows configurations and modules, neither caches nor weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from dynamax.backbones.mixers import Mixer, SelectiveMixer, ShortConvMixer, SSDMixer
from dynamax.backbones.plan import Rotary, StepPlan
from dynamax.backbones.repairs import free_steps
from dynamax.backbones.state import StateKind

RotaryTypes = list[str | None]
Windows = list[int | None]
StateKinds = list[tuple[StateKind, ...]]

# -- windows: positions each block sees ------------------------------------------------------------


def no_windows(config: PretrainedConfig) -> Windows:
    """Every block sees all positions."""
    return [None] * config.num_hidden_layers


def one_window(config: PretrainedConfig) -> Windows:
    """Every block has the window that the configuration names, if it names one; there are no layer types."""
    return [config.sliding_window] * config.num_hidden_layers


def windows_by_layer_type(config: PretrainedConfig) -> Windows:
    """Blocks of type ``sliding_attention`` have a window, the others none."""
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


# -- rotary positions: one set of angles for all blocks, or one for each layer type ---------------------


def one_rotary_type(config: PretrainedConfig) -> RotaryTypes:
    """All blocks take the same angles."""
    return [None] * config.num_hidden_layers


def rotary_type_by_layer_type(config: PretrainedConfig) -> RotaryTypes:
    """Each layer type has angles of its own."""
    return list(config.layer_types)


def model_rotary(base: nn.Module) -> Rotary:
    """Angles from the model's ``rotary_emb``."""
    rotary = base.get_submodule("rotary_emb")
    return lambda h_BTD, positions_BT, _: rotary(h_BTD, positions_BT)


def rotary_by_layer_type(base: nn.Module) -> Rotary:
    """Angles from the model's ``rotary_emb``, which wants the layer type."""
    rotary = base.get_submodule("rotary_emb")
    return lambda h_BTD, positions_BT, kind: rotary(h_BTD, positions_BT, kind)


def optional_rotary(base: nn.Module) -> Rotary | None:
    """Angles from the model's ``rotary_emb``; None where its configuration asks for no rotary positions."""
    return model_rotary(base) if dict(base.named_children()).get("rotary_emb") is not None else None


def no_rotary(base: nn.Module) -> None:
    """No rotary positions: positions are added to the embedding, or the model needs none."""


# -- what stands between the embedding matrix and block 0, and behind the output matrix ---------------


def embedding_as_is(base: nn.Module, h_BTD: Tensor, plan: StepPlan) -> Tensor:
    """The word embeddings as they are."""
    return h_BTD


def add_learned_positions(base: nn.Module, h_BTD: Tensor, plan: StepPlan) -> Tensor:
    """Word embeddings plus GPT-2's learned positions."""
    return h_BTD + base.get_submodule("wpe")(plan.positions_BT)


def logits_as_is(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Logits as the output matrix gives them."""
    return logits


def capped_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Logits squashed into (-cap, cap) if the configuration names a cap (Gemma 2)."""
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def scaled_embedding(base: nn.Module, h_BTD: Tensor, plan: StepPlan) -> Tensor:
    """Word embeddings times a constant of the model's (Granite, Falcon-H1)."""
    return h_BTD * cast(Any, base).embedding_multiplier


def repeated_embedding(base: nn.Module, h_BTD: Tensor, plan: StepPlan) -> Tensor:
    """Word embeddings twice, side by side: Zamba2's shared blocks read them again at any depth."""
    return torch.cat([h_BTD, h_BTD], -1)


def divided_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Logits over a constant (Granite)."""
    return logits / config.logits_scaling


def multiplied_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Logits times a constant (Falcon-H1)."""
    return logits * config.lm_head_multiplier


def all_channels(config: PretrainedConfig, h_BTD: Tensor) -> Tensor:
    """All channels are the residual stream."""
    return h_BTD


def first_half_of_channels(config: PretrainedConfig, h_BTD: Tensor) -> Tensor:
    """The first half of the channels is the residual stream, the second the word embedding (Zamba2)."""
    return h_BTD[..., : config.hidden_size]


# -- how a block is called -----------------------------------------------------------------------------


def call_with_keywords(block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any]) -> Tensor:
    """``h_BTD`` and keywords in, ``h_BTD`` out; some types return a tuple whose first entry it is."""
    out = block(h_BTD, **options)
    return out[0] if isinstance(out, tuple) else out


def call_with_embedding(block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any]) -> Tensor:
    """Zamba2: residual stream and word embedding as two arguments, and the index that picks the adapters."""
    x_BTD, word_BTD = h_BTD.chunk(2, -1)
    mask = options.pop("attention_mask")
    out = block(x_BTD, original_hidden_states=word_BTD, layer_idx=index, causal_mask=mask, **options)
    return torch.cat([out, word_BTD], -1)


# -- what a block keeps, and what continues it ------------------------------------------------------------

STATE_BY_LAYER_TYPE: dict[str, tuple[StateKind, ...]] = {
    "full_attention": ("keys",),
    "linear_attention": ("recurrent",),
    "conv": ("recurrent",),
    "hybrid": ("keys", "recurrent"),
    "mlp": (),
    "moe": (),
}


def keys_only(config: PretrainedConfig) -> StateKinds:
    """Every block keeps keys and values, and nothing else."""
    return [("keys",)] * config.num_hidden_layers


def state_by_layer_type(config: PretrainedConfig) -> StateKinds:
    """What blocks of each layer type keep."""
    return [STATE_BY_LAYER_TYPE[kind] for kind in config.layer_types]


def no_mixer(block: nn.Module) -> None:
    """No block keeps a recurrent state."""


def mamba2_mixer(block: nn.Module) -> Mixer | None:
    """Mamba-2, wherever the block has it."""
    module = module_with(block, "dt_bias")
    return None if module is None else SSDMixer(module)


def mamba2_mixer_unclamped(block: nn.Module) -> Mixer | None:
    """Mamba-2 whose step sizes transformers clamps in chunks alone (Zamba2, Nemotron-H); see ``repairs``."""
    module = module_with(block, "dt_bias")
    if module is not None:
        free_steps(module)
    return mamba2_mixer(block)


def mamba2_mixer_scaled(block: nn.Module) -> Mixer | None:
    """Falcon-H1's Mamba-2: input and channels are scaled, and the gated norm may be missing."""
    module: Any = module_with(block, "dt_bias")
    if module is None:
        return None
    finish = None if module.mamba_rms_norm else gated
    return SSDMixer(module, gain=module.ssm_in_multiplier, scale="mup_vector", finish=finish)


def gated(y_BTE: Tensor, z_BTE: Tensor) -> Tensor:
    """The scan's output times the gate."""
    return y_BTE * F.silu(z_BTE)


def mamba1_mixer(block: nn.Module) -> Mixer | None:
    """Mamba-1, wherever the block has it."""
    module = module_with(block, "x_proj")
    return None if module is None else SelectiveMixer(module)


def mamba1_mixer_normed(block: nn.Module) -> Mixer | None:
    """Mamba-1 with norms on step, B and C (Falcon-Mamba, Jamba)."""
    module = module_with(block, "x_proj")
    return None if module is None else SelectiveMixer(module, norms=("dt_layernorm", "b_layernorm", "c_layernorm"))


def short_conv_mixer(block: nn.Module) -> Mixer | None:
    """LFM2's gated convolution, wherever the block has it."""
    conv = dict(block.named_children()).get("conv")
    return None if conv is None else ShortConvMixer(conv)


def module_with(block: nn.Module, name: str) -> nn.Module | None:
    """The module of the block that has a parameter or child of this name."""
    for module in block.modules():
        if name in module._parameters or name in module._modules:
            return module
    return None
