"""What a block costs, counted from its configuration and the shapes of its parameters. Knows no values."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from transformers import PretrainedConfig

from dynamax.backbones.mixers import Mixer
from dynamax.backbones.state import StateKind
from dynamax.types import BlockCost


def dense(config: PretrainedConfig) -> float:
    """There are no experts."""
    return 1.0


def routed(config: PretrainedConfig) -> float:
    """A position is routed to some of the experts; without experts, to all there is."""
    experts = config.num_local_experts
    return config.num_experts_per_tok / experts if experts else 1.0


def all_used(config: PretrainedConfig, index: int, name: str) -> bool:
    """A block uses all of the parameters it holds."""
    return True


def own_adapter(config: PretrainedConfig, index: int, name: str) -> bool:
    """Zamba2's shared blocks hold an adapter for each place they stand at, and use the one of this place."""
    found = re.search(r"adapter_list\.(\d+)\.", name)
    return found is None or int(found[1]) == config.hybrid_layer_ids.index(index)


def block_cost(
    config: PretrainedConfig,
    used: Mapping[str, nn.Parameter],
    kinds: tuple[StateKind, ...],
    *,
    mixer: Mixer | None,
    window: int | None,
    share: float,
    runs_to_write: bool,
) -> BlockCost:
    """Counts of a block: products only; norms and biases are left out.

    Args:
        config: Gives the heads.
        used: The parameters that the block uses, by name. Experts stand in matrices of three dimensions.
        kinds: What the block keeps.
        mixer: What continues its recurrent state.
        window: Most positions attended to.
        share: Part of the experts that a position uses.
        runs_to_write: Whether all of the block but its mixer runs where only the state is wanted.
    """
    plain, experts = weights_of(used)
    scores, keys, write = attention_of(config) if "keys" in kinds else (0, 0, 0)
    if mixer is not None:
        mixed = weights_of(dict(mixer.module.named_parameters()))[0]
        write = (plain - mixed if runs_to_write else write) + mixer.write_weights()
    return BlockCost(
        weights=plain + experts,
        active=plain + round(experts * share),
        scores=scores,
        keys=keys,
        window=window,
        write=write,
        state=0 if mixer is None else mixer.state_size(),
        scan=0 if mixer is None else mixer.scan_products(),
    )


def weights_of(parameters: Mapping[str, nn.Parameter]) -> tuple[int, int]:
    """Weights of linear layers, and of experts. A convolution's taps and Mamba's decays are counted with the scan."""
    counted = [
        p for name, p in parameters.items() if not re.search(r"(^|\.)(A_log|conv1d\.\w+|conv\.conv\.\w+)$", name)
    ]
    return sum(p.numel() for p in counted if p.ndim == 2), sum(p.numel() for p in counted if p.ndim == 3)


def attention_of(config: PretrainedConfig) -> tuple[int, int, int]:
    """Multiply-adds for each key attended to, values kept a position, weights that make keys and values."""
    known = config.to_dict()
    queries = config.num_attention_heads
    heads = known.get("num_key_value_heads") or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    width = known.get("attention_hidden_size") or config.hidden_size
    return 2 * queries * size, 2 * heads * size, width * size * 2 * heads
