"""The package economize: its CALM, which leaves early, and its drafts from lookup and from an exit.

Left out are its techniques that must be trained first (jump, EAGLE-3, Medusa and others).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar, final

import torch

from dynamax.bench.base import Contender, Subject, Told
from dynamax.bench.huggingface import Teller, load_plain


class Economize(Contender):
    """A transformers model in float32 under one technique of economize."""

    module: ClassVar[str] = "economize"
    package: ClassVar[str] = "economize"

    def __init__(self, name: str, subject: Subject) -> None:
        super().__init__(name, subject)
        self._model: Any = None

    @abstractmethod
    def technique(self) -> Any:  # noqa: ANN401 - a configuration of economize
        """The configuration of the technique."""

    @final
    def load(self) -> None:
        """Load the model and attach the technique; economize refuses model types that it does not know."""
        economize = import_module("economize")
        self._model = economize.apply(load_plain(self.subject, "float32"), self.technique())

    @final
    @torch.no_grad()
    def decode(self, prompt: Sequence[int], told: Told) -> None:
        """Call its ``generate``, which has transformers' arguments."""
        prompt_1T = torch.tensor([list(prompt)])
        self._model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), streamer=Teller(told))

    @final
    def unload(self) -> None:
        """Let go of the model."""
        self._model = None


@final
class Calm(Economize):
    """Leaves where the largest probability is above 0.9; the text may differ."""

    about = "economize, CALM, softmax above 0.9"

    def technique(self) -> Any:  # noqa: ANN401
        """CALM on softmax."""
        return import_module("economize.techniques.dynamic_depth").CalmConfig(confidence="softmax", threshold=0.9)


@final
class EconomizeLookup(Economize):
    """Drafts are what followed the last tokens earlier in prompt and answer; lossless."""

    about = "economize, lookup"

    def technique(self) -> Any:  # noqa: ANN401
        """Prompt lookup."""
        return import_module("economize.techniques.lookup").LookupConfig()


@final
class EconomizeExit(Economize):
    """Drafts at the deepest of the given exits, untrained; lossless."""

    about = "economize, early_exit"

    def absent(self) -> str | None:
        """Also whether there are exits."""
        if self.subject.exits is None:
            return "it drafts at an untrained exit, and none was given: --exits '{2: {}, 4: {}}'"
        return super().absent()

    def technique(self) -> Any:  # noqa: ANN401
        """LayerSkip's drafts, with the model's own output matrix."""
        module = import_module("economize.techniques.early_exit")
        return module.EarlyExitConfig(exit_layer=max(self.subject.exits or ()), head="shared")
