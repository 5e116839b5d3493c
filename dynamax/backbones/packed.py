"""Faster execution of a loaded model: its products in another weight format, its norms in one call.

Modules are replaced one by one inside transformers' own blocks, whose code stays what runs; so this holds for every
family, and whatever transformers does between the products is still done. Nothing is assumed of a module because of its
name: a norm is replaced if its output is the same.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamax.backbones.experts import pack_experts
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.linear import as_product
from dynamax.backbones.recorded import Recordings
from dynamax.kernels import at_least_float32
from dynamax.kernels.attention import attend
from dynamax.kernels.products import Product

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Names of two parameters in glibc's malloc.h."""

ATTENTION = "dynamax"
"""The name of ``attend`` among transformers' implementations of attention."""


@final
class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the channels.

    Args:
        weight_D: Gain of each channel.
        eps: Added to the mean square.
    """

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_D, requires_grad=False)
        self._share = 1 / len(weight_D)
        self._eps = nn.Buffer(at_least_float32(weight_D.new_full((1,), eps)))

    def __call__(self, x: Tensor) -> Tensor:
        """The norm, in fewer operations than torch's own takes on a CPU."""
        y = x.to(self._eps.dtype)
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        y = y * torch.addcmul(self._eps, length, length, value=self._share).rsqrt_()
        return y.to(x.dtype) * self.weight


def pack(backbone: HFBackbone, kind: type[Product]) -> None:
    """Make a backbone faster, in place. Weights that nothing else holds are freed.

    Linear layers, experts and norms are replaced; whatever else a model holds stays as it is.

    Args:
        backbone: The model. Afterwards it cannot be trained, and stays on its device.
        kind: What takes the place of a linear layer.

    Raises:
        UserError: If weights cannot be held so.
    """
    kinds = {kind for index in range(backbone.spec.depth) for kind in backbone.state_kinds(index)}
    backbone.freeze_costs(kind.bytes)
    replace_modules(backbone.model, kind)
    pack_experts(backbone.model, kind)
    if "keys" in kinds and backbone.model._can_set_attn_implementation():  # older types have attention of their own
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
        backbone.model.set_attn_implementation(ATTENTION)
        backbone.additive_masks = False
    backbone.recordings = Recordings(backbone.model)
    keep_freed_memory()


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc's allocator, if this process has it, to keep up to 512 MB that were freed for what comes next.

    By default it gives most of it back to the system, and a decoder that frees and takes some megabytes of recurrent
    state at every step then waits for the system to clear them.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if adjust is not None:
        adjust(MMAP_THRESHOLD, 32 << 20)
        adjust(TRIM_THRESHOLD, 512 << 20)


def replace_modules(model: nn.Module, kind: type[Product]) -> None:
    """Replace linear layers and norms."""
    made: dict[int, nn.Module] = {}  # one module may stand in several places
    for parent, name, child in list(children(model)):
        if id(child) not in made:
            made[id(child)] = as_product(child, kind) or norm_of(child) or child
        setattr(parent, name, made[id(child)])


def children(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module below, with its parent and its name there."""
    for parent in module.modules():
        for name, child in parent.named_children():
            yield parent, name, child


@torch.no_grad()
def norm_of(module: nn.Module) -> RMSNorm | None:
    """What takes the place of a norm without a mean; None for anything else.

    Some families hold the gain less one, some do not use it. So it is tried out, with another gain than the module's.
    """
    weight: Any = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    arguments = inspect.signature(module.forward).parameters
    if not (isinstance(weight, Tensor) and weight.ndim == 1 and isinstance(eps, float) and len(arguments) == 1):
        return None
    tried: Any = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    x, gain = (torch.randn(shape, generator=generator).to(weight) for shape in ((2, 3, len(weight)), len(weight)))
    x = x * eps**0.5  # so that it counts
    tried.weight.copy_(gain)
    wanted = tried(x)
    for less in (0.0, 1.0):
        if wanted.dtype == x.dtype and torch.allclose(RMSNorm(gain + less, eps)(x), wanted, rtol=1e-5, atol=1e-6):
            return RMSNorm(weight.detach() + less, eps)
    return None
