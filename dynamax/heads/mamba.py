"""A Mamba-2 block: convolution, selective scan, gate. Knows no exit; its state lives in a ``Memory``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.errors import UserError
from dynamax.heads.blocks import positive, rms_normalize
from dynamax.kernels.convolution import convolve
from dynamax.kernels.ssd import scan
from dynamax.types import Memory


class MambaBlock(nn.Module):
    """A Mamba-2 block up to, and without, its output projection.

    One projection gives gate, input, B, C and step; a depthwise convolution runs over input, B and C;
    then the scan, the skip ``D * x``, and the gated norm. Initialised as Mamba-2 is: decay rates
    uniform in [1, 16] and steps log-uniform in [0.001, 0.1], so that the heads start with memories of
    about one to a thousand positions; ``D`` at 1, so that the input passes from the first step.

    Args:
        width: Size of the input.
        d_state: State size N of each channel.
        d_conv: Positions the convolution sees.
        expand: Inner width as a multiple of ``width``.
        headdim: Channels of a head, P.

    Raises:
        UserError: If an option is not positive, or the heads do not divide the inner width.
    """

    def __init__(self, width: int, *, d_state: int, d_conv: int, expand: int, headdim: int) -> None:
        super().__init__()
        self.d_inner = width * positive("expand", expand)
        self.d_state = positive("d_state", d_state)
        if self.d_inner % positive("headdim", headdim):
            raise UserError(
                f"A Mamba block of inner width {self.d_inner} ({expand} x {width}) was given headdim {headdim}, which "
                f"does not divide it. Choose a headdim that does."
            )
        self.heads = self.d_inner // headdim
        self.channels = self.d_inner + 2 * d_state
        self.state = self.d_inner * d_state + (d_conv - 1) * self.channels
        self.in_proj = nn.Linear(width, self.d_inner + self.channels + self.heads, bias=False)
        self.conv = nn.Conv1d(self.channels, self.channels, positive("d_conv", d_conv), groups=self.channels)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1.0, 16.0).log())
        dt = torch.empty(self.heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt back
        self.D = nn.Parameter(torch.ones(self.heads))

    def forward(self, x_BTD: Tensor, memory: Memory | None = None) -> Tensor:
        """``x_BTD`` to normed inner states ``[B, T, d_inner]``, continued from ``memory``."""
        z, xbc, dt = self.in_proj(x_BTD).split([self.d_inner, self.channels, self.heads], -1)
        dt_BTH = F.softplus(dt + self.dt_bias)
        live_BT = None if memory is None else memory.live(x_BTD.shape[1])
        if live_BT is not None:
            xbc = xbc.masked_fill(~live_BT[..., None], 0.0)
            dt_BTH = dt_BTH.masked_fill(~live_BT[..., None], 0.0)
        past = {} if memory is None else memory.values
        weight, bias = self.conv.weight[:, 0], self.conv.bias
        xbc, window_BWC = convolve(xbc, past.get("window"), weight, bias)
        x, b, c = F.silu(xbc).split([self.d_inner, self.d_state, self.d_state], -1)
        x_BTHP = x.unflatten(-1, (self.heads, -1))
        state_BHPN = past.get("state")
        if state_BHPN is None:
            state_BHPN = x.new_zeros(x.shape[0], *x_BTHP.shape[2:], self.d_state)
        y_BTHP, state_BHPN = scan(x_BTHP, dt_BTH, -self.A_log.exp(), b[:, :, None], c[:, :, None], state_BHPN)
        if memory is not None:
            memory.values = {"window": window_BWC, "state": state_BHPN}
        y = (y_BTHP + self.D[:, None] * x_BTHP).flatten(-2) * F.silu(z)
        return rms_normalize(y, y.dtype)

    def flops(self) -> int:
        """Of one position: projection, convolution, and writing and reading the state; the decay is left out."""
        projected = self.in_proj.in_features * self.in_proj.out_features
        return 2 * (projected + self.conv.kernel_size[0] * self.channels + 2 * self.d_inner * self.d_state)
