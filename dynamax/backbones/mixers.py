"""Recurrent mixers of transformers, continued from a live state over any number of positions.

A mixer replaces the ``forward`` of one transformers module and uses its weights. It takes over where
the cache it is given is a ``LayerView``; otherwise transformers' own code runs, which is what it is checked
against. A mixer holds its module and names, no tensors, so that a copied model has copied mixers. So what transformers
gets wrong in chunks (Mamba-1's scan forgets the state, Mamba-2's pads every chunk to 256 positions) needs no repair.
Knows modules and views, neither families nor positions.

Padding changes no state: what it projects is masked. transformers masks the input of the projection instead, whose
bias then reaches the first positions after the padding through the convolution.

E counts the inner channels, N the entries of a channel's state, G the groups of heads.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.backbones.linear import channels, without_bias
from dynamax.backbones.state import LayerView, Tensors
from dynamax.kernels import at_least_float32, selective, ssd
from dynamax.kernels.convolution import convolve, earlier_windows


class MixerCost(NamedTuple):
    """What a mixer costs, in counts.

    Attributes:
        write: Weights that ``Mixer.write`` multiplies a position with.
        scan: Multiply-adds a position costs beside the weights of linear layers: convolution, state in, state out.
        state: Values of state, window included, of one row.
    """

    write: int
    scan: int
    state: int


class Mixer(ABC):
    """One recurrent mixer; replaces the ``forward`` of its module, which still runs where it is given another cache.

    Args:
        module: transformers' mixer, whose weights are used.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        installed = vars(module).get("forward")
        self._own = installed._own if isinstance(installed, Mixer) else module.forward
        check_devices(module)
        self.module.forward = self

    def __call__(
        self, hidden_states: Tensor, cache_params: object = None, *, past_key_values: object = None, **options: object
    ) -> Tensor:
        """The mixer's output for ``hidden_states``, as transformers calls it."""
        view = cache_params if past_key_values is None else past_key_values
        if isinstance(view, LayerView):
            return self.mix(hidden_states, view)
        known = {"cache_params": cache_params, "past_key_values": past_key_values, **options}
        return self._own(hidden_states, **{name: value for name, value in known.items() if value is not None})

    @abstractmethod
    def mix(self, u_BTD: Tensor, view: LayerView) -> Tensor:
        """Advance the view's state over the chunk; the mixer's output ``[B, T, D]``."""

    @abstractmethod
    def write(self, u_BTD: Tensor, view: LayerView) -> None:
        """Advance the view's state over the chunk and nothing more: what only the output needs is not computed."""

    @abstractmethod
    def cost(self) -> MixerCost:
        """What the mixer costs."""


@final
class SSDMixer(Mixer):
    """Mamba-2 and its kin.

    Args:
        module: ``in_proj`` to gate, input, B, C and step; ``conv1d``, ``A_log``, ``D``, ``dt_bias``, ``out_proj``.
        gain: Factor of the input.
        scale: Name of the module's factors of the projected channels; None for none.
        finish: Output before the last projection, from the scan's and the gate; the module's gated norm if left out.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        gain: float = 1.0,
        scale: str | None = None,
        finish: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(module)
        self._gain = gain
        self._scale = scale
        self._finish = finish or self.module.norm
        self._inner = self.module.intermediate_size
        self._bc = self.module.n_groups * self.module.ssm_state_size
        self._channels = self._inner + 2 * self._bc

    def mix(self, u_BTD: Tensor, view: LayerView) -> Tensor:
        """Project, advance, gate, project."""
        z_BTE, y_BTE = self._advance(u_BTD, view, 0)
        return self.module.out_proj(self._finish(y_BTE, z_BTE).to(u_BTD.dtype))

    def write(self, u_BTD: Tensor, view: LayerView) -> None:
        """Project all but the gate, advance."""
        self._advance(u_BTD, view, self._inner)

    def _advance(self, u_BTD: Tensor, view: LayerView, first: int) -> tuple[Tensor, Tensor]:
        """Project from channel ``first`` on and advance; the gate's channels, as far as they are projected, and y."""
        m = self.module
        u_BTD = u_BTD if self._gain == 1.0 else u_BTD * self._gain
        rows_BTC = channels(m.in_proj, u_BTD, (first, m.in_proj.out_features)) if first else m.in_proj(u_BTD)
        if self._scale is not None:
            rows_BTC = rows_BTC * getattr(m, self._scale)[..., first:]
        z_BTE, xbc_BTC, dt_BTH = rows_BTC.split([self._inner - first, self._channels, m.num_heads], -1)
        low, high = m.time_step_limit
        dt_BTH = F.softplus(at_least_float32(dt_BTH) + at_least_float32(m.dt_bias)).clamp(low, high)
        return z_BTE, view.advance(self._read, (*masked(view.live_BT, xbc_BTC, dt_BTH), *ends(view)))

    def _read(
        self, past: Tensors | None, xbc_BTC: Tensor, dt_BTH: Tensor, ends_B: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensors, ...]]:
        m = self.module
        before, state_BHPN = past or (None, None)
        rows_BTC = xbc_BTC
        xbc_BTC, window = convolve(rows_BTC, before, m.conv1d.weight[:, 0], m.conv1d.bias, ends_B)
        x, b, c = at_least_float32(m.act(xbc_BTC)).split([self._inner, self._bc, self._bc], -1)
        x_BTHP, b_BTGN, c_BTGN = (
            x.unflatten(-1, (m.num_heads, -1)),
            b.unflatten(-1, (m.n_groups, -1)),
            c.unflatten(-1, (m.n_groups, -1)),
        )
        if state_BHPN is None:
            state_BHPN = x.new_zeros(len(x), m.num_heads, x_BTHP.shape[-1], m.ssm_state_size)
        decay_H = -at_least_float32(m.A_log).exp()
        y_BTHP, states = ssd.scan_states(x_BTHP, dt_BTH, decay_H, b_BTGN, c_BTGN, state_BHPN)
        y_BTHP = torch.addcmul(y_BTHP, x_BTHP, at_least_float32(m.D)[:, None])
        return y_BTHP.flatten(-2), passed(rows_BTC, before, window, states)

    def cost(self) -> MixerCost:
        """Written: all channels but the gate's. Scanned: taps, and each entry of the state written and read."""
        m, state = self.module, self._inner * self.module.ssm_state_size
        return MixerCost(
            write=(self._channels + m.num_heads) * m.in_proj.in_features,
            scan=self._channels * m.conv_kernel_size + 2 * state,
            state=self._channels * (m.conv_kernel_size - 1) + state,
        )


@final
class SelectiveMixer(Mixer):
    """Mamba-1 and its kin. transformers starts every chunk from a state of zeros; this one from the state there is.

    Args:
        module: ``in_proj`` to input and gate; ``conv1d``, ``x_proj``, ``dt_proj``, ``A_log``, ``D``, ``out_proj``.
        norms: Names of the module's norms of step, B and C; None for none.
    """

    def __init__(self, module: nn.Module, *, norms: tuple[str, str, str] | None = None) -> None:
        super().__init__(module)
        self._norms = norms
        self._inner = self.module.intermediate_size

    def mix(self, u_BTD: Tensor, view: LayerView) -> Tensor:
        """Project, advance, gate, project."""
        x_BTE, z_BTE = self.module.in_proj(u_BTD).chunk(2, -1)
        y_BTE = view.advance(self._read, self._rows(x_BTE, view))
        return self.module.out_proj((y_BTE * F.silu(z_BTE)).to(u_BTD.dtype))

    def write(self, u_BTD: Tensor, view: LayerView) -> None:
        """Project the input's half, advance."""
        x_BTE = channels(self.module.in_proj, u_BTD, (0, self._inner))
        view.advance(self._read, self._rows(x_BTE, view))

    def _rows(self, x_BTE: Tensor, view: LayerView) -> Tensors:
        if view.live_BT is None:
            return (x_BTE,)
        return (*masked(view.live_BT, x_BTE), view.live_BT, *ends(view))

    def _read(
        self, past: Tensors | None, x_BTE: Tensor, live_BT: Tensor | None = None, ends_B: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensors, ...]]:
        m = self.module
        before, state_BEN = past or (None, None)
        rows_BTE = x_BTE
        x_BTE, window = convolve(rows_BTE, before, m.conv1d.weight[:, 0], m.conv1d.bias, ends_B)
        x_BTE = m.act(x_BTE)
        step, b, c = m.x_proj(x_BTE).split([m.time_step_rank, m.ssm_state_size, m.ssm_state_size], -1)
        if self._norms is not None:
            step, b, c = (getattr(m, name)(part) for name, part in zip(self._norms, (step, b, c), strict=True))
        bias = at_least_float32(m.dt_proj.bias)
        dt_BTE = F.softplus(at_least_float32(without_bias(m.dt_proj, step)) + bias)
        (dt_BTE,) = masked(live_BT, dt_BTE)
        x_BTE, b_BTN, c_BTN = at_least_float32(x_BTE), at_least_float32(b), at_least_float32(c)
        decay_EN = -at_least_float32(m.A_log).exp()
        y_BTE, states = selective.scan_states(x_BTE, dt_BTE, decay_EN, b_BTN, c_BTN, state_BEN)
        return torch.addcmul(y_BTE, x_BTE, at_least_float32(m.D)), passed(rows_BTE, before, window, states)

    def cost(self) -> MixerCost:
        """Written: the input's half, and what makes step, B and C. Scanned: taps; entries decayed, written, read."""
        m, state = self.module, self._inner * self.module.ssm_state_size
        return MixerCost(
            write=self._inner * m.in_proj.in_features + m.x_proj.weight.numel() + m.dt_proj.weight.numel(),
            scan=self._inner * m.conv_kernel_size + 3 * state,
            state=self._inner * (m.conv_kernel_size - 1) + state,
        )


@final
class ShortConvMixer(Mixer):
    """LFM2's gated convolution: a window is all the state there is.

    Args:
        module: ``in_proj`` to B, C and input; ``conv``, ``out_proj``.
    """

    def mix(self, u_BTD: Tensor, view: LayerView) -> Tensor:
        """Project, advance, gate, project."""
        b_BTD, c_BTD, x_BTD = self.module.in_proj(u_BTD).chunk(3, -1)
        y_BTD = view.advance(self._read, (*masked(view.live_BT, b_BTD * x_BTD), *ends(view)))
        return self.module.out_proj(c_BTD * y_BTD)

    def write(self, u_BTD: Tensor, view: LayerView) -> None:
        """Project B and the input, advance."""
        width = self.module.in_proj.out_features // 3
        b_BTD, x_BTD = channels(self.module.in_proj, u_BTD, (0, width), (2 * width, 3 * width)).chunk(2, -1)
        rows_BTD = b_BTD * x_BTD
        view.advance(self._read, (*masked(view.live_BT, rows_BTD), *ends(view)))

    def _read(
        self, past: Tensors | None, x_BTD: Tensor, ends_B: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensors, ...]]:
        (before,) = past or (None,)
        conv = self.module.conv
        y_BTD, window = convolve(x_BTD, before, conv.weight[:, 0], conv.bias, ends_B)
        return y_BTD, ((window,),)

    def cost(self) -> MixerCost:
        """Written: the projections to B and the input. Scanned: taps. State: the window."""
        m = self.module
        window = m.conv.out_channels * (m.conv_kernel_size - 1)
        return MixerCost(m.in_proj.weight.numel() * 2 // 3, m.conv.weight.numel(), window)


def passed(
    rows_BTC: Tensor, before_BWC: Tensor | None, window_BWC: Tensor, states: tuple[Tensor, ...]
) -> tuple[Tensors, ...]:
    """Windows beside the scan's states: after every position where the scan gave all, else after the last."""
    if before_BWC is None or len(states) < rows_BTC.shape[1]:
        return ((window_BWC, states[-1]),)
    return tuple(zip((*earlier_windows(rows_BTC, before_BWC), window_BWC), states, strict=True))


def masked(live_BT: Tensor | None, *rows: Tensor) -> Tensors:
    """Rows with zeros on padding, so that it changes no state."""
    if live_BT is None:
        return rows
    return tuple(row.masked_fill(~live_BT[..., None], 0.0) for row in rows)


def ends(view: LayerView) -> Tensors:
    """Where each row's positions end, for the convolution; nothing if the chunk has no padding behind them."""
    return () if view.ends_B is None else (view.ends_B,)


def check_devices(module: nn.Module) -> None:
    """Where ``mamba_ssm`` can be imported, transformers calls its kernels on CPU tensors too, and they fail.

    Each such function of the module's file keeps its kernel for CUDA tensors alone.
    """
    place = sys.modules[type(module).__module__]
    for attribute, function in vars(place).copy().items():
        wraps = isinstance(function, FunctionType) and "__wrapped__" in vars(function)
        if wraps and function.__code__.co_filename.endswith("hub_kernels.py"):
            setattr(place, attribute, functools.partial(by_device, function))


def by_device(function: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
    """Call a function that has a kernel with that kernel on CUDA tensors only, else the plain function it wraps."""
    on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in (*args, *options.values()))
    return (function if on_gpu else function.__wrapped__)(*args, **options)
