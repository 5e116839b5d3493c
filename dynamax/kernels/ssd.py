"""Mamba-2's scan (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060).

For each head a state ``s_PN``, with one decay a head and position::

    s_t = exp(dt_t * a) * s_(t-1) + dt_t * x_t b_t'        y_t = s_t c_t

P counts the channels of a head, G the groups of heads that share b and c, Q the positions of a chunk.
``chunked`` is exact at any chunk size; ``step`` is one position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynamax.kernels import backend, kernel

CHUNK = 64
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
    rows, _, heads, channels = x_B1HP.shape
    groups, size = b_B1GN.shape[2:]
    decay_BH11 = (dt_B1H * a_H).exp().reshape(rows, heads, 1, 1)
    x_BGS1 = (x_B1HP * dt_B1H.unsqueeze(-1)).reshape(rows, groups, -1, 1)  # S: heads and channels of a group
    kept_BGSN = (state_BHPN * decay_BH11).reshape(rows, groups, -1, size)
    state_BGSN = torch.addcmul(kept_BGSN, x_BGS1, b_B1GN.reshape(rows, groups, 1, size))
    y_GS1 = torch.bmm(state_BGSN.reshape(rows * groups, -1, size), c_B1GN.reshape(rows * groups, size, 1))
    return y_GS1.reshape(rows, 1, heads, channels), state_BGSN.reshape(rows, heads, channels, size)


def decays(total_T: Tensor) -> Tensor:
    """``[..., i, j]``: how much of position j is left at i, from the summed logs of the decays; 0 for j > i."""
    between = total_T[..., :, None] - total_T[..., None, :]
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
    """``scan`` as matrix products: the positions of a chunk all at once, chunks in turn.

    S counts the heads and channels of a group: they share b and c.
    """
    batch, _, heads, channels = x_BTHP.shape
    groups = b_BTGN.shape[2]
    parts = []
    for x_BQHP, dt_BQH, b_BQGN, c_BQGN in zip(
        *(rows.split(chunk, 1) for rows in (x_BTHP, dt_BTH, b_BTGN, c_BTGN)), strict=True
    ):
        total_BHQ = (dt_BQH * a_H).cumsum(1).transpose(1, 2)
        left_BHQQ = decays(total_BHQ)
        x_BHQP = (x_BQHP * dt_BQH[..., None]).transpose(1, 2)

        scores_BGQQ = c_BQGN.transpose(1, 2) @ b_BQGN.permute(0, 2, 3, 1)
        weights_BHQQ = (left_BHQQ.unflatten(1, (groups, -1)) * scores_BGQQ[:, :, None]).flatten(1, 2)
        carried_BGSQ = state_BHPN.reshape(batch, groups, -1, state_BHPN.shape[-1]) @ c_BQGN.permute(0, 2, 3, 1)
        carried_BHQP = carried_BGSQ.reshape(batch, heads, channels, -1).transpose(2, 3)
        y_BHQP = torch.addcmul(weights_BHQQ @ x_BHQP, carried_BHQP, total_BHQ.exp()[..., None])
        parts.append(y_BHQP.transpose(1, 2))

        last_BHPQ = (x_BHQP * left_BHQQ[..., -1, :, None]).transpose(2, 3)
        written_BGSN = last_BHPQ.reshape(batch, groups, -1, x_BQHP.shape[1]) @ b_BQGN.transpose(1, 2)
        left_BH11 = total_BHQ[..., -1].exp()[..., None, None]
        state_BHPN = torch.addcmul(written_BGSN.reshape(state_BHPN.shape), state_BHPN, left_BH11)
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), state_BHPN


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
