"""The DataModule of ``test`` and ``predict``: the examples of one task, one at a time."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from dynamax.tasks.base import Task


class TaskData(LightningDataModule):
    """Hands out the examples of a task. Decoding is measured at batch 1, so a batch is one example.

    Args:
        task: The task.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self._examples: list[Any] = []

    def setup(self, stage: str) -> None:
        """Read the examples."""
        self._examples = list(self.task.examples())

    def test_dataloader(self) -> DataLoader:
        """One example a batch."""
        return DataLoader(self._examples, batch_size=None, collate_fn=lambda example: example)  # type: ignore[arg-type]

    predict_dataloader = test_dataloader

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ANN401
        """Examples are text; nothing moves."""
        return batch
