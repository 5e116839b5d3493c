"""Causal depthwise convolution that continues from the positions before it. C counts channels, W the window."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax.kernels.backend import at_least_float32, backend, kernel

FEW = 16
"""Positions up to which all taps at once are faster."""


def convolve(
    x_BTC: Tensor, window_BWC: Tensor | None, weight_CK: Tensor, bias_C: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convolve T positions, each with the K - 1 before it.

    Args:
        x_BTC: Inputs.
        window_BWC: The K - 1 inputs before the first; None for zeros.
        weight_CK: Taps of each channel, the newest input's last.
        bias_C: Added, or None.

    Returns:
        Outputs ``[B, T, C]``, and the window that the next positions need.
    """
    taps = weight_CK.shape[1]
    if window_BWC is None:
        window_BWC = x_BTC.new_zeros(x_BTC.shape[0], taps - 1, x_BTC.shape[2])
    whole_BTC = torch.cat([window_BWC, x_BTC], 1)
    window = whole_BTC[:, whole_BTC.shape[1] - taps + 1 :]
    if compiled(x_BTC, taps) and backend("causal_conv1d", x_BTC.device, x_BTC.dtype) != "torch":
        return _kernel(x_BTC, window_BWC, weight_CK, bias_C), window
    return _taps(whole_BTC, weight_CK, bias_C, x_BTC.shape[1]), window


def compiled(x_BTC: Tensor, taps: int) -> bool:
    """Whether the compiled kernel takes inputs of this shape: several positions, 2 to 4 taps, channels in eights."""
    return x_BTC.shape[1] > 1 and 2 <= taps <= 4 and x_BTC.shape[2] % 8 == 0


def _taps(whole_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, length: int) -> Tensor:
    """All taps of a few positions at once, of many a tap at a time, which needs a quarter of the room.

    A grouped convolution costs more over a few positions, on a CPU (``benchmarks.chunks``).
    """
    whole_BTC, weight_CK, dtype = at_least_float32(whole_BTC), at_least_float32(weight_CK), whole_BTC.dtype
    if length <= FEW:
        y_BTC = (whole_BTC.unfold(1, weight_CK.shape[1], 1) * weight_CK).sum(-1)
    else:
        y_BTC = whole_BTC[:, :length] * weight_CK[:, 0]
        for tap in range(1, weight_CK.shape[1]):
            y_BTC = torch.addcmul(y_BTC, whole_BTC[:, tap : tap + length], weight_CK[:, tap])
    return (y_BTC if bias_C is None else y_BTC + bias_C).to(dtype)


def _kernel(x_BTC: Tensor, window_BWC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    """The compiled kernel, which wants channels last and answers in the same layout."""
    causal_conv1d_fn = kernel("causal_conv1d", "causal_conv1d_fn")
    x_BCT, window_BCW = x_BTC.contiguous().transpose(1, 2), window_BWC.contiguous().transpose(1, 2)
    return causal_conv1d_fn(x_BCT, weight_CK, bias_C, initial_states=window_BCW).transpose(1, 2)
