"""Mamba-2's scan against the recurrence written out, in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from dynamax.kernels import ssd
from dynamax.kernels.ssd import FEW, LARGE, chunked, decays, scan, scan_states, steps
from tests.kernels.installed import install

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(*, rows=2, length=11, heads=4, groups=2, headdim=4, d_state=5, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    dt = F.softplus(draw(rows, length, heads))
    b, c = draw(rows, length, groups, d_state), draw(rows, length, groups, d_state)
    return draw(rows, length, heads, headdim), dt, -draw(heads).exp(), b, c, draw(rows, heads, headdim, d_state)


def looped(x, dt, a, b, c, state):
    """The recurrence, one number at a time."""
    y, state, shared = torch.zeros_like(x), state.clone(), x.shape[2] // b.shape[2]
    for r in range(x.shape[0]):
        for t in range(x.shape[1]):
            for h in range(x.shape[2]):
                state[r, h] *= math.exp(dt[r, t, h] * a[h])
                for p in range(x.shape[3]):
                    state[r, h, p] += dt[r, t, h] * x[r, t, h, p] * b[r, t, h // shared]
                    y[r, t, h, p] = state[r, h, p] @ c[r, t, h // shared]
    return y, state


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 11, 32])
def test_chunked_scan_is_the_recurrence(chunk, groups):
    arguments = inputs(groups=groups)
    for given, wanted in zip(chunked(*arguments, chunk=chunk), looped(*arguments), strict=True):
        torch.testing.assert_close(given, wanted, **EXACT)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("large", [False, True])
def test_steps_are_the_recurrence_and_give_every_state(monkeypatch, large, length, groups):
    x, dt, a, b, c, state = inputs(length=length, groups=groups)
    monkeypatch.setattr(ssd, "LARGE", 0 if large else LARGE)
    y, states = steps(x, dt, a, b, c, state)
    torch.testing.assert_close(y, looped(x, dt, a, b, c, state)[0], **EXACT)
    assert len(states) == length
    for stop, given in enumerate(states, 1):
        wanted = looped(x[:, :stop], dt[:, :stop], a, b[:, :stop], c[:, :stop], state)[1]
        torch.testing.assert_close(given, wanted, **EXACT)


@pytest.mark.parametrize("length", [1, 2, FEW, FEW + 1, 30])
def test_a_scan_of_any_length_is_the_recurrence(length):
    arguments = inputs(length=length)
    for given, wanted in zip(scan(*arguments), looped(*arguments), strict=True):
        torch.testing.assert_close(given, wanted, **EXACT)
    assert len(scan_states(*arguments)[1]) == (length if length <= FEW else 1)


def test_a_long_scan_is_exact_in_float64_and_close_in_float32():
    arguments = inputs(length=700, rows=1, heads=2, headdim=2, d_state=3)
    wanted, _ = looped(*arguments)
    torch.testing.assert_close(chunked(*arguments)[0], wanted, **EXACT)
    single, _ = chunked(*(z.float() for z in arguments))
    torch.testing.assert_close(single.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_step_of_zero_leaves_the_state():
    x, dt, a, b, c, state = inputs()
    _, after = chunked(x, torch.zeros_like(dt), a, b, c, state)
    torch.testing.assert_close(after, state, **EXACT)


def test_decays_of_strong_decay_are_finite_and_have_finite_gradients():
    log = torch.full((1, 1, 64), -200.0, requires_grad=True)
    left = decays(log.cumsum(-1))
    assert left.isfinite().all()
    assert torch.equal(left.diagonal(dim1=-2, dim2=-1), torch.ones(1, 1, 64))
    left.sum().backward()
    assert log.grad is not None
    assert log.grad.isfinite().all()


def test_gradients_of_the_scan_are_those_of_the_recurrence():
    x, dt, a, b, c, state = inputs(rows=1, length=5, heads=2, headdim=2, d_state=2)
    tensors = [z.requires_grad_() for z in (x, dt, a, b, c, state)]
    for function in (lambda *z: chunked(*z, chunk=2), scan):
        assert torch.autograd.gradcheck(function, tensors)


def test_the_kernel_is_called_as_it_is_documented(monkeypatch):
    calls = []

    def combined(x, dt, A, B, C, chunk_size, *, initial_states, return_final_states):
        calls.append((B.shape, C.shape, all(z.is_contiguous() for z in (x, dt, A, B, C, initial_states))))
        assert return_final_states
        y, state = chunked(x, dt, A, B, C, initial_states, chunk=chunk_size)
        return y, state.float()

    install(monkeypatch, ssd, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=combined)
    arguments = inputs(length=9)
    y, state = scan(*arguments)
    assert calls == [((2, 9, 2, 5), (2, 9, 2, 5), True)]
    torch.testing.assert_close(y, looped(*arguments)[0], **EXACT)
    assert state.dtype == torch.float64
    scan(*inputs(length=1))
    assert len(calls) == 1  # one position is a step, on every device


def test_a_kernel_that_cannot_be_imported_is_an_error_not_a_fallback(monkeypatch):
    install(monkeypatch, ssd, "mamba_ssm.ops.triton.ssd_combined")
    with pytest.raises(ValueError, match="mamba_ssm is installed, but .*mamba_chunk_scan_combined cannot be imported"):
        scan(*inputs())
