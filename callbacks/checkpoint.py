"""Heads on disk: the best so far and the newest, without the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import watch


class HeadsCheckpoint(Callback):
    """Saves the heads after each validation and at the end of ``fit``, as safetensors and JSON.

    A checkpoint of the trainer holds the best figure, so that a resumed run does not put worse heads in their place.
    With ``trainer.fast_dev_run`` nothing is saved.

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
        """Refuse a model that has no heads to save."""
        watch.heads(pl_module, self)

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
            ValueError: If the monitored figure was never logged, so that no heads were the best.
        """
        if _trial(trainer):
            return
        self._save(trainer, pl_module, "last")
        if self.best is None:
            raise ValueError(
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
            module = watch.heads(pl_module, self)
            module.bank.save(self.folder / name, module.spec)


def _trial(trainer: Trainer) -> bool:
    return bool(cast(Any, trainer).fast_dev_run)
