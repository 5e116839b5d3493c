"""A gate from outside: how long is the residual stream here? Knows ``dynamax.heads`` and nothing else of dynamax."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynamax.heads import Gate
from dynamax.types import Evidence, Memory, Site


class NormGate(Gate):
    """A straight line through the logarithm of the state's length.

    Args:
        site: The place.
        offset: Log-odds at length 1 before training.
    """

    def __init__(self, site: Site, *, offset: float = 0.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.tensor(offset))

    def score(self, evidence: Evidence, memory: Memory | None = None) -> Tensor:
        """The line's value, ``s_BT``."""
        return self.offset + self.slope * evidence.hidden.to(self.slope.dtype).norm(dim=-1).log1p()

    def flops(self) -> int:
        """Two; the length is element-wise work."""
        return 2
