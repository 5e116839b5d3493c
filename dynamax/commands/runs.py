"""``fit validate test predict cache train tune distill``: LightningCLI over our modules. Knows parsers, not models."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from dynamax.commands.answers import AnswersPrinter
from dynamax.commands.before import (
    check_checkpoint,
    check_numbers,
    check_outputs,
    lightning_explained,
    trainer_explained,
)
from dynamax.commands.parsing import Rules, prepare
from dynamax.data.hidden import HiddenStates
from dynamax.data.language import LanguageData
from dynamax.data.tasks import TaskData
from dynamax.data.written import WrittenText
from dynamax.errors import UserError
from dynamax.heads.saved import RECORD
from dynamax.modules.bars import RunBars
from dynamax.modules.checks import one_device
from dynamax.modules.decoding import DecodingModule
from dynamax.modules.distilling import DistillationModule
from dynamax.modules.heads import HeadsModule
from dynamax.modules.language import LanguageModule
from dynamax.modules.pretraining import PretrainingModule
from dynamax.modules.tuning import TuningModule
from dynamax.registry import CALLBACKS

LANGUAGE: dict[str, type[LanguageModule]] = {
    "train": PretrainingModule,
    "tune": TuningModule,
    "distill": DistillationModule,
}
"""Commands that train a whole model, and what they train."""
MEANT: dict[str, type[LightningModule]] = {"fit": HeadsModule, "test": DecodingModule, **LANGUAGE}
"""Our models, by the command that each is meant for."""
TAKES: dict[str, tuple[str, tuple[type[LightningModule], ...]]] = {
    "fit": ("trains exit heads", (HeadsModule,)),
    "cache": (
        "fills the store that exit heads are trained on, or writes the text of tune",
        (HeadsModule, TuningModule),
    ),
    "validate": ("scores what was trained", (HeadsModule, LanguageModule)),
    "test": ("decodes a task", (DecodingModule,)),
    "predict": ("decodes a task", (DecodingModule,)),
    "train": ("trains a language model from the start", (PretrainingModule,)),
    "tune": ("tunes a pretrained model", (TuningModule,)),
    "distill": ("trains a student of a Transformer", (DistillationModule,)),
}
"""What commands do, and those of our models that they can do it with."""
CHECKPOINTS = r"best|last|hpc|registry.*|\w+://.+"
"""Values of ``ckpt_path`` that Lightning finds a file for."""
NOISE = (
    ".*LeafSpec",  # Lightning 2.6 beside torch 2.13
    ".*does not have many workers",  # batches come from memory maps: workers would only copy
    "Found \\d+ module\\(s\\) in eval mode",  # a backbone is always in eval mode: it has no dropout to train with
    "You have overridden `on_before_batch_transfer`",  # on purpose
)
"""Warnings that tell a user nothing."""


class RunParser(Rules, LightningArgumentParser):
    """LightningCLI's parser, under our rules."""

    classes: ClassVar[dict[str, Sequence[type]]] = {
        "model": tuple(MEANT.values()),
        "data": (HiddenStates, TaskData, LanguageData, WrittenText),
        "callbacks": tuple(getattr(callbacks, name) for name in callbacks.__all__),
    }

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Namespace:  # noqa: ANN401 - those of jsonargparse
        """What LightningCLI calls, by the name that jsonargparse has for it now."""
        return self.instantiate(cfg, **kwargs)


class StoreTrainer(Trainer):
    """A trainer that can also stop once the data has been prepared."""

    def cache(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Fill the hidden-state store only, or write all text of ``tune``; a run that was stopped goes on."""
        if isinstance(datamodule, WrittenText):
            datamodule.write_all()
        else:
            datamodule.prepare_data()

    def train(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | Path | None = None
    ) -> None:
        """Train a whole language model: from the start, as a student of another, or a pretrained one.

        Args:
            model: The model; of a student, its teacher too.
            datamodule: Its text.
            ckpt_path: Checkpoint to go on from; ``last`` finds the newest, where there is one.
        """
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)

    tune = distill = train  # what differs is the model


class DynamaxCLI(LightningCLI):
    """LightningCLI with commands of our own; a store of hidden states follows the heads it is for."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands, and the arguments of their methods that are not options."""
        own = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "cache": own, **dict.fromkeys(LANGUAGE, own)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the store the model's backbone, and the depths of its exits."""
        links = {
            "backbone": lambda model: model.backbone if isinstance(model, HeadsModule) else None,
            "exits": lambda model: model.stored_depths() if isinstance(model, HeadsModule) else [],
        }
        for name, compute in links.items():
            parser.link_arguments("model", f"data.init_args.{name}", compute_fn=compute, apply_on="instantiate")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:  # noqa: ANN401
        super()._add_subcommands(parser, **kwargs)
        for name, subparser in self._subcommand_parsers.items():
            subparser.prog = f"dynamax {name}"  # options stand behind the command, not before it
        # Lightning's table has a line for each figure of each threshold
        self._subcommand_parsers["test"].set_defaults({"verbose": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a message about a mistake fits on one screen."""
        self._given = [str(each) for each in cast(Sequence[str], args)]
        self.config = cast(RunParser, parser).read_arguments(self._given)
        options = self.config[self.config.subcommand]
        check_numbers(options)
        path = options.get("ckpt_path")
        if path and not re.fullmatch(CHECKPOINTS, str(path)):
            if not Path(path).is_file():
                raise UserError(f"There is no checkpoint {path}. Correct the path after --ckpt_path.")
            check_checkpoint(path)

    def _run_subcommand(self, subcommand: str) -> None:
        began = time.time()
        try:
            with lightning_explained(f"dynamax {subcommand}"):
                super()._run_subcommand(subcommand)
        except (KeyboardInterrupt, SystemExit) as stopped:
            by_hand = KeyboardInterrupt in (type(stopped), type(stopped.__context__))  # Lightning exits with 1 for it
            if by_hand or (isinstance(stopped, SystemExit) and stopped.code == 143):
                print("dynamax:", *self._kept(began), file=sys.stderr, flush=True)
            raise

    def _kept(self, began: float) -> list[str]:
        """What a run that was stopped leaves behind, and how to go on."""
        command, lines = str(self.subcommand), []
        if command == "test":
            return ["A report is written at the end, so there is none of this run. Run the same command again."]
        if command == "validate":
            return ["Nothing had to be kept. Run the same command again."]
        if command == "predict":
            return ["The answers that were printed are whole; run the same command again for all."]
        empty = isinstance(self.datamodule, HiddenStates) and not any(Path(self.datamodule.folder).rglob("shard-*"))
        if isinstance(self.datamodule, HiddenStates | LanguageData | WrittenText) and not empty:
            lines.append(f"What is whole in {self.datamodule.folder} is kept: the same command goes on behind it.")
        if command == "cache":
            return lines
        saving = CALLBACKS.get("HeadsCheckpoint")
        present = cast(list[Callback], cast(Any, self.trainer).callbacks)
        for each in present:
            if not isinstance(each, saving):
                continue
            folder = Path(cast(Any, each).folder)
            saved = []
            for what, place in {"the best heads so far": folder, "the newest": folder / "last"}.items():
                file = place / RECORD
                if file.is_file() and file.stat().st_mtime >= began:
                    saved.append(f"{what} in {place}")
            if saved:
                lines.append(f"Saved were {' and '.join(saved)}.")
                earlier = folder / RECORD
                if earlier.is_file() and earlier.stat().st_mtime < began:
                    lines.append(f"Those in {folder} itself are of an earlier run.")
            elif (folder / RECORD).is_file():
                lines.append(f"This run has saved no heads yet; those of an earlier run in {folder} are as they were.")
            else:
                lines.append(f"No heads had been saved to {folder} yet.")
        checkpoints = [each for each in present if isinstance(each, callbacks.ModelCheckpoint)]
        newest = next((path for each in checkpoints if (path := each.last_model_path or each.best_model_path)), None)
        if newest:
            lines.append(f"To go on where it stopped, run the same command with --ckpt_path {newest}")
        else:
            lines.append("No checkpoint of the trainer was saved, so training begins anew with the same command.")
        return lines

    def after_instantiate_classes(self) -> None:
        """Refuse a model that another command is for."""
        command = str(self.subcommand)
        does, kinds = TAKES[command]
        ours = isinstance(self.model, tuple(MEANT.values()))
        if not isinstance(self.model, kinds) and (ours or command in LANGUAGE):
            meant = next((name for name, kind in MEANT.items() if isinstance(self.model, kind)), "fit")
            name = type(self.model).__name__
            raise UserError(f"{command} {does}, but the model is {name}. Use: dynamax {meant} ...")
        if self.datamodule is None and ours:
            raise UserError(f"{command} has no data. Give it, such as --data HiddenStates, or start from a whole run.")
        check_outputs(cast(Trainer, self.trainer), self.datamodule)
        if isinstance(self.model, DecodingModule):
            self.model.command = shlex.join(["dynamax", *self._given])

    def instantiate_trainer(self, **options: Any) -> Trainer:  # noqa: ANN401 - those of Trainer
        """With our progress bars, unless others are given or none are wanted."""
        asked = self.config_init[str(self.subcommand)].trainer
        given = asked.callbacks or []
        given = list(given) if isinstance(given, list) else [given]
        if asked.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in given):
            options["callbacks"] = [RunBars(), *given]  # first, so that a bar has ended when others print
        with trainer_explained():
            return super().instantiate_trainer(**options)

    def before_cache(self) -> None:
        """Build the heads before the store is filled: a mistake in them is found now, not minutes later."""
        if isinstance(self.model, TuningModule):
            if not isinstance(self.datamodule, WrittenText):
                self.model.check_data(self.datamodule)
            return
        self.model.configure_model()
        if isinstance(self.model, HeadsModule):
            self.model.check_data(self.datamodule)

    def before_fit(self) -> None:
        """Also check the trainer."""
        self.before_cache()
        if isinstance(self.model, HeadsModule):
            self.model.check(self.trainer, self.datamodule)
        one_device(self.trainer, self.model)

    def before_validate(self) -> None:
        """Refuse to score what was not trained."""
        if self.config.validate.ckpt_path is not None:
            return
        if isinstance(self.model, LanguageModule):
            raise UserError(
                "validate was given no checkpoint, so it would score a model that nobody trained. Name one that "
                "training saved: --ckpt_path FILE."
            )
        if not isinstance(self.model, HeadsModule) or self.model.saved is not None:
            return
        self.model.configure_model()
        if list(self.model.bank.parameters()):
            raise UserError(
                "validate was given no trained heads, so it would score fresh ones. Name the folder that fit wrote, "
                "such as --model.heads runs/demo/heads, or a checkpoint of the trainer, --ckpt_path FILE."
            )

    def before_train(self) -> None:
        """Refuse mistakes that would show only after the text has been written."""
        model = cast(LanguageModule, self.model)
        model.check(self.trainer)
        model.check_data(self.datamodule)

    before_tune = before_distill = before_train

    def predict(self, **options: Any) -> None:  # noqa: ANN401 - those of Trainer.predict
        """Print each answer as a line of JSON as soon as it is there. All else, such as progress, goes to stderr."""
        trainer = cast(Any, self.trainer)
        trainer.callbacks.append(AnswersPrinter(sys.stdout))
        with contextlib.redirect_stdout(sys.stderr):
            trainer.predict(**{**options, "return_predictions": False})


def main(arguments: Sequence[str]) -> None:
    """Run one of Lightning's commands, or ``cache``, ``train``, ``tune`` or ``distill``."""
    prepare()
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()  # an advertisement
    )
    DynamaxCLI(
        trainer_class=StoreTrainer,
        trainer_defaults={"enable_checkpointing": False, "default_root_dir": "runs", "devices": 1},
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_class=RunParser,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=list(arguments),
    )
