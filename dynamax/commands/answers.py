"""Answers of ``predict``, as they come."""

from __future__ import annotations

import json
import sys
from typing import TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from dynamax.progress import Bar


class AnswersPrinter(Callback):
    """Writes each answer of ``predict`` as a line of JSON.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one line; on a terminal the bar makes room for it."""
        with Bar.external_write_mode(file=sys.stderr):
            print(json.dumps(outputs), file=self.stream, flush=True)
