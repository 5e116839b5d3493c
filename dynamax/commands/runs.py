"""``fit validate test predict cache train distill``: LightningCLI over our modules. Knows parsers, not models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from dynamax.backbones.sources import Source
from dynamax.commands.messages import UsageError
from dynamax.commands.parsing import Parser, one_screen, prepare
from dynamax.modules.distilling import DistillationModule
from dynamax.modules.heads import HeadsModule
from dynamax.modules.language import LanguageModule
from dynamax.modules.limits import one_device
from dynamax.modules.pretraining import PretrainingModule

LANGUAGE: dict[str, type[LanguageModule]] = {"train": PretrainingModule, "distill": DistillationModule}
"""Commands that train a whole model, and what they train."""


class StoreTrainer(Trainer):
    """A trainer that can also stop once the data has been prepared."""

    def cache(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Fill the hidden-state store only; a run that was stopped goes on."""
        datamodule.prepare_data()

    def train(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | Path | None = None
    ) -> None:
        """Train a language model from the start.

        Args:
            model: The model.
            datamodule: Its text.
            ckpt_path: Checkpoint to go on from; ``last`` finds the newest, where there is one.
        """
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)

    def distill(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | Path | None = None
    ) -> None:
        """Train a Mamba-2 student of a Transformer; arguments as for ``train``.

        Args:
            model: The student, and its teacher.
            datamodule: Its text.
            ckpt_path: Checkpoint to go on from; ``last`` finds the newest, where there is one.
        """
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)


class DynamaxCLI(LightningCLI):
    """LightningCLI with ``cache``, ``train`` and ``distill``; a store of hidden states follows the heads it is for."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands, and the arguments of their methods that are not options."""
        own = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "cache": own, **dict.fromkeys(LANGUAGE, own)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Tell the store whose states are wanted, and at which depths, from the model."""
        parser.link_arguments("model", "data.init_args.backbone", compute_fn=_backbone, apply_on="instantiate")
        parser.link_arguments("model", "data.init_args.exits", compute_fn=_exits, apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            parser.set_defaults({"verbose": False})  # Lightning's table has a line for each figure of each threshold
        return parser

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:  # noqa: ANN401
        super()._add_subcommands(parser, **kwargs)
        for name, subparser in self._subcommand_parsers.items():
            subparser.prog = f"dynamax {name}"  # options stand behind the command, not before it

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; mistakes are told in one screen."""
        with one_screen(parser):
            self.config = parser.parse_args(cast(Sequence[str], args))

    def before_cache(self) -> None:
        """Build the heads before the store is filled: a mistake in them shows now, not minutes later."""
        if isinstance(self.model, LanguageModule):
            raise UsageError(f"fit trains exit heads, but the model is {_meant(self.model)}")
        self.model.configure_model()

    def before_fit(self) -> None:
        """The same, for mistakes in the trainer too."""
        self.before_cache()
        one_device(self.trainer, self.model)
        if isinstance(self.model, HeadsModule):
            self.model.check_epochs(self.trainer)

    def before_validate(self) -> None:
        """Refuse to score heads that nobody trained."""
        if not isinstance(self.model, HeadsModule):
            return
        self.model.configure_model()
        fresh = self.model.saved is None and self.config.validate.ckpt_path is None
        if fresh and list(self.model.bank.parameters()):
            raise UsageError(
                "validate was given no trained heads, so it would score fresh ones. Name the folder that fit wrote, "
                "such as --model.heads runs/demo/heads, or a checkpoint of the trainer, --ckpt_path FILE."
            )

    def before_train(self) -> None:
        """Refuse what other commands are for, and mistakes that would show after the text has been written only."""
        self._before_language("train", "a language model from the start")

    def before_distill(self) -> None:
        """The same."""
        self._before_language("distill", "a student of a Transformer")

    def _before_language(self, command: str, trained: str) -> None:
        if not isinstance(self.model, LANGUAGE[command]):
            raise UsageError(f"{command} trains {trained}, but the model is {_meant(self.model)}")
        self.model.check(self.trainer)

    def predict(self, **options: Any) -> None:  # noqa: ANN401 - those of Trainer.predict
        """Print each answer as a line of JSON."""
        for answer in self.trainer.predict(**options) or []:
            print(json.dumps(answer))


def _meant(model: LightningModule) -> str:
    command = next((name for name, kind in LANGUAGE.items() if isinstance(model, kind)), "fit")
    return f"{type(model).__name__}. Use: dynamax {command} ..."


def _backbone(model: LightningModule) -> Source | None:
    return model.backbone if isinstance(model, HeadsModule) else None


def _exits(model: LightningModule) -> list[int]:
    return sorted(model.exits) if isinstance(model, HeadsModule) else []


def main(arguments: Sequence[str]) -> None:
    """Run one of Lightning's commands, or ``cache``."""
    prepare()
    DynamaxCLI(
        trainer_class=StoreTrainer,
        trainer_defaults={"enable_checkpointing": False, "default_root_dir": "runs", "devices": 1},
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_class=Parser,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=list(arguments),
    )
