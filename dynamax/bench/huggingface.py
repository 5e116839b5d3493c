"""transformers' ``generate``: plain, with drafts, and with a compiled step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.streamers import BaseStreamer

from dynamax.bench.base import Contender, Subject, Told


@final
class Teller(BaseStreamer):
    """Tells the tokens of ``generate``, but for the prompt, which it is given first.

    Args:
        told: Takes the new tokens.
    """

    def __init__(self, told: Told) -> None:
        self._told = told
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, or new tokens."""
        if not self._prompt:
            self._told(value.flatten().tolist())
        self._prompt = False

    def end(self) -> None:
        """Nothing is left to tell."""


def load_plain(subject: Subject, dtype: str) -> Any:  # noqa: ANN401 - a model class of transformers
    """The model as transformers loads it by itself, set to greedy decoding to an end token or the limit.

    Penalties and sampling that came with the model are left out.
    """
    assert subject.folder is not None, "absent says so"
    model: Any = AutoModelForCausalLM.from_pretrained(
        subject.folder, dtype=getattr(torch, dtype), local_files_only=True
    ).eval()
    ends = list(subject.ends)
    model.generation_config = GenerationConfig(
        max_new_tokens=subject.max_new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    return model


class Generate(Contender):
    """``generate`` with options.

    Args:
        name: As for every contender.
        subject: As for every contender.
        dtype: What the model computes in.
    """

    def __init__(self, name: str, subject: Subject, dtype: str = "float32") -> None:
        super().__init__(name, subject)
        self.weights = dtype
        self._model: Any = None

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Options of ``generate``."""

    @final
    def load(self) -> None:
        """Load the folder as transformers does by itself."""
        self._model = load_plain(self.subject, self.weights)

    @final
    @torch.no_grad()
    def decode(self, prompt: Sequence[int], told: Told) -> None:
        """Call ``generate``."""
        prompt_1T = torch.tensor([list(prompt)])
        self._model.generate(
            prompt_1T, attention_mask=torch.ones_like(prompt_1T), streamer=Teller(told), **self.options()
        )

    @final
    def unload(self) -> None:
        """Let go of the model."""
        self._model = None


@final
class Plain(Generate):
    """``generate`` as it is; in float32, what every answer is compared with."""

    about = "transformers generate"

    def options(self) -> dict[str, Any]:
        """None."""
        return {}


@final
class Lookup(Generate):
    """Drafts are what followed the last tokens earlier in prompt and answer."""

    about = "transformers generate, prompt_lookup_num_tokens=5"

    def options(self) -> dict[str, Any]:
        """Up to five drafts."""
        return {"prompt_lookup_num_tokens": 5}


@final
class Assisted(Generate):
    """Drafts are the predictions of an untrained exit of the model itself, the deepest of those given."""

    about = "transformers generate, assistant_early_exit"

    def absent(self) -> str | None:
        """Also whether there are exits."""
        if self.subject.exits is None:
            return "it drafts at an untrained exit, and none was given: --exits '{2: {}, 4: {}}'"
        return super().absent()

    def options(self) -> dict[str, Any]:
        """The exit's depth."""
        return {"assistant_early_exit": max(self.subject.exits or ())}


@final
class Static(Generate):
    """Buffers of a fixed size, and a step that torch.compile has made of the model."""

    about = "transformers generate, static cache and torch.compile"

    def options(self) -> dict[str, Any]:
        """A static cache; compilation, which transformers does by itself on a GPU only."""
        config: Any = CompileConfig(dynamic=False)
        config._compile_all_devices = True
        return {"cache_implementation": "static", "compile_config": config}
