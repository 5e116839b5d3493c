"""Heads on disk: the best so far and the newest, without the backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import common
from dynamax.errors import UserError
from dynamax.heads.saved import RECORD
from dynamax.types import Spec


class HeadsCheckpoint(Callback):
    """Saves the heads after each validation and at the end of ``fit``, as safetensors and JSON.

    A checkpoint of the trainer holds the best figure, so that a resumed run does not put worse heads in their place.
    With ``trainer.fast_dev_run`` nothing is saved. Heads of another backbone that lie in the folder are replaced, and a
    line says whose they were.

    Args:
        folder: Where the best heads go; the newest go to ``last`` inside it.
        monitor: Logged figure that tells which heads are best; where only lenses train, val/loss/lenses.
        mode: Whether the least (min) or the greatest (max) figure is best.

    Attributes:
        best: The best figure so far; None before the first.
    """

    def __init__(self, folder: str, *, monitor: str = "val/loss/gates", mode: Literal["min", "max"] = "min") -> None:
        self.folder = Path(folder)
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None

    @property
    def state_key(self) -> str:
        """Its place in checkpoints: figures of another monitor are not compared."""
        return self._generate_state_key(folder=str(self.folder), monitor=self.monitor, mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        """The best figure."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best figure."""
        self.best = state_dict["best"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that has no heads to save; say whose heads of another backbone will be replaced."""
        spec = common.heads(pl_module, self).spec
        if trainer.is_global_zero and not _trial(trainer) and (other := replaced(self.folder, spec)):
            print(f"The heads in {self.folder} were trained for another backbone, {other}; this fit replaces them.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the newest heads, and the best if these are."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or _trial(trainer):
            return
        self._save(trainer, pl_module, "last")
        figure = trainer.callback_metrics.get(self.monitor)
        if figure is not None and self._better(float(figure)):
            self.best = float(figure)
            self._save(trainer, pl_module, "")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the newest heads.

        Raises:
            UserError: If the monitored figure was never logged, so that no heads were the best.
        """
        if _trial(trainer):
            return
        self._save(trainer, pl_module, "last")
        if self.best is None:
            raise UserError(
                f"HeadsCheckpoint was told to monitor {self.monitor}, which was never logged. Logged: "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}. Monitor one of these; the newest heads "
                f"are in {self.folder / 'last'}."
            )
        if trainer.is_global_zero:
            print(f"Wrote the heads with the best {self.monitor}, {self.best:.4g}, to {self.folder}")

    def _better(self, figure: float) -> bool:
        if self.best is None:
            return True
        return figure < self.best if self.mode == "min" else figure > self.best

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        if trainer.is_global_zero:
            module = common.heads(pl_module, self)
            module.bank.save(self.folder / name, module.spec)


def replaced(folder: Path, spec: Spec) -> str | None:
    """The backbone of the heads in a folder, if it is another; None too where there are none, or none to be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
        backbone, theirs = record["backbone"], record["fingerprint"]
        name = f"{backbone['family']} of {backbone['depth']} blocks, fingerprint {theirs}"
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return name if theirs != spec.fingerprint else None


def _trial(trainer: Trainer) -> bool:
    return bool(cast(Any, trainer).fast_dev_run)
