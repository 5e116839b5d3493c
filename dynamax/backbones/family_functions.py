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

Kinds = list[str | None]
Windows = list[int | None]
Parts = list[tuple[StateKind, ...]]

# -- windows: positions each block sees ------------------------------------------------------------


def unbounded(config: PretrainedConfig) -> Windows:
    """Every block sees everything."""
    return [None] * config.num_hidden_layers


def same_window(config: PretrainedConfig) -> Windows:
    """Every block slides if the configuration names a window; there are no layer types."""
    return [config.sliding_window] * config.num_hidden_layers


def windows_by_type(config: PretrainedConfig) -> Windows:
    """Blocks of type ``sliding_attention`` slide."""
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


# -- rotary positions: one set of angles for all blocks, or one for each layer type ---------------------


def one_kind(config: PretrainedConfig) -> Kinds:
    """All blocks share their angles."""
    return [None] * config.num_hidden_layers


def kinds_by_type(config: PretrainedConfig) -> Kinds:
    """Each layer type has its own angles."""
    return list(config.layer_types)


def shared_rotary(base: nn.Module) -> Rotary:
    """Angles from the model's ``rotary_emb``."""
    rotary = base.get_submodule("rotary_emb")
    return lambda h_BTD, positions_BT, _: rotary(h_BTD, positions_BT)


def rotary_by_type(base: nn.Module) -> Rotary:
    """Angles from the model's ``rotary_emb``, which wants the layer type."""
    rotary = base.get_submodule("rotary_emb")
    return lambda h_BTD, positions_BT, kind: rotary(h_BTD, positions_BT, kind)


def rotary_if_wanted(base: nn.Module) -> Rotary | None:
    """Angles from the model's ``rotary_emb``, where its configuration wants any."""
    return shared_rotary(base) if dict(base.named_children()).get("rotary_emb") is not None else None


def no_rotary(base: nn.Module) -> None:
    """Positions come in at the embedding; blocks know none."""


# -- what stands between the embedding matrix and block 0, and behind the output matrix ---------------


def tokens_only(base: nn.Module, h_BTD: Tensor, plan: StepPlan) -> Tensor:
    """The word embeddings as they are."""
    return h_BTD


def learned_positions(base: nn.Module, h_BTD: Tensor, plan: StepPlan) -> Tensor:
    """Word embeddings plus GPT-2's learned positions."""
    return h_BTD + base.get_submodule("wpe")(plan.positions_BT)


def plain_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Logits as the output matrix gives them."""
    return logits


def capped_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Logits squashed into (-cap, cap) if the configuration names a cap (Gemma 2)."""
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def multiplied(base: nn.Module, h_BTD: Tensor, plan: StepPlan) -> Tensor:
    """Word embeddings times a constant of the model's (Granite, Falcon-H1)."""
    return h_BTD * cast(Any, base).embedding_multiplier


def twice(base: nn.Module, h_BTD: Tensor, plan: StepPlan) -> Tensor:
    """Word embeddings beside themselves: Zamba2's shared blocks read them again at any depth."""
    return torch.cat([h_BTD, h_BTD], -1)


def divided_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Logits over a constant (Granite)."""
    return logits / config.logits_scaling


def multiplied_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Logits times a constant (Falcon-H1)."""
    return logits * config.lm_head_multiplier


def whole(config: PretrainedConfig, h_BTD: Tensor) -> Tensor:
    """Rows are the residual stream and nothing else."""
    return h_BTD


def first_half(config: PretrainedConfig, h_BTD: Tensor) -> Tensor:
    """Rows carry the word embedding behind the residual stream."""
    return h_BTD[..., : config.hidden_size]


# -- how a block is called -----------------------------------------------------------------------------


def plainly(block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any]) -> Tensor:
    """Rows and keywords in, rows out; some types answer with a tuple that rows are the first of."""
    out = block(h_BTD, **options)
    return out[0] if isinstance(out, tuple) else out


def beside_embedding(block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any]) -> Tensor:
    """Zamba2: residual stream and word embedding apart, two masks, and the index that picks the adapters."""
    x_BTD, word_BTD = h_BTD.chunk(2, -1)
    mask = options.pop("attention_mask")
    out = block(x_BTD, original_hidden_states=word_BTD, layer_idx=index, causal_mask=mask, **options)
    return torch.cat([out, word_BTD], -1)


# -- what a block keeps, and what continues it ------------------------------------------------------------

KEPT: dict[str, tuple[StateKind, ...]] = {
    "full_attention": ("keys",),
    "linear_attention": ("recurrent",),
    "conv": ("recurrent",),
    "hybrid": ("keys", "recurrent"),
    "mlp": (),
    "moe": (),
}


def only_keys(config: PretrainedConfig) -> Parts:
    """Every block attends."""
    return [("keys",)] * config.num_hidden_layers


def parts_by_type(config: PretrainedConfig) -> Parts:
    """What blocks of each layer type keep."""
    return [KEPT[kind] for kind in config.layer_types]


def no_mixer(block: nn.Module) -> None:
    """No block is recurrent."""


def ssd(block: nn.Module) -> Mixer | None:
    """Mamba-2, wherever the block has it."""
    module = module_with(block, "dt_bias")
    return None if module is None else SSDMixer(module)


def free_ssd(block: nn.Module) -> Mixer | None:
    """Mamba-2 whose step sizes transformers clamps in chunks alone (Zamba2, Nemotron-H); see ``repairs``."""
    module = module_with(block, "dt_bias")
    if module is not None:
        free_steps(module)
    return ssd(block)


def scaled_ssd(block: nn.Module) -> Mixer | None:
    """Falcon-H1's Mamba-2: input and channels are scaled, and the gated norm may be missing."""
    module: Any = module_with(block, "dt_bias")
    finish = None if module.mamba_rms_norm else gated
    return SSDMixer(module, gain=module.ssm_in_multiplier, scale="mup_vector", finish=finish)


def gated(y_BTE: Tensor, z_BTE: Tensor) -> Tensor:
    """The scan's output times the gate."""
    return y_BTE * F.silu(z_BTE)


def selective(block: nn.Module) -> Mixer | None:
    """Mamba-1, wherever the block has it."""
    module = module_with(block, "x_proj")
    return None if module is None else SelectiveMixer(module)


def normed_selective(block: nn.Module) -> Mixer | None:
    """Mamba-1 with norms on step, B and C (Falcon-Mamba, Jamba)."""
    module = module_with(block, "x_proj")
    return None if module is None else SelectiveMixer(module, norms=("dt_layernorm", "b_layernorm", "c_layernorm"))


def short_convolution(block: nn.Module) -> Mixer | None:
    """LFM2's gated convolution, wherever the block has it."""
    conv = dict(block.named_children()).get("conv")
    return None if conv is None else ShortConvMixer(conv)


def module_with(block: nn.Module, name: str) -> nn.Module | None:
    """The module of the block that has a parameter or child of this name."""
    for module in block.modules():
        if name in module._parameters or name in module._modules:
            return module
    return None
