"""What a contender is, and what all of them are given. Knows no package but this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from dynamax.backbones.sources import Source
from dynamax.decoding.base import DecoderFactory
from dynamax.engine import Exits
from dynamax.policies.base import TerminationPolicy

EXTRA = "pip install -e '.[bench]'"
"""Installs all peers, in a clone of the repository."""

Told = Callable[[Sequence[int]], None]
"""Takes new token ids as soon as they are known."""


@dataclass(frozen=True)
class Subject:
    """What every contender decodes with.

    Attributes:
        source: Where the model comes from.
        folder: The model in transformers' layout; None for a source of another kind.
        ends: Tokens that end an answer.
        max_new_tokens: Most tokens of an answer.
        context: Most tokens of a prompt and its answer together.
        threads: Threads that a contender may use.
        heads: Folder of trained heads.
        exits: Untrained exits, where there are no heads.
        policy: When to leave.
        decoder: A decoder of the user's choice.
    """

    source: Source
    folder: Path | None
    ends: tuple[int, ...]
    max_new_tokens: int
    context: int
    threads: int
    heads: Path | None = None
    exits: Exits | None = None
    policy: TerminationPolicy | None = None
    decoder: DecoderFactory | None = None


class Contender(ABC):
    """One way to decode the model: greedily, one prompt at a time, on the CPU.

    Args:
        name: What it is called on the command line and in the report.
        subject: What it decodes with.

    Attributes:
        about: What it runs, in a few words.
        weights: Format of its weights, a name of ``dynamax.bench.floors.FORMATS``.
        module: The module that it imports, where that is another package's.
        package: Name of that package for pip.
        ours: Whether it is this package's.
    """

    about: str
    weights: str = "float32"
    module: ClassVar[str] = ""
    package: ClassVar[str] = ""
    ours: ClassVar[bool] = False

    def __init__(self, name: str, subject: Subject) -> None:
        self.name = name
        self.subject = subject

    def absent(self) -> str | None:
        """Why it cannot run with this model here, and what would help; None if it seems to be able to.

        Nothing is imported or loaded.
        """
        if self.module and find_spec(self.module) is None:
            return f"the package {self.package} is not installed: pip install {self.package}, or {EXTRA}"
        if not self.ours and self.subject.folder is None:
            return "it reads a folder in transformers' layout, which this source has not"
        return None

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """Make what ``load`` reads, where it is not there yet; its time and memory do not count."""

    @abstractmethod
    def load(self) -> None:
        """Load the model, so that ``decode`` can run."""

    @abstractmethod
    def decode(self, prompt: Sequence[int], told: Told) -> None:
        """Answer one prompt, and tell every new token as soon as it is known.

        It stops at an end token, which is told too, and at ``max_new_tokens``.

        Args:
            prompt: Token ids.
            told: Takes the new tokens.
        """

    @abstractmethod
    def unload(self) -> None:
        """Let go of what ``load`` took."""
