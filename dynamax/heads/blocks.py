"""Parts that gates are built of: norm, SwiGLU, causal attention, the last layer. Knows no site and no exit.

Everything here computes in the precision of its own parameters, whatever precision comes in.
No norm has learned scales: each stands before a linear map, which would absorb them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.errors import UserError
from dynamax.types import Memory

ROTARY_BASE = 10_000.0


def rms_normalize(h_BTD: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide each position by its root mean square, computed in ``dtype``.

    Language models have activations a thousand times the typical one, so a head that takes the
    residual stream as it is learns badly.
    """
    return F.rms_norm(h_BTD.to(dtype), h_BTD.shape[-1:], eps=1e-6)


def zero_init(width: int) -> nn.Linear:
    """A gate's last layer, ``width`` to one logit, at zero.

    At zero every position starts at p = 0.5: a random start would only add noise for the bias and the
    layers below to unlearn, and the base rate, which differs with every exit and label, is learned by
    the bias within a few steps.
    """
    last = nn.Linear(width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return last


def input_projection(width: int, inner: int | None) -> tuple[nn.Module, int]:
    """The map into a gate's own width, and that width; the identity if ``inner`` is None.

    Raises:
        UserError: If ``inner`` is not positive.
    """
    if inner is None:
        return nn.Identity(), width
    return nn.Linear(width, positive("width", inner), bias=False), inner


def positive(name: str, value: int) -> int:
    """The value of an option that must be at least 1.

    Raises:
        UserError: If it is less.
    """
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
        heads: Attention heads; each has an even share of ``width``.

    Raises:
        UserError: If the heads do not divide the width into even sizes.
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
        """Each position attends to itself and to what came before, remembered positions included."""
        length = x_BTD.shape[1]
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        first = 0 if memory is None else memory.read
        q, k = rotate(q, first), rotate(k, first)
        seen: Tensor | None = None
        if memory is not None:
            k, v, live_BK = recall(memory, k, v)
            seen = mask(live_BK, length, k.shape[2], k.device)
        y_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None and length > 1)
        return self.out(y_BHTD.transpose(1, 2).flatten(-2))


def recall(memory: Memory, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """All keys and values so far, which of them are not padding (None: all), and the memory brought up to date."""
    past = memory.values
    live_BK = memory.live(k_BHTD.shape[2])
    if past:
        k_BHTD = torch.cat([past["keys"], k_BHTD], 2)
        v_BHTD = torch.cat([past["values"], v_BHTD], 2)
        live_BK = None if live_BK is None else torch.cat([past["live"], live_BK], 1)
    memory.values = {"keys": k_BHTD, "values": v_BHTD} | ({} if live_BK is None else {"live": live_BK})
    return k_BHTD, v_BHTD, live_BK


def mask(live_BK: Tensor | None, length: int, held: int, device: torch.device) -> Tensor | None:
    """Which of the ``held`` keys the newest ``length`` positions may attend to.

    Returns:
        Booleans ``[1 or B, 1, T, K]``, or None where causality alone decides.
    """
    if live_BK is None and (length == 1 or length == held):
        return None
    rows_T = torch.arange(held - length, held, device=device)
    keys_K = torch.arange(held, device=device)
    causal_TK = keys_K <= rows_T[:, None]
    if live_BK is None:
        return causal_TK[None, None]
    itself_TK = keys_K == rows_T[:, None]  # padding attends to itself: a row without keys is not a number
    return (causal_TK & live_BK[:, None, None]) | itself_TK
