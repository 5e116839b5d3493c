"""The floor: the bare products of a model's linear layers for one position, by the format of the weights.

Weights are random: the time does not depend on them. Products are torch's own, so another program may lie below.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.errors import UserError
from dynamax.kernels.products import Float16

Product = Callable[[], object]
REPEATS = 3


def _dense(weight: Tensor) -> Product:
    row = torch.ones(1, weight.shape[1], dtype=weight.dtype)
    return lambda: F.linear(row, weight)


def _bfloat16(weight: Tensor) -> Product:
    return _dense(weight.bfloat16())


def _float16(weight: Tensor) -> Product:
    row, product = torch.ones(1, weight.shape[1]), Float16(weight)
    return lambda: product(row)


def _int8(weight: Tensor) -> Product:
    scales = weight.abs().amax(1).double() / 127
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():  # torch announces that this goes; until then it is what torch has
        warnings.simplefilter("ignore")
        whole = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    row, packed = torch.ones(1, weight.shape[1]), torch.ops.quantized.linear_prepack(whole, None)
    return lambda: torch.ops.quantized.linear_dynamic(row, packed, True)


FORMATS: dict[str, Callable[[Tensor], Product]] = {
    "float32": _dense,
    "bfloat16": _bfloat16,
    "float16": _float16,
    "int8": _int8,
}
"""Products by the format of the weights. float16: sums in float32. int8: activations are rounded too."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes a weight."""


def known(weights: str) -> str:
    """The format whose floor is measured for weights of some format: its own where torch has it here, else float32."""
    if weights in FORMATS:
        try:
            FORMATS[weights](torch.ones(8, 8))()
        except (RuntimeError, AttributeError, UserError):  # another processor than x86, or a torch without it
            return "float32"
        return weights
    return "float32"


class Floor:
    """The products of one format.

    Args:
        weights: A name of ``FORMATS``.
        linears: Shapes ``(out, in)``.

    Attributes:
        ms: Milliseconds of one position, one entry for each time it was measured.
    """

    def __init__(self, weights: str, linears: Sequence[tuple[int, int]]) -> None:
        if weights not in FORMATS:
            raise UserError(f"There is no floor for weights in {weights!r}; wanted: one of {', '.join(FORMATS)}.")
        self.weights = weights
        self.ms: list[float] = []
        self._linears = linears
        self._products: list[Product] = []

    def load(self) -> None:
        """Make the weights, and run once."""
        make = FORMATS[self.weights]
        self._products = [make(torch.rand(shape) - 0.5) for shape in self._linears]
        self._run()

    def measure(self) -> None:
        """Measure once more."""
        start = time.perf_counter()
        for _ in range(REPEATS):
            self._run()
        self.ms.append(1000 * (time.perf_counter() - start) / REPEATS)

    def unload(self) -> None:
        """Let go of the weights."""
        self._products = []

    def _run(self) -> None:
        for product in self._products:
            product()
