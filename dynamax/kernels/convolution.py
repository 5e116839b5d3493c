"""Causal depthwise convolution that continues from the positions before it. C counts channels, W the window."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax.kernels import at_least_float32, backend, kernel

FEW = 16
"""Positions up to which all taps at once are faster."""


def earlier_windows(x_BTC: Tensor, window_BWC: Tensor) -> tuple[Tensor, ...]:
    """The windows after each of T positions but the last, whose window ``convolve`` gives."""
    length, width = x_BTC.shape[1], window_BWC.shape[1]
    whole_BTC = torch.cat([window_BWC, x_BTC[:, : length - 1]], 1) if length > 1 else window_BWC
    return tuple(whole_BTC[:, stop : stop + width] for stop in range(1, length))


def convolve(
    x_BTC: Tensor, window_BWC: Tensor | None, weight_CK: Tensor, bias_C: Tensor | None, ends_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve T positions, each with the K - 1 before it.

    Args:
        x_BTC: Inputs.
        window_BWC: The K - 1 inputs before the first; None for zeros.
        weight_CK: Taps of each channel, the newest input's last.
        bias_C: Added, or None.
        ends_B: How many positions of each row are its own; padding stands behind them. None if all are.

    Returns:
        Outputs ``[B, T, C]``, and the window that the next positions need.
    """
    length, taps = x_BTC.shape[1], weight_CK.shape[1]
    if window_BWC is None:
        window_BWC = x_BTC.new_zeros(x_BTC.shape[0], taps - 1, x_BTC.shape[2])
    whole_BTC = torch.cat([window_BWC, x_BTC], 1)
    window = whole_BTC[:, length:]
    if ends_B is not None:
        last_BW = ends_B[:, None] + torch.arange(taps - 1, device=ends_B.device)
        window = whole_BTC.take_along_dim(last_BW[..., None], 1)
    compiled = length > 1 and 2 <= taps <= 4 and x_BTC.shape[2] % 8 == 0  # what the kernel takes
    if compiled and backend("causal_conv1d", x_BTC.device, x_BTC.dtype) != "torch":
        causal_conv1d_fn = kernel("causal_conv1d", "causal_conv1d_fn")
        x_BCT, window_BCW = x_BTC.contiguous().transpose(1, 2), window_BWC.contiguous().transpose(1, 2)
        return causal_conv1d_fn(x_BCT, weight_CK, bias_C, initial_states=window_BCW).transpose(1, 2), window
    whole_BTC, weight_CK = at_least_float32(whole_BTC), at_least_float32(weight_CK)
    if length == 1:
        y_BTC = (whole_BTC * weight_CK.t()).sum(1, keepdim=True)
    elif length <= FEW:  # on a CPU a grouped convolution costs more (benchmarks.chunks)
        y_BTC = (whole_BTC.unfold(1, taps, 1) * weight_CK).sum(-1)
    else:  # a tap at a time needs a quarter of the room
        y_BTC = whole_BTC[:, :length] * weight_CK[:, 0]
        for tap in range(1, taps):
            y_BTC = torch.addcmul(y_BTC, whole_BTC[:, tap : tap + length], weight_CK[:, tap])
    return (y_BTC if bias_C is None else y_BTC + bias_C).to(x_BTC.dtype), window
