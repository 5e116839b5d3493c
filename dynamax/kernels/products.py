"""Matrix products with frozen weights, one class for each format that weights are held in.

Each takes the place of a linear layer: ``x[..., I]`` to ``y[..., O]`` in the dtype of ``x``. Some stand on functions of
torch that are private or deprecated: ``refusal`` says where they cannot be used.
"""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.errors import UserError

FLOAT16_MAX = 65504.0
LARGE = 400_000
"""Weights of a matrix from which on one row is multiplied faster by several threads."""
FEW_ROWS = 4
"""Rows up to which a smaller one is not."""
PRODUCT: Any = getattr(torch, "fbgemm_linear_fp16_weight_fp32_activation", None)
"""FBGEMM's product on one thread; None where torch has it no longer."""
SHARED: Any = getattr(getattr(torch.ops.quantized, "linear_dynamic_fp16", None), "default", None)
"""FBGEMM's product on all threads; None where torch has it no longer."""


class Product(nn.Module, ABC):
    """Multiplies rows with a weight matrix.

    Args:
        weight_OI: The weights, as a linear layer holds them.
        bias_O: Added to the product; None for none.

    Attributes:
        bytes: Bytes read for each weight; None for those of the model's own dtype.
        storage: Dtype that holds the weights without loss; None for their own.
        repacks: Whether weights that were packed and are packed once more stay what they are.
        bias: What is added.
        dtype: Of the weights it was made of, and of the rows it takes.
        device: Where they are.
        in_features: Channels of the input.
        out_features: Channels of the output.
    """

    bytes: ClassVar[float | None] = None
    storage: ClassVar[torch.dtype | None] = None
    repacks: ClassVar[bool] = True

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        reason = self.refusal(weight_OI)
        if reason is not None:
            raise UserError(f"{type(self).__name__} cannot hold these weights: {reason}. Choose another precision.")
        self.out_features, self.in_features = weight_OI.shape
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)
        self.dtype, self.device = weight_OI.dtype, weight_OI.device
        self._rows_OI: Tensor | None = None
        self._parts: dict[tuple[tuple[int, int], ...], Product] = {}

    @classmethod
    @abstractmethod
    def refusal(cls, weight_OI: Tensor) -> str | None:
        """Why these weights cannot be held so on this machine; None if they can."""

    @abstractmethod
    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product of ``x[..., I]``, and a bias."""

    def forward(self, x: Tensor) -> Tensor:
        """The product and the layer's own bias."""
        return self.multiply(x, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """The same, without the machinery of hooks, which takes as long as a small product."""
        return self.multiply(x, self.bias)

    def part(self, x: Tensor, *spans: tuple[int, int]) -> Tensor:
        """Some channels of the output and no others: those of each ``[start, stop)``, in this order.

        The first call makes a product of their weights, which is kept.
        """
        if spans not in self._parts:
            weight_OI = self.dense()
            bias_O = None if self.bias is None else torch.cat([self.bias[slice(*span)] for span in spans])
            self._parts[spans] = type(self)(torch.cat([weight_OI[slice(*span)] for span in spans]), bias_O)
        return self._parts[spans](x)

    def rows(self, channels_C: Tensor | slice) -> Tensor:
        """The weights ``[C, I]`` of some output channels, gathered from a copy that the first call makes."""
        if self._rows_OI is None:
            self._rows_OI = self.dense() if self.storage is None else self.dense().to(self.storage)
        if isinstance(channels_C, slice):
            return self._rows_OI[channels_C].to(self.dtype)
        return self._rows_OI.index_select(0, channels_C).to(self.dtype)  # an eighth of the time of brackets

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weights ``[O, I]`` that it multiplies with: what it makes of the identity."""
        return self.multiply(torch.eye(self.in_features, dtype=self.dtype, device=self.device), None).t().contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Product:
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (moved.device, moved.dtype) != (self.device, self.dtype):
            raise UserError(
                f"Packed weights stay where they were made, on {self.device} for {self.dtype}; they were sent to "
                f"{moved.device}, {moved.dtype}. Load the model with the device and the dtype it is to have."
            )
        return self


@final
class Rows(Product):
    """The weights in their own dtype, those of an output channel together, as a linear layer holds them."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O)
        self._weight_OI = weight_OI.detach()

    @classmethod
    def refusal(cls, weight_OI: Tensor) -> str | None:
        """Never."""
        return None

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product."""
        return F.linear(x, self._weight_OI, bias_O)


@final
class Columns(Product):
    """The weights in their own dtype, those of an input channel together. Some machines read them faster so."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O)
        self._weight_IO = weight_OI.detach().t().contiguous()

    @classmethod
    def refusal(cls, weight_OI: Tensor) -> str | None:
        """Never."""
        return None

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product."""
        y = x @ self._weight_IO
        return y if bias_O is None else y + bias_O


@final
class Float16(Product):
    """Weights in float16, rows and sums in float32, by FBGEMM, which is a part of torch on x86 processors.

    torch calls FBGEMM in two ways. One takes 1 microsecond beside the product and runs on one thread; the other shares
    the product among threads and takes 10. So a small matrix and few rows go the first way, if there are any threads.
    """

    bytes = 2.0
    storage = torch.float16

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O)
        weight_OI, threads = weight_OI.detach().contiguous(), torch.get_num_threads() > 1
        self._few = FEW_ROWS * self.in_features if threads else sys.maxsize
        self._alone = self._shared = None
        if not threads or weight_OI.numel() < LARGE:
            self._alone = pack_alone(weight_OI)
        if threads:
            self._shared = torch.ops.quantized.linear_prepack_fp16(weight_OI, None)

    @classmethod
    def refusal(cls, weight_OI: Tensor) -> str | None:
        """Needs FBGEMM, a CPU, float32 weights that float16 has room for."""
        if weight_OI.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
            return "FBGEMM, which multiplies with float16 weights, runs on x86 processors alone"
        if PRODUCT is None or SHARED is None:
            return f"torch {torch.__version__} no longer has FBGEMM's products with float16 weights"
        if weight_OI.dtype != torch.float32:
            return f"the model runs in {str(weight_OI.dtype).removeprefix('torch.')}, and float32 is wanted"
        if weight_OI.numel() and not weight_OI.abs().max() <= FLOAT16_MAX:
            return f"the largest weight is {weight_OI.abs().max():.3g}, and float16 ends at {FLOAT16_MAX:.0f}"
        return None

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product."""
        if self._alone is not None and x.numel() <= self._few:
            return PRODUCT(x, self._alone, bias_O)
        y = SHARED(x, self._shared)
        return y if bias_O is None else y + bias_O


def pack_alone(weight_OI: Tensor) -> Tensor:
    """Weights as ``PRODUCT`` takes them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fbgemm", UserWarning)  # deprecated: hence ``refusal``
        packed = torch.fbgemm_pack_gemm_matrix_fp16(weight_OI)
        PRODUCT(weight_OI.new_zeros(1, weight_OI.shape[1]), packed, None)  # it warns once
    return packed


@final
class BFloat16(Product):
    """Weights and rows in bfloat16: fast where the processor multiplies it (AVX512-BF16, AMX), coarse everywhere."""

    bytes = 2.0
    storage = torch.bfloat16

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O)
        self._weight_OI = weight_OI.detach().to(torch.bfloat16)

    @classmethod
    def refusal(cls, weight_OI: Tensor) -> str | None:
        """Never; it may be slow."""
        return None

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product; the bias is added in the dtype of ``x``."""
        y = F.linear(x.to(torch.bfloat16), self._weight_OI).to(x.dtype)
        return y if bias_O is None else y + bias_O


@final
class Int8(Product):
    """Weights in eight bits with a scale for each output channel, rows in bfloat16, by torch's own kernel on a CPU."""

    bytes = 1.0
    storage = torch.bfloat16
    repacks = False
    group: ClassVar[int] = 16

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O)
        scale_O1 = weight_OI.detach().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        self._weight_OI = (weight_OI.detach() / scale_O1).round().to(torch.int8)
        self._scale_O = scale_O1[:, 0].to(torch.bfloat16)

    @classmethod
    def refusal(cls, weight_OI: Tensor) -> str | None:
        """Needs a CPU, and input channels in groups: the kernel reads past the end of any others."""
        if weight_OI.device.type != "cpu":
            return "its kernel runs on a CPU"
        if not hasattr(torch, "_weight_int8pack_mm"):
            return f"torch {torch.__version__} has no _weight_int8pack_mm"
        if weight_OI.shape[1] % cls.group:
            return f"a matrix of {tuple(weight_OI.shape)} does not divide into groups of {cls.group} input channels"
        return None

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product; the bias is added in the dtype of ``x``."""
        rows_NI = x.reshape(-1, self.in_features).to(torch.bfloat16)
        y_NO = torch._weight_int8pack_mm(  # pyright: ignore[reportPrivateImportUsage]
            rows_NI, self._weight_OI, self._scale_O
        ).to(x.dtype)
        y = y_NO.view(*x.shape[:-1], self.out_features)
        return y if bias_O is None else y + bias_O


@final
class Int4(Product):
    """Weights in four bits with a scale and an offset for each group of a channel, by torch's own kernel on a CPU."""

    bytes = 0.5 + 4 / 32
    storage = torch.float32
    repacks = False
    group: ClassVar[int] = 32

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O)
        groups_OGC = weight_OI.detach().unflatten(1, (-1, self.group))
        low_OG1, high_OG1 = groups_OGC.aminmax(dim=2, keepdim=True)
        scale_OG1 = ((high_OG1 - low_OG1) / 15).clamp_min(1e-12).to(torch.bfloat16).float()
        offset_OG1 = (low_OG1 + 8 * scale_OG1).to(torch.bfloat16).float()  # the kernel counts from -8
        codes_OGC = ((groups_OGC - offset_OG1) / scale_OG1 + 8).round().clamp(0, 15).to(torch.int32)
        self._weight: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OGC.flatten(1), 1)
        scales_OG2 = torch.cat([scale_OG1, offset_OG1], 2)
        self._scales_GO2 = scales_OG2.transpose(0, 1).contiguous().to(torch.bfloat16)

    @classmethod
    def refusal(cls, weight_OI: Tensor) -> str | None:
        """Needs a CPU and channels that divide into groups."""
        if weight_OI.device.type != "cpu":
            return "its kernel runs on a CPU"
        if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
            return f"torch {torch.__version__} has no _convert_weight_to_int4pack_for_cpu"
        if weight_OI.shape[1] % cls.group or weight_OI.shape[0] % 16:
            return f"a matrix of {tuple(weight_OI.shape)} does not divide into groups of {cls.group} and rows of 16"
        return None

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product; the bias is added in the dtype of ``x``."""
        rows_NI = x.reshape(-1, self.in_features).to(torch.bfloat16)
        y_NO = torch.ops.aten._weight_int4pack_mm_for_cpu(rows_NI, self._weight, self.group, self._scales_GO2)
        y = y_NO.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if bias_O is None else y + bias_O
