"""The parser of every command: short class names, repeated keys refused, complaints in one screen."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_loader
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from transformers.utils.logging import disable_progress_bar

from dynamax.backbones.skipped_state import SkippedState
from dynamax.backbones.sources import Source
from dynamax.commands.config_merge import set_merge_rules
from dynamax.commands.messages import Known, explain
from dynamax.data import answers, corpora, generated, glosses, hidden, language, tasks
from dynamax.data.text import Corpus, TextSource
from dynamax.decoding.sampling import Sampler
from dynamax.errors import UserError
from dynamax.heads.base import Gate, Lens
from dynamax.modules import decoding, distilling, heads, pretraining
from dynamax.objectives.base import Objective
from dynamax.objectives.distillation import DistillationLoss
from dynamax.objectives.early_exit import LanguageObjective
from dynamax.policies.base import TerminationPolicy
from dynamax.registry import ALL, Registry, packages
from dynamax.tasks.base import Task

CALLBACKS: Registry = Registry("dynamax.callbacks", "callback")
COMPOSED = (
    answers,
    corpora,
    decoding,
    distilling,
    generated,
    glosses,
    heads,
    hidden,
    language,
    pretraining,
    tasks,
)  # imported, so that their classes go by short names

LOAD_YAML = get_loader("yaml")
NOISE = (
    ".*LeafSpec",  # Lightning 2.6 beside torch 2.13
    ".*does not have many workers",  # batches come from memory maps: workers would only copy
    "Found \\d+ module\\(s\\) in eval mode",  # a backbone is always in eval mode: it has no dropout to train with
    "You have overridden `on_before_batch_transfer`",  # on purpose
)

KINDS: dict[str, type | tuple[type, ...]] = {
    "backbone": Source,
    "lens": Lens,
    "gates": Gate,
    "policy": TerminationPolicy,
    "policies": TerminationPolicy,
    "objective": (Objective, LanguageObjective),  # of a phase of heads, and of a language model
    "loss": DistillationLoss,
    "task": Task,
    "text": TextSource,
    "corpus": Corpus,
    "writer": Source,
    "teacher": Source,
    "tokenizer": Source,
    "rule": SkippedState,
    "sampler": Sampler,
    "callbacks": Callback,
    "model": LightningModule,
    "data": LightningDataModule,
}


class Parser(LightningArgumentParser):
    """Raises its complaints; takes no abbreviated options, which would hide misspelt ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - those of jsonargparse
        super().__init__(*args, **{"exit_on_error": False, "allow_abbrev": False, **kwargs})

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:  # noqa: ANN401 - those of jsonargparse
        """Options of a class; some of them replace an earlier value as a whole."""
        added = super().add_class_arguments(*args, **kwargs)
        set_merge_rules(self)
        return added

    def add_function_arguments(self, *args: Any, **kwargs: Any) -> list[str]:  # noqa: ANN401 - those of jsonargparse
        """The same of a function."""
        added = super().add_function_arguments(*args, **kwargs)
        set_merge_rules(self)
        return added

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Namespace:  # noqa: ANN401 - those of jsonargparse
        """What LightningCLI calls, by the name that jsonargparse has for it now."""
        return self.instantiate(cfg, **kwargs)


@contextmanager
def one_screen(parser: ArgumentParser) -> Iterator[None]:
    """Turn the parser's complaints into messages for the person who typed.

    Raises:
        UserError: In place of the parser's error.
    """
    try:
        yield
    except ArgumentError as error:
        raise UserError(explain(str(error), Known(class_names, own_class_names, lambda: _options(parser)))) from error


def _options(parser: ArgumentParser) -> set[str]:
    own = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    trainer = {f"trainer.{option}" for option in _parameters(Trainer)}
    return own | trainer | {option for kind in _kinds(*KINDS.values()) for option in _parameters(kind)}


def class_names(key: str) -> list[str]:
    """Names of the classes that may stand under a key; of all classes, if the key is none of ours."""
    return sorted({each.__name__ for each in _named(key)})


def own_class_names(key: str) -> list[str]:
    """The same, of this project and its plug-ins only; Lightning's documentation lists its own."""
    known = packages()
    return sorted({each.__name__ for each in _named(key) if each.__module__.split(".")[0] in known})


def _named(key: str) -> Iterator[type]:
    for kind in _kinds(KINDS[key]) if key in KINDS else _kinds(*KINDS.values()):
        yield from _classes(kind)


def _kinds(*kinds: type | tuple[type, ...]) -> list[type]:
    return [each for kind in kinds for each in (kind if isinstance(kind, tuple) else (kind,))]


def _classes(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        if not inspect.isabstract(child) and not child.__name__.startswith("_"):
            yield child
        yield from _classes(child)


def _parameters(kind: type) -> set[str]:
    return {name for each in (kind, *_classes(kind)) for name in inspect.signature(each).parameters}


def prepare() -> None:
    """Make short class names known and repeated keys an error; silence what tells a user nothing."""
    _know_all_classes()
    _refuse_repeated_keys()
    disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_worth_saying)
    for message in NOISE:
        warnings.filterwarnings("ignore", message)


def _worth_saying(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def _know_all_classes() -> None:
    for registry in (*ALL, CALLBACKS):
        registry.load_all()


def _refuse_repeated_keys() -> None:
    """PyYAML keeps the last of two equal keys without a word."""

    def checked(stream: str) -> Any:  # noqa: ANN401 - whatever YAML holds
        for node in _mappings(yaml.compose(stream, Loader=yaml.SafeLoader)):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(
                        f"The key {key} stands twice in the mapping that begins on line {node.start_mark.line + 1}. "
                        f"A key may stand once: the second would hide the first. Remove one."
                    )
        return LOAD_YAML(stream)

    set_loader("yaml", checked)


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)
