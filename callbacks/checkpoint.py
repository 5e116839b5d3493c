"""Heads on disk: the best so far and the newest, without the backbone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, cast

import safetensors
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import common
from dynamax.errors import UserError
from dynamax.files import check_folder
from dynamax.heads.saved import RECORD, WEIGHTS
from dynamax.modules.checks import ChecksBeforeFit, all_finite
from dynamax.modules.heads import HeadsModule


class HeadsCheckpoint(Callback, ChecksBeforeFit):
    """Saves the heads after each validation and at the end of ``fit``, as safetensors and JSON.

    Heads of another backbone, or of other exits, that lie in the folder are not replaced unless ``overwrite`` is true;
    those of the same backbone and exits are, from the first validation on. Heads that are not finite are never saved.
    A checkpoint of the trainer holds the best figure, so that a resumed run does not put worse heads in their place.
    With ``trainer.fast_dev_run`` nothing is saved.

    Args:
        folder: Where the best heads go; the newest go to ``last`` inside it.
        monitor: Logged figure by which heads are best; left out, the loss of the last phase that
            trains gates, or of the last phase if none does: val/loss/NAME.
        mode: Whether the least (min) or the greatest (max) figure is best.
        overwrite: Replace whatever heads lie in the folder.

    Attributes:
        best: The best figure so far; None before the first.
    """

    def __init__(
        self,
        folder: str,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.given, self.monitor = monitor, monitor or ""
        self.mode = mode
        self.overwrite = overwrite
        self.best: float | None = None
        self._saved = False

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the figure to monitor; refuse a model that has no heads to save."""
        if stage == "fit":
            phases = common.watched(pl_module, HeadsModule, self).phases
            names = [name for name, phase in phases.items() if "gates" in phase.trains] or list(phases) or ["gates"]
            self.monitor = self.given or f"val/loss/{names[-1]}"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the folder, for those who come without the command line."""
        self._saved = False
        self.check_before_fit(trainer, pl_module)

    def check_before_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a figure that will not be logged, and a folder that holds other heads than those to be trained.

        Raises:
            UserError: Naming what lies in the folder, and the remedy.
        """
        module = common.watched(pl_module, HeadsModule, self)
        if _trial(trainer):
            return
        monitor = self.given or ""
        losses = [f"val/loss/{name}" for name in module.phases]
        if monitor.startswith("val/loss/") and monitor not in losses:
            raise UserError(
                f"HeadsCheckpoint was told to monitor {monitor}, but no phase has that name. Monitor one of: "
                f"{', '.join(losses)}."
            )
        if trainer.limit_val_batches == 0 and (not monitor or monitor.startswith("val/")):
            raise UserError(
                "HeadsCheckpoint needs validation to tell which heads are best, but trainer.limit_val_batches is 0. "
                "Raise it, or take HeadsCheckpoint out of trainer.callbacks."
            )
        check_folder(self.folder / "last", "HeadsCheckpoint", "its option folder")
        remedy = "Name another folder, or set overwrite: true for HeadsCheckpoint."
        own = module.bank.record(module.spec)
        for folder in (self.folder, self.folder / "last"):
            for name in (WEIGHTS, RECORD):
                if (folder / name).is_dir():
                    raise UserError(
                        f"HeadsCheckpoint writes {folder / name}, but that is a folder. Name another folder."
                    )
            theirs = None if self.overwrite else held(folder)
            if theirs is None:
                continue
            if "fingerprint" not in theirs:
                raise UserError(f"{folder / WEIGHTS} would be replaced, but it cannot be told what it is. {remedy}")
            if theirs["fingerprint"] != own["fingerprint"]:
                raise UserError(
                    f"The heads in {folder} were trained for another backbone, {theirs['backbone']}, fingerprint "
                    f"{theirs['fingerprint']}; this one has the fingerprint {own['fingerprint']}. They would be "
                    f"replaced. {remedy}"
                )
            if theirs["exits"] != json.loads(json.dumps(own["exits"])):
                raise UserError(
                    f"The heads in {folder} are of other exits. There: {json.dumps(theirs['exits'])}. To be trained: "
                    f"{json.dumps(own['exits'])}. They would be replaced. {remedy}"
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the newest heads, and the best if these are; a figure that is not finite is never the best."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or _trial(trainer):
            return
        self._save(trainer, pl_module, "last")
        figure = float(trainer.callback_metrics.get(self.monitor, math.nan))
        sign = 1 if self.mode == "min" else -1
        if math.isfinite(figure) and (self.best is None or sign * figure < sign * self.best):
            self.best = figure
            self._save(trainer, pl_module, "")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the newest heads.

        Raises:
            UserError: If the monitored figure was never logged, or never finite, so that no heads were the best.
        """
        if _trial(trainer):
            return
        self._save(trainer, pl_module, "last")
        if self.best is None:
            logged = trainer.callback_metrics
            trouble = "which was never finite" if self.monitor in logged else "which was never logged"
            raise UserError(
                f"HeadsCheckpoint was told to monitor {self.monitor}, {trouble}. Logged: "
                f"{', '.join(sorted(logged)) or 'nothing'}. Monitor one of these; the newest heads are in "
                f"{self.folder / 'last'}."
            )
        if trainer.is_global_zero:
            print(f"Wrote the heads with the best {self.monitor}, {self.best:.4g}, to {self.folder}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report what is kept of a run that did not end."""
        if not trainer.is_global_zero or _trial(trainer) or trainer.global_step == 0:
            return
        if not self._saved:
            kept = f"This run had saved no heads yet; {self.folder} is as it was."
        elif self.best is None:
            kept = f"Kept: the newest heads of this run, in {self.folder / 'last'}."
        else:
            kept = f"Kept: the heads with the best {self.monitor}, {self.best:.4g}, in {self.folder}."
        print(kept, file=sys.stderr)

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        module = common.watched(pl_module, HeadsModule, self)
        if not all_finite(module.bank.state_dict().values()):
            raise UserError(
                f"The heads were not saved, because a value in them is infinite or not a number. What lay in "
                f"{self.folder} is kept. Lower the learning rate of the phases, or set trainer.gradient_clip_val: 1."
            )
        if trainer.is_global_zero:
            module.bank.save(self.folder / name, module.spec, module.backbone.recipe)
            self._saved = True


def held(folder: Path) -> dict[str, Any] | None:
    """Fingerprint, backbone and exits of the heads in a folder; None if there are none, empty if it cannot be read.

    It is read from the weights, since these are what would be lost.
    """
    if not (folder / WEIGHTS).exists():
        return None
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            record = json.loads((file.metadata() or {})["record"])
        backbone = f"{record['backbone']['family']} of {record['backbone']['depth']} blocks"
        return {"fingerprint": record["fingerprint"], "backbone": backbone, "exits": record["exits"]}
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
        return {}


def _trial(trainer: Trainer) -> bool:
    return bool(cast(Any, trainer).fast_dev_run)
