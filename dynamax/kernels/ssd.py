"""Mamba-2's scan (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060).

For each head a state ``s_PN``, with one decay a head and position::

    s_t = exp(dt_t * a) * s_(t-1) + dt_t * x_t b_t'        y_t = s_t c_t

P counts the channels of a head, G the groups of heads that share b and c, R the heads of a group, J chunks
and Q the positions of a chunk. ``chunked`` is exact at any chunk size; ``step`` is one position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.kernels.backend import backend, kernel

CHUNK = 32
KERNEL_CHUNK = 64


def scan(
    x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """Continue the recurrence over T positions.

    Args:
        x_BTHP: Inputs.
        dt_BTH: Step sizes, at least 0; a step of 0 leaves the state as it is.
        a_H: Decay rates, negative.
        b_BTGN: What of the state an input is written to, shared by the heads of a group.
        c_BTGN: What of the state is read.
        state_BHPN: The state before the first position.

    Returns:
        ``y_BTHP`` and the state after the last position.
    """
    if x_BTHP.shape[1] == 1:
        return step(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN)
    if backend("mamba_ssm", x_BTHP.device, x_BTHP.dtype) != "torch":
        return by_kernel(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN)
    return chunked(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN)


def step(
    x_B1HP: Tensor, dt_B1H: Tensor, a_H: Tensor, b_B1GN: Tensor, c_B1GN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """``scan`` for one position."""
    groups = b_B1GN.shape[2]
    dt_BH1 = dt_B1H.transpose(1, 2)
    kept_BHPN = state_BHPN * (dt_BH1 * a_H[:, None]).exp()[..., None]
    x_BGS1 = (x_B1HP[:, 0] * dt_BH1).reshape(len(dt_BH1), groups, -1, 1)  # S: heads and channels of a group
    state_BGSN = torch.addcmul(kept_BHPN.reshape(*x_BGS1.shape[:3], -1), x_BGS1, b_B1GN.transpose(1, 2))
    y_BGS1 = state_BGSN @ c_B1GN[:, 0, ..., None]
    return y_BGS1.reshape(x_B1HP.shape), state_BGSN.reshape(state_BHPN.shape)


def decays(log_T: Tensor) -> Tensor:
    """``[..., i, j]``: how much of position j is left at i, the product of the decays after j up to i; 0 for j > i."""
    total = log_T.cumsum(-1)
    between = total[..., :, None] - total[..., None, :]
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=between.device).triu(1)
    return between.masked_fill(later, -math.inf).exp()


def chunked(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    state_BHPN: Tensor,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """``scan`` as matrix products: within chunks of ``chunk`` positions all at once, from chunk to chunk in turn.

    Positions that fill up the last chunk have a step of 0, so they change nothing.
    """
    length, groups = x_BTHP.shape[1], b_BTGN.shape[2]
    size = min(chunk, length)
    missing = -length % size
    x, log, b, c = (
        F.pad(z, (0, 0) * (z.dim() - 2) + (0, missing)).unflatten(1, (-1, size))
        for z in (x_BTHP * dt_BTH[..., None], dt_BTH * a_H, b_BTGN, c_BTGN)
    )
    x_BJGRQP = x.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    log_BJGRQ = log.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
    b_BJGQN, c_BJGQN = b.transpose(2, 3), c.transpose(2, 3)

    left_BJGRQQ = decays(log_BJGRQ)
    within_BJGRQP = ((c_BJGQN @ b_BJGQN.transpose(-1, -2))[:, :, :, None] * left_BJGRQQ) @ x_BJGRQP
    written_BJGRPN = (x_BJGRQP * left_BJGRQQ[..., -1, :, None]).transpose(-1, -2) @ b_BJGQN[:, :, :, None]
    since_BJGRQ = log_BJGRQ.cumsum(-1).exp()

    state_BGRPN = state_BHPN.unflatten(1, (groups, -1))
    before = []
    for j in range(x_BJGRQP.shape[1]):
        before.append(state_BGRPN)
        state_BGRPN = state_BGRPN * since_BJGRQ[:, j, :, :, -1, None, None] + written_BJGRPN[:, j]
    carried_BJGRQP = (c_BJGQN[:, :, :, None] @ torch.stack(before, 1).transpose(-1, -2)) * since_BJGRQ[..., None]
    y_BTHP = (within_BJGRQP + carried_BJGRQP).permute(0, 1, 4, 2, 3, 5).flatten(1, 2).flatten(2, 3)[:, :length]
    return y_BTHP, state_BGRPN.flatten(1, 2)


def by_kernel(
    x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """``scan`` by the Triton kernel of ``mamba_ssm``; CUDA tensors only."""
    combined = kernel("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    y_BTHP, state = combined(
        x_BTHP.contiguous(),
        dt_BTH.contiguous(),
        a_H,
        b_BTGN.contiguous(),
        c_BTGN.contiguous(),
        KERNEL_CHUNK,
        initial_states=state_BHPN.to(x_BTHP.dtype).contiguous(),
        return_final_states=True,
    )
    return y_BTHP, state.to(state_BHPN.dtype)  # the kernel gives its states in float32
