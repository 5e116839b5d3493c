"""Lightning's progress bars on stderr, fit for logs; with what a step is doing. Knows no models."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from dynamax.progress import Bar, on_terminal


class RunBars(TQDMProgressBar):
    """Lightning's bars, each a ``dynamax.progress.Bar``. In a log, training tells a line now and then, not by batch."""

    def init_sanity_tqdm(self) -> Tqdm:
        """The bar of the look at validation before training; not shown, it takes less than two seconds."""
        return cast(Tqdm, Bar(disable=True))

    def init_train_tqdm(self) -> Tqdm:
        """The bar of an epoch."""
        return self._bar(self.train_description, smoothing=0)

    def init_validation_tqdm(self) -> Tqdm:
        """The bar of validation: beside that of training, or alone."""
        if self.trainer.state.fn == "validate":
            return self._bar(self.validation_description)
        return self._bar(self.validation_description, leave=False, position=1, disable=not on_terminal())

    def init_test_tqdm(self) -> Tqdm:
        """The bar over a task's examples."""
        return self._bar("Testing", unit="example")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar before other callbacks print what was found."""
        self.test_progress_bar.close()

    def init_predict_tqdm(self) -> Tqdm:
        """The bar over a task's examples."""
        return self._bar(self.predict_description, unit="example")

    def _bar(self, text: str, **options: Any) -> Tqdm:  # noqa: ANN401 - those of tqdm
        layout = {"bar_format": self.BAR_FORMAT, "leave": True, **options}
        layout["disable"] = self.is_disabled or layout.get("disable", False)
        return cast(Tqdm, Bar(desc=text, **layout))

    def say(self, text: str) -> None:
        """Show behind the bar of a test what is being done."""
        if isinstance(self._test_progress_bar, Bar):
            self._test_progress_bar.say(text)
