"""int8 weights on a GPU, by torchao (the extra ``quant``)."""

from __future__ import annotations

import contextlib
import importlib
import io
from importlib.util import find_spec
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.kernels.products import Product


@final
class Int8Torchao(Product):
    """Weights in eight bits with a scale for each output channel, by torchao's ``Int8WeightOnlyConfig``.

    Args:
        weight_OI: The weights, as a linear layer holds them.
        bias_O: Added to the product; None for none.
    """

    bytes = 1.0
    storage = torch.bfloat16

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O)
        with contextlib.redirect_stderr(io.StringIO()):  # it names each of its kernels that this machine cannot load
            torchao = importlib.import_module("torchao.quantization")
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
        self._weight_OI = layer.weight.data

    @classmethod
    def refusal(cls, weight_OI: Tensor) -> str | None:
        """Needs torchao and a GPU: on a CPU torch's own kernel takes a fifth of the time."""
        if weight_OI.device.type != "cuda":
            return "torchao's int8 is for a GPU"
        if find_spec("torchao") is None:
            return "int8 on a GPU needs torchao: pip install 'dynamax-exits[quant]'"
        return None

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product."""
        return F.linear(x, self._weight_OI, bias_O)
