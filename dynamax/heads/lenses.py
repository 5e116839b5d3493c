"""Lenses: which token the model would say, read at an exit. Knows no gate and no policy.

FLOPs count a lens' own matrix products: the output matrix, additions and the final norm are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from dynamax.errors import UserError
from dynamax.heads.base import Lens
from dynamax.heads.blocks import positive
from dynamax.kernels import at_least_float32
from dynamax.types import Site


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
        width = site.spec.width
        self.shift = nn.Linear(width, width)
        # A residual at zero starts as the logit lens, and weight decay pulls back to it, not to a dead map.
        nn.init.zeros_(self.shift.weight)
        nn.init.zeros_(self.shift.bias)

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
        self.up = nn.Linear(rank, site.spec.width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Final norm, then the low-rank map."""
        u_BTD = site.normalize(h_BTD)
        return u_BTD + self.up(self.down(u_BTD.to(self.up.weight.dtype))).to(u_BTD.dtype)


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

    def project(self, u_BTD: Tensor, site: Site, tokens_C: Tensor | None = None) -> Tensor:
        """Its own output matrix."""
        matrix_VD = self.output.weight if tokens_C is None else self.output.weight[tokens_C]
        return at_least_float32(functional.linear(u_BTD.to(matrix_VD.dtype), matrix_VD))


class LastBlockLens(Lens):
    """The backbone's own last block, run on the exit's state, then the final norm.

    Source: DYNAMAX (arXiv 2504.20922): the last block runs behind every exit.

    Parameters: none of its own. FLOPs: 0 of its own; ``runs_last_block`` has the block charged beside it.
    """

    runs_last_block = True

    def __init__(self, site: Site) -> None:
        super().__init__()

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Last block, then final norm."""
        return site.normalize(site.last_block(h_BTD))
