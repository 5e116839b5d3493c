"""Linear layers as blocks hold them: torch's, GPT-2's, which is stored the other way round, or a ``Product``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dynamax.kernels.products import Product


def weight_of(module: nn.Module) -> Tensor | None:
    """The matrix ``[O, I]`` of a linear layer; None for anything else."""
    if type(module) is nn.Linear:
        return module.weight.detach()
    return module.weight.detach().t() if type(module) is Conv1D else None


def as_product(module: nn.Module, kind: type[Product]) -> Product | None:
    """What takes the place of a linear layer; None for anything else."""
    weight_OI, layer = weight_of(module), cast(Any, module)
    return None if weight_OI is None else kind(weight_OI.contiguous(), layer.bias)


def channels(linear: Any, x: Tensor, *spans: tuple[int, int]) -> Tensor:  # noqa: ANN401 - nn.Linear, Conv1D, Product
    """Some output channels of a linear layer, and no others: those of each ``[start, stop)``, in this order.

    Args:
        linear: The layer.
        x: Its input ``[..., I]``.
        spans: Which channels.
    """
    if isinstance(linear, Product):
        return linear.part(x, *spans)
    weight_OI = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
    parts = [
        F.linear(x, weight_OI[start:stop], None if linear.bias is None else linear.bias[start:stop])
        for start, stop in spans
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def without_bias(linear: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - nn.Linear or Product
    """The product alone, for whoever adds the bias in another precision."""
    return linear.multiply(x, None) if isinstance(linear, Product) else F.linear(x, linear.weight)
