"""The ridge lens: an affine map from a normed state to that of the top, in closed form."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor


@final
class RidgeLens:
    """``u + A u + b``, fitted so that it comes close to the top's normed state.

    It is a ``TunedLens`` by ridge regression: least squares of ``top - u`` on ``u``, with a penalty on A and none on b.
    With a large penalty it becomes the logit lens and a constant. Only sums over positions are kept, in float64.

    Args:
        width: D.
        penalty: On the squares of A, as a share of the mean variance of an entry of ``u``, times the positions.
        device: Where the sums are.
    """

    def __init__(self, width: int, penalty: float, device: torch.device | str = "cpu") -> None:
        self.penalty, self.count = penalty, 0
        self._sum_2D = torch.zeros(2, width, dtype=torch.float64, device=device)  # of u, and of top - u
        self._products_DD = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._targets_DD = torch.zeros_like(self._products_DD)

    def add(self, u_ND: Tensor, top_ND: Tensor) -> None:
        """Count some positions."""
        u_ND, top_ND = u_ND.double(), top_ND.double()
        rest_ND = top_ND - u_ND
        self.count += len(u_ND)
        self._sum_2D += torch.stack([u_ND.sum(0), rest_ND.sum(0)])
        self._products_DD += u_ND.T @ u_ND
        self._targets_DD += u_ND.T @ rest_ND

    def solve(self) -> tuple[Tensor, Tensor]:
        """``A_DD`` and ``b_D`` in float64, for ``u @ A + b``."""
        mean_D, rest_D = self._sum_2D / self.count
        products_DD = self._products_DD - self.count * torch.outer(mean_D, mean_D)
        products_DD.diagonal().add_(self.penalty * products_DD.diagonal().mean())
        a_DD = torch.linalg.solve(products_DD, self._targets_DD - self.count * torch.outer(mean_D, rest_D))
        return a_DD, rest_D - mean_D @ a_DD
