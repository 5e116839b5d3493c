"""What rows of the family table name, where it takes more than a line: functions of configurations and modules.

Knows no caches and no weights by value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from dynamax.backbones.mixers import Mixer, SSDMixer
from dynamax.backbones.plan import Rotary
from dynamax.backbones.state import LayerView, StateKind

# -- the whole model ---------------------------------------------------------------------------------------


def model_rotary(base: nn.Module, name: str = "rotary_emb") -> Rotary:
    """Angles from a module of the model, the same for all blocks."""
    rotary = base.get_submodule(name)
    return lambda h_BTD, positions_BT, _: rotary(h_BTD, positions_BT)


def optional_rotary(base: nn.Module) -> Rotary | None:
    """Angles from the model's ``rotary_emb``; None where its configuration asks for no rotary positions."""
    return model_rotary(base) if "rotary_emb" in dict(base.named_children()) else None


def capped_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Logits squashed into (-cap, cap) if the configuration names a cap (Gemma 2)."""
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def multiplied_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Cohere: logits are multiplied by a constant."""
    return logits * config.logit_scale


def falcon_with_alibi(config: PretrainedConfig) -> str | None:
    """Why a Falcon cannot be driven: its earliest ones have ALiBi in place of rotary positions."""
    return "it has ALiBi, which its two kinds of attention apply differently" if config.alibi else None


def opt_of_another_layout(config: PretrainedConfig) -> str | None:
    """Why an OPT cannot be driven: OPT-350m alone norms behind its layers, and Galactica has no norm at the top."""
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        return "it norms behind its layers and not in front of them (as OPT-350m alone does), or has no final norm"
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embeddings have another width than its blocks (as OPT-350m's alone)"
    return None


def routed(config: PretrainedConfig) -> float:
    """A position is routed to some of the experts; without experts, to all there is."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    return config.num_experts_per_tok / experts if experts else 1.0


def state_by_layer_type(config: PretrainedConfig) -> list[tuple[StateKind, ...]]:
    """What blocks of each layer type keep."""
    kept: dict[str, tuple[StateKind, ...]] = {
        "full_attention": ("keys",),
        "linear_attention": ("recurrent",),
        "conv": ("recurrent",),
        "hybrid": ("keys", "recurrent"),
        "mlp": (),
        "moe": (),
    }
    return [kept[kind] for kind in config.layer_types]


# -- one block ---------------------------------------------------------------------------------------------


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


def call_without_alibi(block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any]) -> Tensor:
    """BLOOM and Falcon: the argument for ALiBi stays empty; the plan's mask has it."""
    alibi = None if options["position_embeddings"] is not None else h_BTD.new_zeros(1, 1, 1)
    return block(h_BTD, alibi=alibi, **options)[0]


def call_with_complex_angles(block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any]) -> Tensor:
    """DeepSeek V2: angles as complex numbers."""
    angles = torch.complex(*options.pop("position_embeddings"))
    return block(h_BTD, position_embeddings=angles, **options)


def own_adapter(config: PretrainedConfig, index: int, name: str) -> bool:
    """Zamba2's shared blocks hold an adapter for each place they stand at, and use the one of this place."""
    found = re.search(r"adapter_list\.(\d+)\.", name)
    return found is None or int(found[1]) == config.hybrid_layer_ids.index(index)


# -- what continues a block's recurrent state ----------------------------------------------------------------


def mixer_in(block: nn.Module, name: str, make: Callable[[nn.Module], Mixer]) -> Mixer | None:
    """The mixer of the first module of the block that has a parameter or child of this name; None without one."""
    for module in block.modules():
        if name in module._parameters or name in module._modules:
            return make(module)
    return None


def unclamped_mamba2(module: Any) -> SSDMixer:  # noqa: ANN401 - each type has its own class
    """Mamba-2 of Zamba2 and Nemotron-H: chunks and single steps are made to agree on step sizes.

    transformers clamps step sizes from below by ``time_step_min``, a bound of their initialisation, in chunks and not
    in single steps, so that its own decoding differs from its own pass over the same text. The code that these models
    were trained with clamps in neither, unless a configuration names a limit.
    """
    module.time_step_limit = tuple(module.config.to_dict().get("time_step_limit") or (0.0, math.inf))
    return SSDMixer(module)


def scaled_mamba2(module: Any) -> SSDMixer:  # noqa: ANN401
    """Falcon-H1's Mamba-2: input and channels are scaled, and the gated norm may be missing."""
    finish = None if module.mamba_rms_norm else gated
    return SSDMixer(module, gain=module.ssm_in_multiplier, scale="mup_vector", finish=finish)


def gated(y_BTE: Tensor, z_BTE: Tensor) -> Tensor:
    """The scan's output times the gate."""
    return y_BTE * F.silu(z_BTE)


def write_behind_shared_transformer(
    block: nn.Module, h_BTD: Tensor, index: int, options: dict[str, Any], view: LayerView, mixer: Mixer
) -> None:
    """Zamba2's hybrid blocks: the Mamba reads the output of the shared transformer, so that has to run."""
    hybrid: Any = block
    x_BTD, word_BTD = h_BTD.chunk(2, -1)
    shared_BTD = hybrid.shared_transformer(x_BTD, original_hidden_states=word_BTD, layer_idx=index, **options)
    mixer.write(hybrid.mamba_decoder.input_layernorm(x_BTD + hybrid.linear(shared_BTD)), view)
