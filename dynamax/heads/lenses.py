"""Lenses: which token the model would say, read at an exit. Knows no gate and no policy.

FLOPs count a lens' own matrix products: the output matrix, additions and the final norm are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.errors import UserError
from dynamax.heads.base import Lens
from dynamax.heads.blocks import (
    CausalAttention,
    MambaBlock,
    SwiGLU,
    input_projection,
    positive,
    swiglu_width,
    transformer_block,
    zero_init,
)
from dynamax.kernels import at_least_float32
from dynamax.types import Memory, Site


class LogitLens(Lens):
    """The final norm and the output matrix, applied to the exit as if it were the top.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); DYNAMAX's labels read exits this way.

    Parameters: none. FLOPs: 0.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """The final norm alone."""
        return site.normalize(h_BTD)


class TunedLens(Lens):
    """An affine map of the normed state: ``u + W u + b``.

    Source: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv
    2303.08112; theirs maps the state before the norm, ours behind it, where the scale is the same at
    every depth.

    Parameters: D^2 + D. FLOPs: 2 D^2. Initialised at zero.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        # A residual at zero starts as the logit lens, and weight decay pulls back to it, not to a dead map.
        self.shift = zero_init(site.spec.width, site.spec.width)

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Final norm, then the affine map."""
        u_BTD = site.normalize(h_BTD)
        return u_BTD + self.shift(u_BTD.to(self.shift.weight.dtype)).to(u_BTD.dtype)


class LowRankLens(Lens):
    """A tuned lens whose map has low rank: ``u + U (V u) + b``.

    Source: the tuned lens (arXiv 2303.08112) with the factors of Hu et al., "LoRA", arXiv 2106.09685.

    Parameters: 2 D rank + D. FLOPs: 4 D rank. ``U`` and ``b`` start at zero, so that the lens starts as
    the logit lens; ``V`` starts at random, because with both at zero neither would get a gradient.

    Args:
        rank: Rank of the map.
    """

    def __init__(self, site: Site, *, rank: int = 64) -> None:
        super().__init__()
        if positive("rank", rank) > site.spec.width:
            raise UserError(
                f"LowRankLens was given rank {rank} at width {site.spec.width}; a rank above the width says no more. "
                f"Choose a smaller rank, or TunedLens for the full map."
            )
        self.down = nn.Linear(site.spec.width, rank, bias=False)
        self.up = zero_init(rank, site.spec.width)

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Final norm, then the low-rank map."""
        u_BTD = site.normalize(h_BTD)
        return u_BTD + self.up(self.down(u_BTD.to(self.up.weight.dtype))).to(u_BTD.dtype)


class MLPLens(Lens):
    """Two layers with a SiLU between, added to the normed state: ``u + W2 silu(W1 u + c) + b``.

    Parameters: 2 D hidden + hidden + D. FLOPs: 4 D hidden. ``W2`` and ``b`` start at zero: it starts as the logit lens.

    Args:
        hidden: Units of the hidden layer.
    """

    def __init__(self, site: Site, *, hidden: int = 1024) -> None:
        super().__init__()
        self.enter = nn.Linear(site.spec.width, positive("hidden", hidden))
        self.leave = zero_init(hidden, site.spec.width)

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Final norm, then the two layers."""
        u_BTD = site.normalize(h_BTD)
        return u_BTD + self.leave(F.silu(self.enter(u_BTD.to(self.leave.weight.dtype)))).to(u_BTD.dtype)


class BridgeLens(Lens):
    """An affine map to the input of a late block, then the backbone's own blocks from there, then the final norm.

    The map takes the exit's state h to ``h + A u + b``, where u is h behind the final norm. While decoding, the blocks
    attend to the keys that they hold; positions that are owed have none there yet.

    Source: DYNAMAX (arXiv 2504.20922) runs the last block behind each exit; the map across the blocks between is that
    of Yom Din et al., "Jump to Conclusions" (arXiv 2303.09435).

    Parameters: D^2 + D. FLOPs: 2 D^2 of its own; the blocks count their calls, which are charged beside it. A and b
    start at zero, so that it starts as the late blocks alone.

    Args:
        blocks: How many of the backbone's last blocks are run.
    """

    def __init__(self, site: Site, *, blocks: int = 3) -> None:
        super().__init__()
        if not 1 <= blocks <= site.spec.depth - site.depth:
            raise UserError(
                f"BridgeLens at depth {site.depth} was given blocks {blocks}; above it there are "
                f"{site.spec.depth - site.depth} of the {site.spec.depth}. Choose 1 to that many."
            )
        self.last_blocks = blocks
        self.shift = zero_init(site.spec.width, site.spec.width)

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """The affine map, the late blocks, then the final norm."""
        u_BTD = site.normalize(h_BTD).to(self.shift.weight.dtype)
        return site.normalize(site.last_blocks(h_BTD + self.shift(u_BTD).to(h_BTD.dtype), self.last_blocks))


class AttentionLens(Lens):
    """A transformer block of its own behind the final norm, recurrent through keys and values: ``u + leave(block(u))``.

    It reads every position that passes the exit, whether or not the exit is asked, and is charged for that.

    Source: Balcony (arXiv 2503.05005), whose exits are blocks of the model's own width; the output matrix is shared.

    With W the block's width and F = 8/3 W, up to the next multiple of 64:
    Parameters: 2 D W + 4 W^2 + 3 W F + D, with ``width: null`` D^2 less. FLOPs: two for each but the D of a bias, and
    4 W for each key. Memory: 2 W values a position. ``leave`` starts at zero: it starts as the logit lens.

    Args:
        heads: Attention heads.
        width: The block's own width, reached by a projection of the input; None for the backbone's.
    """

    recurrent = True

    def __init__(self, site: Site, *, heads: int = 4, width: int | None = 256) -> None:
        super().__init__()
        self.enter, inner = input_projection(site.spec.width, width)
        self.keys = 2 * inner
        self.attention = CausalAttention(inner, heads)
        self.inner = SwiGLU(inner, swiglu_width(inner))
        self.down = nn.Linear(swiglu_width(inner), inner, bias=False)
        self.leave = zero_init(inner, site.spec.width)

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Final norm, block, projection."""
        return self._read(site.normalize(h_BTD), None)

    def continued(self, h_BTD: Tensor, site: Site, memory: Memory) -> Tensor:
        """The same behind the keys and values that the memory holds."""
        return self._read(site.normalize(h_BTD), memory)

    def _read(self, u_BTD: Tensor, memory: Memory | None) -> Tensor:
        dtype = self.leave.weight.dtype
        x_BTD = self.enter(u_BTD.to(dtype))
        x_BTD = transformer_block(x_BTD, self.attention, self.inner, self.down, memory)
        return u_BTD + self.leave(x_BTD).to(u_BTD.dtype)

    def flops(self) -> int:
        """The formula of the class: products with weights, and attending to one key."""
        return super().flops() + 2 * self.keys


class MambaLens(Lens):
    """A Mamba-2 block of its own behind the final norm, recurrent over positions: ``u + leave(block(u))``.

    It reads every position that passes the exit, whether or not the exit is asked, and is charged for that.

    Source: one block behind each exit as in Balcony (arXiv 2503.05005), here of the kind that DYNAMAX (arXiv
    2504.20922) uses as exit classifier.

    Parameters and FLOPs: those of a ``MambaGate`` with these options, whose last layer has D outputs. ``leave`` starts
    at zero: it starts as the logit lens.

    Args:
        d_state: State size of each channel, N.
        expand: Inner width as a multiple of the block's width.
        d_conv: Positions the convolution sees.
        headdim: Channels that share one decay.
        width: The block's own width, reached by a projection of the input; None for the backbone's.
    """

    recurrent = True

    def __init__(
        self,
        site: Site,
        *,
        d_state: int = 64,
        expand: int = 2,
        d_conv: int = 4,
        headdim: int = 64,
        width: int | None = 256,
    ) -> None:
        super().__init__()
        self.enter, inner = input_projection(site.spec.width, width)
        self.block = MambaBlock(inner, d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim)
        self.state = self.block.state
        self.leave = zero_init(self.block.d_inner, site.spec.width)

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Final norm, block, projection."""
        return self._read(site.normalize(h_BTD), None)

    def continued(self, h_BTD: Tensor, site: Site, memory: Memory) -> Tensor:
        """The same behind the state that the memory holds."""
        return self._read(site.normalize(h_BTD), memory)

    def _read(self, u_BTD: Tensor, memory: Memory | None) -> Tensor:
        x_BTD = self.block(self.enter(u_BTD.to(self.leave.weight.dtype)), memory)
        return u_BTD + self.leave(x_BTD).to(u_BTD.dtype)

    def flops(self) -> int:
        """Products with weights, and writing and reading the state."""
        return super().flops() + 4 * self.block.d_inner * self.block.d_state


class UntiedLens(Lens):
    """A norm and an output matrix of the exit's own: ``W (w * h / rms(h))``.

    Source: the heads of DSSD (Valade 2024, arXiv 2407.21082), which ``dynamax import-heads`` reads; untied heads of
    EE-LLM (arXiv 2312.04916). They begin at random.

    Parameters: D V + D. FLOPs: 0 beside the output matrix, which is charged as the backbone's is.

    Args:
        eps: Of the norm.
    """

    def __init__(self, site: Site, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(site.spec.width, eps=eps)
        self.output = nn.Linear(site.spec.width, site.spec.vocab, bias=False)

    def read_weights(self) -> Iterator[Tensor]:
        """The norm."""
        return iter(self.norm.parameters())

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Its own norm."""
        return self.norm(h_BTD[..., : site.spec.width].to(self.norm.weight.dtype)).to(h_BTD.dtype)

    def project(self, u_BTD: Tensor, site: Site, tokens_C: Tensor | slice | None = None) -> Tensor:
        """Its own output matrix."""
        matrix_VD = self.output.weight if tokens_C is None else self.output.weight[tokens_C]
        return at_least_float32(F.linear(u_BTD.to(matrix_VD.dtype), matrix_VD))


class LastBlockLens(Lens):
    """The backbone's own last block, run on the exit's state, then the final norm.

    Source: DYNAMAX (arXiv 2504.20922): the last block runs behind every exit.

    Parameters: none of its own. FLOPs: 0 of its own; the block counts its calls, which are charged beside it.
    """

    last_blocks = 1
    writes_last_block = True

    def __init__(self, site: Site) -> None:
        super().__init__()

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Last block, then final norm."""
        return site.normalize(site.last_blocks(h_BTD, 1))
