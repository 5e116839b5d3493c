"""How well each gate tells where its exit's lens is right. Knows heads and metrics, no trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from torch import Tensor, nn

from dynamax.data.batch import HiddenBatch
from dynamax.heads.bank import ExitBank
from dynamax.metrics.exits import GateAUROC
from dynamax.objectives.base import counted
from dynamax.types import Site


class GateAUROCs(nn.Module):
    """AUROC of every gate against agreement, whatever labels it was trained on: so gates can be compared.

    Args:
        bank: The heads that will be measured.
    """

    def __init__(self, bank: ExitBank) -> None:
        super().__init__()
        names = [f"{depth}/{name}" for depth in bank.depths for name in bank.gates(depth)]
        self.metrics = nn.ModuleDict({name: GateAUROC() for name in names})

    def update(
        self, bank: ExitBank, batch: HiddenBatch, sites: Mapping[int, Site], agreed: Mapping[int, Tensor]
    ) -> Iterator[tuple[str, GateAUROC]]:
        """Add a batch, and give each metric by ``DEPTH/GATE``.

        Args:
            bank: The heads.
            batch: Stored states.
            sites: The places of the exits.
            agreed: Whether each lens says the full model's token, bool ``agreed_N`` by depth.
        """
        read = bank.known_texts(batch.hidden, sites, counted(batch))
        for depth, agreed_N in agreed.items():
            for name in bank.gates(depth):
                metric = cast(GateAUROC, self.metrics[f"{depth}/{name}"])
                metric.update(read[depth].score(name), agreed_N)
                yield f"{depth}/{name}", metric
