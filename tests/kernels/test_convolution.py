"""Causal convolution against a sum over taps."""

import pytest
import torch

from dynamax.kernels import backend, convolution
from dynamax.kernels.convolution import convolve, earlier_windows
from tests.kernels.installed import install

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(length, taps=4, channels=5):
    g = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(2, length, channels), draw(2, taps - 1, channels), draw(channels, taps), draw(channels)


def summed(x, window, weight, bias):
    """Each output a sum over taps; the window that follows."""
    whole, taps = torch.cat([window, x], 1), weight.shape[1]
    y = torch.stack([(whole[:, t : t + taps] * weight.T).sum(1) + bias for t in range(x.shape[1])], 1)
    return y, whole[:, whole.shape[1] - taps + 1 :]


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 40])
def test_convolution_continues_from_its_window(length, taps):
    arguments = inputs(length, taps)
    for given, wanted in zip(convolve(*arguments), summed(*arguments), strict=True):
        torch.testing.assert_close(given, wanted, **EXACT)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_earlier_windows_are_those_of_shorter_chunks(length, taps):
    x, window, weight, bias = inputs(length, taps)
    wanted = [convolve(x[:, :stop], window, weight, bias)[1] for stop in range(1, length)]
    assert len(earlier_windows(x, window)) == length - 1
    assert all(map(torch.equal, earlier_windows(x, window), wanted))


@pytest.mark.parametrize("length", [1, 6])
def test_without_a_window_or_a_bias_both_are_zero(length):
    x, window, weight, bias = inputs(length)
    wanted = summed(x, torch.zeros_like(window), weight, torch.zeros_like(bias))
    for given, exact in zip(convolve(x, None, weight, None), wanted, strict=True):
        torch.testing.assert_close(given, exact, **EXACT)


def test_the_kernel_is_called_with_channels_last(monkeypatch):
    def causal_conv1d_fn(x, weight, bias, *, initial_states):
        assert x.stride(1) == initial_states.stride(1) == 1
        return summed(x.transpose(1, 2), initial_states.transpose(1, 2), weight, bias)[0].transpose(1, 2)

    install(monkeypatch, convolution, "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    arguments = inputs(7, channels=8)
    torch.testing.assert_close(convolve(*arguments)[0], summed(*arguments)[0], **EXACT)


@pytest.mark.parametrize(("length", "taps", "channels"), [(1, 4, 8), (7, 1, 8), (7, 5, 8), (7, 4, 12)])
def test_shapes_that_the_kernel_refuses_stay_here(monkeypatch, length, taps, channels):
    install(monkeypatch, convolution, "causal_conv1d", causal_conv1d_fn=None)
    arguments = inputs(length, taps, channels)
    torch.testing.assert_close(convolve(*arguments)[0], summed(*arguments)[0], **EXACT)


def test_only_cuda_tensors_below_float64_meet_kernels():
    for package in ("mamba_ssm", "causal_conv1d"):
        assert backend(package, "cpu") == "torch"
        assert backend(package, torch.device("cuda"), torch.float64) == "torch"
