"""Parts that gates are built of: norm, SwiGLU, attention, a Mamba-2 block, the last layer. Knows no site and no exit.

Everything here computes in the precision of its own parameters, whatever precision comes in.
No norm has learned scales: each stands before a linear map, which would absorb them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.errors import UserError
from dynamax.kernels.convolution import convolve
from dynamax.kernels.ssd import scan
from dynamax.types import Memory

ROTARY_BASE = 10_000.0


def rms_normalize(h_BTD: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide each position by its root mean square, computed in ``dtype``.

    Language models have activations a thousand times the typical one: without a norm, a head learns badly.
    """
    x_BTD = h_BTD.to(torch.promote_types(dtype, torch.float32))  # squares of large activations overflow in float16
    length_BT1 = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True)  # fewer operations than F.rms_norm on a CPU
    eps_1 = torch.full((1,), 1e-6, dtype=x_BTD.dtype, device=x_BTD.device)
    mean_BT1 = torch.addcmul(eps_1, length_BT1, length_BT1, value=1 / h_BTD.shape[-1])
    return (x_BTD * mean_BT1.rsqrt()).to(dtype)


def zero_init(width: int, outputs: int = 1) -> nn.Linear:
    """A head's last layer at zero: a gate starts at p = 0.5; a lens that adds to the state starts as the logit lens.

    A random start would only add noise; a gate's bias learns the base rate of an exit within a few steps.
    """
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return last


def input_projection(width: int, inner: int | None) -> tuple[nn.Module, int]:
    """The map into a gate's own width, and that width; the identity if ``inner`` is None."""
    if inner is None:
        return nn.Identity(), width
    return nn.Linear(width, positive("width", inner), bias=False), inner


def positive(name: str, value: int) -> int:
    """The value of an option; a UserError if it is less than 1."""
    if value < 1:
        raise UserError(f"{name} was given as {value}; it must be at least 1. Raise it, or leave it out.")
    return value


def swiglu_width(width: int) -> int:
    """The usual inner width of a SwiGLU feed-forward: 8/3 of ``width``, up to the next multiple of 64."""
    return -(-8 * width // 192) * 64


class SwiGLU(nn.Module):
    """The first half of a transformer's feed-forward: ``silu(gate(u)) * up(u)``.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, without its last map.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)

    def forward(self, u_BTD: Tensor) -> Tensor:
        """``u_BTD`` to the hidden layer, ``[B, T, hidden]``."""
        return F.silu(self.gate(u_BTD)) * self.up(u_BTD)


def rotate(x_BHTD: Tensor, first: int) -> Tensor:
    """Rotary position embedding of positions ``first`` onwards (Su et al., arXiv 2104.09864)."""
    length, size = x_BHTD.shape[2:]
    exact = torch.promote_types(x_BHTD.dtype, torch.float32)  # bfloat16 cannot count beyond 256
    place_T1 = torch.arange(first, first + length, device=x_BHTD.device, dtype=exact)[:, None]
    speed_D = ROTARY_BASE ** (-torch.arange(0, size, 2, device=x_BHTD.device, dtype=exact) / size)
    cos_TD, sin_TD = ((place_T1 * speed_D).cos().to(x_BHTD.dtype), (place_T1 * speed_D).sin().to(x_BHTD.dtype))
    left, right = x_BHTD.chunk(2, -1)
    return torch.cat([left * cos_TD - right * sin_TD, right * cos_TD + left * sin_TD], -1)


class CausalAttention(nn.Module):
    """Multi-head causal attention with rotary positions; keys and values live in a ``Memory``.

    Args:
        width: Size of input and output.
        heads: Attention heads; they divide the width into even sizes.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % (2 * positive("heads", heads)):
            raise UserError(
                f"Attention over width {width} was given {heads} heads; each head needs an even number of channels. "
                f"Choose heads so that width is a multiple of 2 * heads."
            )
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, memory: Memory | None = None) -> Tensor:
        """Each position attends to itself and to those before it; keys and values are added to the memory."""
        length = x_BTD.shape[1]
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        first = 0 if memory is None else memory.read
        q, k = rotate(q, first), rotate(k, first)
        live_BK: Tensor | None = None  # False on padding; None where nothing is padded
        if memory is not None:
            past, live_BK = memory.values, memory.live(length)
            if past:
                k, v = torch.cat([past["keys"], k], 2), torch.cat([past["values"], v], 2)
                live_BK = None if live_BK is None else torch.cat([past["live"], live_BK], 1)
            memory.values = {"keys": k, "values": v} | ({} if live_BK is None else {"live": live_BK})
        held = k.shape[2]
        seen: Tensor | None = None  # None where causality alone decides
        if live_BK is not None or 1 < length < held:
            rows_T1 = torch.arange(held - length, held, device=k.device)[:, None]
            keys_K = torch.arange(held, device=k.device)
            seen = (keys_K <= rows_T1)[None, None]
            if live_BK is not None:  # padding attends to itself: a row without keys gives NaN
                seen = (seen & live_BK[:, None, None]) | (keys_K == rows_T1)
        y_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None and length > 1)
        return self.out(y_BHTD.transpose(1, 2).flatten(-2))


class MambaBlock(nn.Module):
    """A Mamba-2 block up to, and without, its output projection.

    One projection gives gate, input, B, C and step; a depthwise convolution runs over input, B and C;
    then the scan, the skip ``D * x``, and the gated norm. Initialised as Mamba-2 is: decay rates uniform in [1, 16]
    and steps log-uniform in [0.001, 0.1], so that memories reach one to a thousand positions back; ``D`` at 1.

    Args:
        width: Size of the input.
        d_state: State size N of each channel.
        d_conv: Positions the convolution sees.
        expand: Inner width as a multiple of ``width``.
        headdim: Channels of a head, P; it divides the inner width.
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
        sizes = [self.d_inner, self.channels, self.heads]
        z, xbc, dt = torch.split_with_sizes(self.in_proj(x_BTD), sizes, -1)
        dt_BTH = F.softplus(dt + self.dt_bias)
        live_BT = None if memory is None else memory.live(x_BTD.shape[1])
        if live_BT is not None:
            xbc = xbc.masked_fill(~live_BT[..., None], 0.0)
            dt_BTH = dt_BTH.masked_fill(~live_BT[..., None], 0.0)
        past = {} if memory is None else memory.values
        weight, bias = self.conv.weight[:, 0], self.conv.bias
        xbc, window_BWC = convolve(xbc, past.get("window"), weight, bias)
        x, b, c = torch.split_with_sizes(F.silu(xbc), [self.d_inner, self.d_state, self.d_state], -1)
        x_BTHP = x.reshape(*x.shape[:2], self.heads, -1)
        state_BHPN = past.get("state")
        if state_BHPN is None:
            state_BHPN = x.new_zeros(x.shape[0], *x_BTHP.shape[2:], self.d_state)
        y_BTHP, state_BHPN = scan(x_BTHP, dt_BTH, -self.A_log.exp(), b.unsqueeze(2), c.unsqueeze(2), state_BHPN)
        if memory is not None:
            memory.values = {"window": window_BWC, "state": state_BHPN}
        y = torch.addcmul(y_BTHP, self.D.unsqueeze(-1), x_BTHP).reshape(*z.shape) * F.silu(z)
        return rms_normalize(y, y.dtype)


def transformer_block(
    x_BTD: Tensor, attention: CausalAttention, inner: SwiGLU, down: nn.Linear, memory: Memory | None
) -> Tensor:
    """Attention and feed-forward with their residuals, each behind a norm, then a norm."""
    x_BTD = x_BTD + attention(rms_normalize(x_BTD, x_BTD.dtype), memory)
    x_BTD = x_BTD + down(inner(rms_normalize(x_BTD, x_BTD.dtype)))
    return rms_normalize(x_BTD, x_BTD.dtype)
