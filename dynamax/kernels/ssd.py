"""Mamba-2's scan (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060).

For each head a state ``s_PN``, with one decay a head and position::

    s_t = exp(dt_t * a) * s_(t-1) + dt_t * x_t b_t'        y_t = s_t c_t

P counts the channels of a head, G the groups of heads that share b and c, Q the positions of a chunk.
``chunked`` is exact at any chunk size; ``steps`` takes few positions one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynamax.kernels import backend, kernel

CHUNK = 64
KERNEL_CHUNK = 64

FEW = 5
"""Positions up to which one by one is no slower than a chunk on a CPU, whose small products have their overhead."""

LARGE = 1 << 16
"""Values of state from which on a product with a vector is slower than its two elementwise operations."""


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
    y_BTHP, states = scan_states(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN)
    return y_BTHP, states[-1]


def scan_states(
    x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``scan``; in place of the last state those after every position where they cost nothing, else the last alone."""
    length, on_torch = x_BTHP.shape[1], backend("mamba_ssm", x_BTHP.device, x_BTHP.dtype) == "torch"
    if length == 1 or (on_torch and length <= FEW):
        return steps(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN)
    run = chunked if on_torch else by_kernel
    y_BTHP, state_BHPN = run(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN)
    return y_BTHP, (state_BHPN,)


def steps(
    x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``scan`` position by position, with the states after all of them. K counts the heads of a group.

    On a CPU a product with a vector runs on one thread, so a large state is multiplied and summed by all.
    """
    rows, length, heads, channels = x_BTHP.shape
    groups, size = b_BTGN.shape[2:]
    decay_BTGK11 = (dt_BTH * a_H).exp().reshape(rows, length, groups, -1, 1, 1)
    x_BTGKP1 = (x_BTHP * dt_BTH.unsqueeze(-1)).reshape(rows, length, groups, -1, channels, 1)
    b_BTG11N = b_BTGN.reshape(rows, length, groups, 1, 1, size)
    state_BGKPN, states, parts = state_BHPN.reshape(rows, groups, -1, channels, size), [], []
    large = state_BHPN.numel() > LARGE
    for decay, x, b, c_BGN in zip(*(z.unbind(1) for z in (decay_BTGK11, x_BTGKP1, b_BTG11N, c_BTGN)), strict=True):
        state_BGKPN = (state_BGKPN * decay).addcmul_(x, b)
        states.append(state_BGKPN.reshape(rows, heads, channels, size))
        if large:
            y = (state_BGKPN * c_BGN.reshape(rows, groups, 1, 1, size)).sum(-1)
        else:
            y = torch.bmm(state_BGKPN.reshape(rows * groups, -1, size), c_BGN.reshape(rows * groups, size, 1))
        parts.append(y.reshape(rows, 1, heads, channels))
    return (parts[0] if length == 1 else torch.cat(parts, 1)), tuple(states)


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
    groups, size = b_BTGN.shape[2:]
    parts = []
    for x_BQHP, dt_BQH, b_BQGN, c_BQGN in zip(
        *(rows.split(chunk, 1) for rows in (x_BTHP, dt_BTH, b_BTGN, c_BTGN)), strict=True
    ):
        length = x_BQHP.shape[1]
        total_BHQ = (dt_BQH * a_H).cumsum(1).transpose(1, 2)
        left_BHQQ, carried_BHQ = decays(total_BHQ), total_BHQ.exp()
        x_BHQP = (x_BQHP * dt_BQH.unsqueeze(-1)).transpose(1, 2)
        # groups of all rows of the batch are the products' batch
        b_GQN, c_GQN = (z.transpose(1, 2).reshape(batch * groups, length, size) for z in (b_BQGN, c_BQGN))

        scores_GQQ = torch.bmm(c_GQN, b_GQN.transpose(1, 2)).reshape(batch, groups, 1, length, length)
        weights_HQQ = (left_BHQQ.unflatten(1, (groups, -1)) * scores_GQQ).reshape(batch * heads, length, length)
        own_BHQP = torch.bmm(weights_HQQ, x_BHQP.reshape(batch * heads, length, channels)).reshape(x_BHQP.shape)
        before_GSQ = torch.bmm(state_BHPN.reshape(batch * groups, -1, size), c_GQN.transpose(1, 2))
        before_BHQP = before_GSQ.reshape(batch, heads, channels, length).transpose(2, 3)
        parts.append(torch.addcmul(own_BHQP, before_BHQP, carried_BHQ.unsqueeze(-1)).transpose(1, 2))

        last_BHPQ = (x_BHQP * left_BHQQ[..., -1, :].unsqueeze(-1)).transpose(2, 3)
        written_GSN = torch.bmm(last_BHPQ.reshape(batch * groups, -1, length), b_GQN)
        state_BHPN = torch.addcmul(written_GSN.reshape(state_BHPN.shape), state_BHPN, carried_BHQ[..., -1:, None])
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
