"""Experts of a mixture: small networks side by side, of which each position takes a few.

transformers holds the matrices of all experts in one tensor ``[E, O, I]`` and lets other code multiply with them. What
that code must know is said by the module (``transformers.integrations.moe.use_experts_implementation``).
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel

from dynamax.kernels.products import Product
from dynamax.recording import as_a_whole

EXPERTS = "dynamax"
"""The name of ``multiply_routed`` among transformers' implementations of experts."""


def matrices_of(module: nn.Module) -> dict[str, Tensor]:
    """The matrices ``[E, O, I]`` of a module's experts, by name; empty for other modules, and for packed experts."""
    known = vars(module)
    if not {"has_gate", "has_bias", "is_transposed"} <= known.keys() or known.get("_is_expert_parallel", False):
        return {}
    names = ("gate_up_proj" if known["has_gate"] else "up_proj", "down_proj")
    held = [module._parameters.get(name) for name in names]
    found = [weight.detach() for weight in held if weight is not None and weight.ndim == 3]
    if len(found) < len(names):
        return {}
    return dict(zip(names, (weight.mT for weight in found) if known["is_transposed"] else found, strict=True))


def unknown_experts(model: nn.Module) -> str | None:
    """Why experts of a model would stay as they are, naming the first; None if all can be packed."""
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            taps = "conv" in f"{path}.{name}"  # of a convolution: the only other tensors of three dimensions
            if weight is not None and weight.ndim == 3 and not taps and name not in matrices_of(module):
                return (
                    f"{path}.{name} of {type(module).__name__} would stay as it is, since these experts do not go "
                    f"through transformers' interface for experts on one machine"
                )
    return None


def pack_experts(model: PreTrainedModel, kind: type[Product]) -> None:
    """Hold each matrix of each expert as a product of its own, in place; the tensor of all experts is freed.

    Biases go along; other weights of the module stay as they are. So do ``unknown_experts``.

    Args:
        model: The model.
        kind: What takes the place of a matrix.
    """
    holders: list[Any] = [module for module in model.modules() if matrices_of(module)]
    for module in holders:
        for name, weight_EOI in matrices_of(module).items():
            biases = module._parameters.pop(f"{name}_bias") if module.has_bias else [None] * len(weight_EOI)
            products = [kind(weight_OI.contiguous(), b) for weight_OI, b in zip(weight_EOI, biases, strict=True)]
            delattr(module, name)
            setattr(module, name, nn.ModuleList(products))
    if holders:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, multiply_routed)
        model.set_experts_implementation(EXPERTS)


@as_a_whole
def multiply_routed(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # noqa: ANN401
    """What packed experts give, as transformers calls for it; only experts that some position takes are run.

    Args:
        module: Holds the experts.
        hidden_states: A row ``[N, I]`` for each position.
        top_k_index: The experts ``[N, K]`` that each takes.
        top_k_weights: Their factors in the sum, ``[N, K]``.

    Returns:
        The weighted sums ``[N, I]``.
    """
    first, last = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    between = module._apply_gate if module.has_gate else module.act_fn
    after = module.post_expert_norm if vars(module).get("has_post_expert_norm", False) else None

    def run(expert: int, rows_CI: Tensor) -> Tensor:
        y_CI = last[expert](between(first[expert](rows_CI)))
        return y_CI if after is None else after(y_CI)

    taken = top_k_index.tolist()
    if len(taken) == 1:
        y_SI = torch.cat([run(expert, hidden_states) for expert in taken[0]])
    else:  # positions that take the same expert stand together
        order_S = top_k_index.flatten().argsort()
        experts, counts = zip(*sorted(Counter(chain(*taken)).items()), strict=True)
        parts = hidden_states[order_S // top_k_index.shape[1]].split(counts)
        y_SI = torch.cat(list(map(run, experts, parts)))[order_S.argsort()]
    y_NKI = y_SI.view(*top_k_index.shape, -1) * top_k_weights[..., None]
    return y_NKI.sum(1).to(hidden_states.dtype)
