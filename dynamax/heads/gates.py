"""Gates: whether leaving here is right, one logit a position. Knows no lens and no policy.

One logit says the same as DYNAMAX's softmax over two classes, which is the sigmoid of their difference. Every gate
reads normed states (``rms_normalize``) or numbers of order one (``dynamax.heads.inputs``), and ends in a layer at zero
(``zero_init``), so it starts at p = 0.5.

FLOPs are of one position while decoding: matrix products and convolutions. Element-wise work is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.heads.base import Gate
from dynamax.heads.blocks import (
    CausalAttention,
    MambaBlock,
    SwiGLU,
    input_projection,
    positive,
    rms_normalize,
    swiglu_width,
    transformer_block,
    zero_init,
)
from dynamax.heads.inputs import GateInput, Inputs, LensStatistics
from dynamax.types import Evidence, Memory, Site


class _Informed(Gate):
    """A gate that judges each position alone, by inputs of its choice.

    Args:
        site: The exit's place.
        inputs: What it reads; None for the normed hidden state.
    """

    def __init__(self, site: Site, inputs: Sequence[GateInput] | None) -> None:
        super().__init__()
        self.inputs = Inputs(site, inputs)
        self.asks, self.recent = self.inputs.asks, self.inputs.recent

    def flops(self) -> int:
        """Products with weights, and what the inputs compute."""
        return super().flops() + self.inputs.flops


class LinearGate(_Informed):
    """One linear layer over the normed state, or over other inputs.

    Source: the early-exit classifier of CALM (Schuster et al. 2022, arXiv 2207.07061); the linear head of DYNAMAX
    (arXiv 2504.20922), which has no norm: without one, massive activations dominate the gradient.

    With F numbers of input, D of the state alone: parameters: F + 1. FLOPs: 2 F, and the inputs' own.

    Args:
        inputs: What it reads; None for the normed hidden state alone.
    """

    def __init__(self, site: Site, *, inputs: Sequence[GateInput] | None = None) -> None:
        super().__init__(site, inputs)
        self.out = zero_init(self.inputs.width)

    def score(self, evidence: Evidence, memory: Memory | None = None) -> Tensor:
        """A weighted sum."""
        return self.out(self.inputs.read(evidence, self.out.weight.dtype)).squeeze(-1)


class UncertaintyGate(_Informed):
    """A weighted sum of four numbers that say how unsure the exit's lens is: ``LinearGate`` over ``LensStatistics``.

    No gradient reaches the lens. The gate reads the output matrix, which is charged to the exit.

    Source: JEI-DNN (Regol et al. 2024, arXiv 2310.09163).

    Parameters: 5. FLOPs: 18 V + 12, which is the paper's count.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site, [LensStatistics()])
        self.out = zero_init(self.inputs.width)

    def score(self, evidence: Evidence, memory: Memory | None = None) -> Tensor:
        """A weighted sum."""
        return self.out(self.inputs.read(evidence, self.out.weight.dtype)).squeeze(-1)


class MLPGate(_Informed):
    """Two layers with a SiLU between.

    With F numbers of input, D of the state alone: parameters: F hidden + 2 hidden + 1. FLOPs: 2 hidden (F + 1), and
    the inputs' own.

    Args:
        hidden: Units of the hidden layer.
        inputs: What it reads; None for the normed hidden state alone.
    """

    def __init__(self, site: Site, *, hidden: int = 64, inputs: Sequence[GateInput] | None = None) -> None:
        super().__init__(site, inputs)
        self.enter = nn.Linear(self.inputs.width, positive("hidden", hidden))
        self.out = zero_init(hidden)

    def score(self, evidence: Evidence, memory: Memory | None = None) -> Tensor:
        """Inputs, hidden layer, last layer."""
        return self.out(F.silu(self.enter(self.inputs.read(evidence, self.out.weight.dtype)))).squeeze(-1)


class FFNGate(_Informed):
    """The feed-forward of a transformer block, whose last projection gives one number.

    Source: DYNAMAX (arXiv 2504.20922), the transformer feed-forward head; its sizes are not published.

    With F numbers of input, D of the state alone: parameters: 2 F hidden + hidden + 1. FLOPs: 2 hidden (2 F + 1), and
    the inputs' own.

    Args:
        hidden: Inner width; None for the usual 8/3 F, up to the next multiple of 64.
        inputs: What it reads; None for the normed hidden state alone.
    """

    def __init__(self, site: Site, *, hidden: int | None = None, inputs: Sequence[GateInput] | None = None) -> None:
        super().__init__(site, inputs)
        width = self.inputs.width
        hidden = swiglu_width(width) if hidden is None else positive("hidden", hidden)
        self.inner = SwiGLU(width, hidden)
        self.out = zero_init(hidden)

    def score(self, evidence: Evidence, memory: Memory | None = None) -> Tensor:
        """Inputs, gate and up projections, last projection."""
        return self.out(self.inner(self.inputs.read(evidence, self.out.weight.dtype))).squeeze(-1)


class MambaGate(Gate):
    """A Mamba-2 block with a small output projection, recurrent over positions.

    Source: DYNAMAX (arXiv 2504.20922), the Mamba head, for backbones of both kinds; its sizes are not
    published. At ``width: null`` it has the size of a Mamba-2 block of the backbone's width.

    With W the block's width, E = expand W, N = d_state, H = E / headdim, K = d_conv:
    Parameters: D W + W (2E + 2N + H) + (K + 1)(E + 2N) + 3H + E + 1, without D W at ``width: null``.
    FLOPs: 2 [D W + W (2E + 2N + H) + K (E + 2N) + 2 E N + E]; the decay of the state, E N products,
    is left out. Memory: E N + (K - 1)(E + 2N) values. Initialised as Mamba-2 is: see ``MambaBlock``.

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
        d_state: int = 32,
        expand: int = 2,
        d_conv: int = 4,
        headdim: int = 32,
        width: int | None = 128,
    ) -> None:
        super().__init__()
        self.enter, inner = input_projection(site.spec.width, width)
        self.block = MambaBlock(inner, d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim)
        self.state = self.block.state
        self.out = zero_init(self.block.d_inner)

    def score(self, evidence: Evidence, memory: Memory | None = None) -> Tensor:
        """Norm, input projection, block, last projection."""
        x_BTD = self.enter(evidence.derive(rms_normalize, self.out.weight.dtype))
        return self.out(self.block(x_BTD, memory)).squeeze(-1)

    def flops(self) -> int:
        """The formula of the class: products with weights, and writing and reading the state."""
        return super().flops() + 4 * self.block.d_inner * self.block.d_state


class AttentionGate(Gate):
    """A transformer block, attention and feed-forward, then one number; recurrent through keys and values.

    With W the block's width and F = 8/3 W, up to the next multiple of 64:
    Parameters: D W + 4 W^2 + 3 W F + W + 1, without D W at ``width: null``.
    FLOPs: 2 [D W + 4 W^2 + 3 W F + 2 W + W] with one key to attend to; 4 W more for each further one.
    Memory: 2 W values a position.

    Args:
        heads: Attention heads.
        width: The block's own width, reached by a projection of the input; None for the backbone's.
    """

    recurrent = True

    def __init__(self, site: Site, *, heads: int = 4, width: int | None = 128) -> None:
        super().__init__()
        self.enter, inner = input_projection(site.spec.width, width)
        self.keys = 2 * inner
        self.attention = CausalAttention(inner, heads)
        self.inner = SwiGLU(inner, swiglu_width(inner))
        self.down = nn.Linear(swiglu_width(inner), inner, bias=False)
        self.out = zero_init(inner)

    def score(self, evidence: Evidence, memory: Memory | None = None) -> Tensor:
        """Norm, input projection, attention and feed-forward with their residuals, norm, last projection."""
        dtype = self.out.weight.dtype
        x_BTD = self.enter(evidence.derive(rms_normalize, dtype))
        x_BTD = transformer_block(x_BTD, self.attention, self.inner, self.down, memory)
        return self.out(x_BTD).squeeze(-1)

    def flops(self) -> int:
        """The formula of the class: products with weights, and attending to one key."""
        return super().flops() + 4 * self.out.in_features
