"""This package's own contenders: full depth, early exit, lossless, and a decoder of the user's choice."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch

from dynamax.bench.base import Contender, Subject, Told
from dynamax.decoding.base import Decoder
from dynamax.decoding.drafting import Speculative
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.engine import Engine, load

NO_POLICY = "there is no policy: give one, such as --policy MaxProb --policy.threshold 0.5"


class Dynamax(Contender):
    """One of this package's decoders.

    Args:
        name: As for every contender.
        subject: As for every contender.
        precision: Format of the weights, as ``dynamax.load`` takes it; None for its default, float32.
        compiled: Whether inductor compiles the steps.
    """

    ours: ClassVar[bool] = True

    def __init__(self, name: str, subject: Subject, precision: str | None = None, *, compiled: bool = False) -> None:
        super().__init__(name, subject)
        self.precision, self.compiled = precision, compiled
        self.weights = precision or "float32"
        self._decoder: Decoder | None = None

    def engine(self, *, exits: bool) -> Engine:
        """The model, with its exits or without."""
        options: dict[str, Any] = {"precision": self.precision, "compile": self.compiled}
        if exits:
            options |= {"heads": self.subject.heads, "exits": self.subject.exits}
        return load(self.subject.source, device="cpu", **options)

    @abstractmethod
    def decoder(self) -> Decoder:
        """The decoder over a loaded model."""

    @final
    def load(self) -> None:
        """Load the model and make the decoder."""
        self._decoder = self.decoder()

    @final
    def decode(self, prompt: Sequence[int], told: Told) -> None:
        """Run the decoder."""
        assert self._decoder is not None, "load comes first"
        steps = self._decoder.decode(
            torch.tensor([list(prompt)]),
            max_new_tokens=self.subject.max_new_tokens,
            eos_token_id=self.subject.ends,
        )
        for step in steps:
            told([int(step.token_B[0])])

    @final
    def unload(self) -> None:
        """Let go of the model."""
        self._decoder = None


@final
class FullDepth(Dynamax):
    """Every block for every token."""

    about = "dynamax, every block"

    def decoder(self) -> Decoder:
        """Full."""
        return self.engine(exits=False).decoder(None, Full)


class WithExits(Dynamax):
    """A decoder that needs exits and a policy."""

    def absent(self) -> str | None:
        """Also whether there are exits and a policy."""
        if self.subject.heads is None and self.subject.exits is None:
            return (
                "the model has no exits: give trained heads, --heads FOLDER, or, for a model that was trained with "
                "exits, --exits '{2: {}, 4: {}}'"
            )
        if self.subject.policy is None:
            return NO_POLICY
        return super().absent()


@final
class Early(WithExits):
    """What exits say is the answer."""

    about = "dynamax, EarlyExit"

    def decoder(self) -> Decoder:
        """EarlyExit, with exact state."""
        return self.engine(exits=True).decoder(self.subject.policy, EarlyExit)


@final
class Lossless(Dynamax):
    """Drafts from earlier text, and from exits if there are any with a policy; the whole model verifies them."""

    about = "dynamax, Speculative"

    @property
    def _has_exits(self) -> bool:
        return self.subject.heads is not None or self.subject.exits is not None

    def absent(self) -> str | None:
        """Also whether there is a policy, where there are exits."""
        return NO_POLICY if self._has_exits and self.subject.policy is None else super().absent()

    def decoder(self) -> Decoder:
        """Speculative."""
        policy = self.subject.policy if self._has_exits else None
        return self.engine(exits=self._has_exits).decoder(policy, Speculative)


@final
class Chosen(WithExits):
    """The decoder that the user names, with its options."""

    about = "dynamax, the decoder of --decoder"

    def absent(self) -> str | None:
        """Also whether a decoder was named."""
        if self.subject.decoder is None:
            return "no decoder was named: give one with its options, such as --decoder SelfSpeculative"
        return super().absent()

    def decoder(self) -> Decoder:
        """The user's."""
        decoder = self.engine(exits=True).decoder(self.subject.policy, self.subject.decoder)
        self.about = ", ".join(
            ["dynamax", type(decoder).__name__, *(f"{name}={value}" for name, value in decoder.options().items())]
        )
        return decoder
