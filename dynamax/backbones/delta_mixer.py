"""The recurrent mixer of Qwen3-Next, a gated delta rule, continued from a live state. See ``mixers``.

K and V count the entries of a head's key and value; the state of a head is a matrix that gives values for keys.
"""

from __future__ import annotations

import sys
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.backbones.mixers import Mixer, MixerCost, ends, masked, passed
from dynamax.backbones.state import LayerView, Tensors
from dynamax.kernels import at_least_float32
from dynamax.kernels.convolution import convolve

CHUNKED_FROM = 17
"""Positions from which transformers' own chunks are faster than one step after the other."""


@final
class GatedDeltaMixer(Mixer):
    """Qwen3-Next's: what a key gives so far is replaced in part by a new value (arXiv 2412.06464).

    Args:
        module: ``in_proj_qkvz``, ``in_proj_ba``, ``conv1d``, ``A_log``, ``dt_bias``, ``norm``, ``out_proj``.
    """

    def mix(self, u_BTD: Tensor, view: LayerView) -> Tensor:
        """Project, advance, gate, project."""
        z_BTHV, y_BTHV = self._advance(u_BTD, view)
        y_NV = self.module.norm(y_BTHV.to(u_BTD.dtype).flatten(0, -2), z_BTHV.flatten(0, -2))
        return self.module.out_proj(y_NV.view(*u_BTD.shape[:2], -1))

    def write(self, u_BTD: Tensor, view: LayerView) -> None:
        """Project, advance: the gate's channels lie among the others, and are projected with them."""
        self._advance(u_BTD, view)

    def _advance(self, u_BTD: Tensor, view: LayerView) -> tuple[Tensor, Tensor]:
        """The gate and what the rule gives, ``[B, T, H, V]`` each."""
        m = self.module
        q, k, v, z_BTHV, b_BTH, a_BTH = m.fix_query_key_value_ordering(m.in_proj_qkvz(u_BTD), m.in_proj_ba(u_BTD))
        rows_BTC = torch.cat([part.flatten(2) for part in (q, k, v)], -1)
        beta_BTH = at_least_float32(b_BTH.sigmoid())
        decay_BTH = -at_least_float32(m.A_log).exp() * F.softplus(at_least_float32(a_BTH) + m.dt_bias)
        rows = masked(view.live_BT, rows_BTC, beta_BTH, decay_BTH)
        return z_BTHV, view.advance(self._read, (*rows, *ends(view)))

    def _read(
        self, past: Tensors | None, rows_BTC: Tensor, beta_BTH: Tensor, decay_BTH: Tensor, ends_B: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensors, ...]]:
        m = self.module
        before, state_BHKV = past or (None, None)
        mixed_BTC, window = convolve(rows_BTC, before, m.conv1d.weight[:, 0], None, ends_B)
        q, k, v = F.silu(mixed_BTC).split([m.key_dim, m.key_dim, m.value_dim], -1)
        q, k = (x.unflatten(-1, (-1, m.head_k_dim)) for x in (q, k))
        v_BTHV = v.unflatten(-1, (-1, m.head_v_dim))
        q, k = (x.repeat_interleave(m.num_v_heads // m.num_k_heads, 2) for x in (q, k))
        if rows_BTC.shape[1] >= CHUNKED_FROM:
            place: Any = sys.modules[type(m).__module__]
            y_BTHV, last = place.torch_chunk_gated_delta_rule(
                *(q, k, v_BTHV),
                g=decay_BTH,
                beta=beta_BTH,
                initial_state=state_BHKV,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            return y_BTHV, passed(rows_BTC, before, window, (last,))
        q, k = (unit(at_least_float32(x)) for x in (q, k))
        v_BTHV = at_least_float32(v_BTHV)
        if state_BHKV is None:
            state_BHKV = q.new_zeros(len(q), m.num_v_heads, m.head_k_dim, m.head_v_dim)
        outputs, states = [], []
        for t in range(rows_BTC.shape[1]):
            state_BHKV = state_BHKV * decay_BTH[:, t].exp()[..., None, None]
            known_BHV = (k[:, t, :, None] @ state_BHKV)[:, :, 0]
            new_BHV = (v_BTHV[:, t] - known_BHV) * beta_BTH[:, t, :, None]
            state_BHKV = state_BHKV + k[:, t, ..., None] * new_BHV[:, :, None]
            outputs.append((q[:, t, :, None] @ state_BHKV)[:, :, 0])
            states.append(state_BHKV)
        y_BTHV = torch.stack(outputs, 1) * m.head_k_dim**-0.5
        return y_BTHV, passed(rows_BTC, before, window, tuple(states))

    def cost(self) -> MixerCost:
        """Written: all that is projected. Scanned: taps; entries decayed, read, written, read."""
        m, state = self.module, self.module.num_v_heads * self.module.head_k_dim * self.module.head_v_dim
        return MixerCost(
            write=m.in_proj_qkvz.weight.numel() + m.in_proj_ba.weight.numel(),
            scan=m.conv_dim * m.conv_kernel_size + 4 * state,
            state=m.conv_dim * (m.conv_kernel_size - 1) + state,
        )


def unit(x: Tensor) -> Tensor:
    """Vectors of length one."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
