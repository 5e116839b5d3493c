"""Lenses: which token the model would say, read at an exit. Knows no gate and no policy.

FLOPs count a lens' own matrix products: the output matrix, additions and the final norm are left out.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.errors import UserError
from dynamax.heads.base import Lens
from dynamax.heads.blocks import positive
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


class MLPLens(Lens):
    """Two layers with a SiLU between, added to the normed state: ``u + W2 silu(W1 u + c) + b``.

    Parameters: 2 D hidden + hidden + D. FLOPs: 4 D hidden. ``W2`` and ``b`` start at zero: it starts as the logit lens.

    Args:
        hidden: Units of the hidden layer.
    """

    def __init__(self, site: Site, *, hidden: int = 1024) -> None:
        super().__init__()
        self.enter = nn.Linear(site.spec.width, positive("hidden", hidden))
        self.leave = nn.Linear(hidden, site.spec.width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

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
        self.shift = nn.Linear(site.spec.width, site.spec.width)
        nn.init.zeros_(self.shift.weight)
        nn.init.zeros_(self.shift.bias)

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """The affine map, the late blocks, then the final norm."""
        u_BTD = site.normalize(h_BTD).to(self.shift.weight.dtype)
        return site.normalize(site.last_blocks(h_BTD + self.shift(u_BTD).to(h_BTD.dtype), self.last_blocks))


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
