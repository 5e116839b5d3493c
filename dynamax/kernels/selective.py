"""Mamba-1's scan (Gu and Dao, "Mamba", arXiv 2312.00752).

For each channel a state ``s_N``, with a decay for every entry of it::

    s_t = exp(dt_t * a) * s_(t-1) + dt_t * x_t b_t        y_t = s_t . c_t

C counts channels, Q the positions of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax.kernels import backend, kernel

CHUNK = 16
"""Positions scanned at once; more cost more passes over the states, fewer more calls."""

FEW = 16
"""Positions up to which one by one is faster on a CPU: half of what a chunk takes at 16 positions."""


def scan(
    x_BTC: Tensor, dt_BTC: Tensor, a_CN: Tensor, b_BTN: Tensor, c_BTN: Tensor, state_BCN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Continue the recurrence over T positions.

    Args:
        x_BTC: Inputs.
        dt_BTC: Step sizes, at least 0.
        a_CN: Decay rates, negative.
        b_BTN: What of the state an input is written to.
        c_BTN: What of the state is read.
        state_BCN: The state before the first position; None for zeros.

    Returns:
        ``y_BTC`` and the state after the last position.
    """
    y_BTC, states = scan_states(x_BTC, dt_BTC, a_CN, b_BTN, c_BTN, state_BCN)
    return y_BTC, states[-1]


def scan_states(
    x_BTC: Tensor, dt_BTC: Tensor, a_CN: Tensor, b_BTN: Tensor, c_BTN: Tensor, state_BCN: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``scan``; in place of the last state those after every position where they cost nothing, else the last alone."""
    length, on_torch = x_BTC.shape[1], backend("mamba_ssm", x_BTC.device, x_BTC.dtype) == "torch"
    if length == 1 or (on_torch and length <= FEW):
        return steps(x_BTC, dt_BTC, a_CN, b_BTN, c_BTN, state_BCN)
    run = chunked if on_torch else by_kernel
    y_BTC, state_BCN = run(x_BTC, dt_BTC, a_CN, b_BTN, c_BTN, state_BCN)
    return y_BTC, (state_BCN,)


def steps(
    x_BTC: Tensor, dt_BTC: Tensor, a_CN: Tensor, b_BTN: Tensor, c_BTN: Tensor, state_BCN: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``scan`` position by position, with the states after all of them."""
    decay_BTCN = (dt_BTC.unsqueeze(-1) * a_CN).exp()
    written_BTCN = (x_BTC * dt_BTC).unsqueeze(-1) * b_BTN.unsqueeze(2)
    states: list[Tensor] = []
    parts: list[Tensor] = []
    for decay_BCN, written_BCN, c_BN in zip(*(z.unbind(1) for z in (decay_BTCN, written_BTCN, c_BTN)), strict=True):
        after_BCN = written_BCN if state_BCN is None else torch.addcmul(written_BCN, decay_BCN, state_BCN)
        states.append(after_BCN)
        parts.append(torch.bmm(after_BCN, c_BN.unsqueeze(-1)).transpose(1, 2))
        state_BCN = after_BCN
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), tuple(states)


def chunked(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    a_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    state_BCN: Tensor | None,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """``scan``: chunks in turn, the positions of a chunk by doubling (Hillis and Steele), log2(Q) passes.

    Only products of decays are taken, all at most 1, and nothing is divided.
    """
    written_BTC, parts = x_BTC * dt_BTC, []
    if state_BCN is None:
        state_BCN = x_BTC.new_zeros(len(x_BTC), *a_CN.shape)
    for start in range(0, x_BTC.shape[1], chunk):
        part = slice(start, start + chunk)
        decay_BQCN = (dt_BTC[:, part, :, None] * a_CN).exp()
        states_BQCN = written_BTC[:, part, :, None] * b_BTN[:, part, None]
        first_BCN = torch.addcmul(states_BQCN[:, 0], decay_BQCN[:, 0], state_BCN)
        states_BQCN = torch.cat([first_BCN[:, None], states_BQCN[:, 1:]], 1)
        reach, length = 1, states_BQCN.shape[1]
        while reach < length:
            later = torch.addcmul(states_BQCN[:, reach:], decay_BQCN[:, reach:], states_BQCN[:, :-reach])
            states_BQCN = torch.cat([states_BQCN[:, :reach], later], 1)
            decay_BQCN = torch.cat([decay_BQCN[:, :reach], decay_BQCN[:, reach:] * decay_BQCN[:, :-reach]], 1)
            reach *= 2
        parts.append((states_BQCN @ c_BTN[:, part, :, None])[..., 0])
        state_BCN = states_BQCN[:, -1]
    return torch.cat(parts, 1), state_BCN


def by_kernel(
    x_BTC: Tensor, dt_BTC: Tensor, a_CN: Tensor, b_BTN: Tensor, c_BTN: Tensor, state_BCN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``scan`` by the compiled kernel of ``mamba_ssm``; CUDA tensors only. No gradient flows through the last state.

    The kernel starts from zeros. The recurrence is linear in its state, so what the live state adds is
    added to the kernel's answer: ``c_t exp(a (dt_1 + ... + dt_t)) s_0``, few positions at a time.
    """
    selective_scan_fn = kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    x, dt, b, c = (z.transpose(1, 2).contiguous() for z in (x_BTC, dt_BTC, b_BTN, c_BTN))
    y_BCT, written_BCN = selective_scan_fn(x, dt.to(x.dtype), a_CN, b, c, return_last_state=True)
    y_BTC = y_BCT.transpose(1, 2)
    if state_BCN is None:
        return y_BTC, written_BCN
    total_BTC, carried = dt_BTC.cumsum(1), []
    for total_BQC, c_BQN in zip(total_BTC.split(CHUNK, 1), c_BTN.to(state_BCN.dtype).split(CHUNK, 1), strict=True):
        left_BQCN = (total_BQC[..., None] * a_CN).exp() * state_BCN[:, None]
        carried.append((left_BQCN @ c_BQN[..., None])[..., 0])
    left_BCN = (total_BTC[:, -1, :, None] * a_CN).exp()
    return y_BTC + torch.cat(carried, 1), torch.addcmul(written_BCN, left_BCN, state_BCN)
