"""Mamba-1's scan against the recurrence written out, in float64."""

import pytest
import torch
from torch.nn import functional as F

from dynamax.kernels import selective
from dynamax.kernels.selective import FEW, by_kernel, chunked, scan, scan_states
from tests.kernels.installed import install

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(*, rows=2, length=23, channels=6, d_state=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, dt = draw(rows, length, channels), F.softplus(draw(rows, length, channels))
    b, c = draw(rows, length, d_state), draw(rows, length, d_state)
    return x, dt, -draw(channels, d_state).exp(), b, c, draw(rows, channels, d_state)


def looped(x, dt, a, b, c, state):
    """The recurrence, a position at a time."""
    out = []
    for t in range(x.shape[1]):
        decay = torch.exp(torch.einsum("bc,cn->bcn", dt[:, t], a))
        state = decay * state + torch.einsum("bc,bc,bn->bcn", dt[:, t], x[:, t], b[:, t])
        out.append(torch.einsum("bcn,bn->bc", state, c[:, t]))
    return torch.stack(out, 1), state


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("length", [1, 2, 7, 23])
def test_chunked_scan_is_the_recurrence(chunk, length):
    arguments = inputs(length=length)
    for given, wanted in zip(chunked(*arguments, chunk=chunk), looped(*arguments), strict=True):
        torch.testing.assert_close(given, wanted, **EXACT)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("length", [1, 2, FEW, FEW + 1])
def test_few_positions_give_every_state(length, fresh):
    x, dt, a, b, c, state = inputs(length=length)
    y, states = scan_states(x, dt, a, b, c, None if fresh else state)
    state = torch.zeros_like(state) if fresh else state
    torch.testing.assert_close(y, looped(x, dt, a, b, c, state)[0], **EXACT)
    assert len(states) == (length if length <= FEW else 1)
    for stop, given in enumerate(states, length + 1 - len(states)):
        wanted = looped(x[:, :stop], dt[:, :stop], a, b[:, :stop], c[:, :stop], state)[1]
        torch.testing.assert_close(given, wanted, **EXACT)


def test_strong_decay_is_exact():
    """Products of decays underflow to zero; nothing is divided by them."""
    x, dt, a, b, c, state = inputs()
    a = a * 500
    for given, wanted in zip(chunked(x, dt, a, b, c, state), looped(x, dt, a, b, c, state), strict=True):
        torch.testing.assert_close(given, wanted, **EXACT)


def test_gradients_are_those_of_the_recurrence():
    tensors = [z.requires_grad_() for z in inputs(rows=1, length=5, channels=2, d_state=2)]
    assert torch.autograd.gradcheck(lambda *z: chunked(*z, chunk=4), tensors)


def from_zeros(u, delta, A, B, C, *, return_last_state):
    """What the compiled kernel computes: positions last, and no state to start from."""
    assert return_last_state
    x, dt, b, c = (z.transpose(1, 2) for z in (u, delta, B, C))
    y, state = looped(x, dt, A, b, c, torch.zeros(x.shape[0], *A.shape, dtype=x.dtype))
    return y.transpose(1, 2), state


def test_the_kernel_is_continued_from_a_live_state(monkeypatch):
    install(monkeypatch, selective, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=from_zeros)
    arguments = inputs()
    for given, wanted in zip(by_kernel(*arguments), looped(*arguments), strict=True):
        torch.testing.assert_close(given, wanted, **EXACT)
    for given, wanted in zip(scan(*arguments), looped(*arguments), strict=True):
        torch.testing.assert_close(given, wanted, **EXACT)
    *rows, state = arguments
    for given, wanted in zip(scan(*rows, None), looped(*rows, torch.zeros_like(state)), strict=True):
        torch.testing.assert_close(given, wanted, **EXACT)


def test_no_state_is_a_state_of_zeros():
    *rows, state = inputs()
    for given, wanted in zip(chunked(*rows, None), looped(*rows, torch.zeros_like(state)), strict=True):
        torch.testing.assert_close(given, wanted, **EXACT)
