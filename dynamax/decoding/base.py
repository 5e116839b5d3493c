"""What a decoder is: it turns a prompt into tokens, a step at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, final

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.decoding.probe import Probe
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.decoding.session import Session
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Spec, Step


class Decoder(ABC):
    """Turns a prompt into tokens. A subclass writes ``steps``, and takes its own options behind the four here.

    Args:
        backbone: The model.
        exits: Its exits; None for a decoder that reads none.
        policy: When to leave; None for a decoder that never does.
        sampler: How tokens are drawn; greedy by default.

    Attributes:
        lossless: Whether its tokens are those of full decoding; sampled, of the same distribution.
        drafts: Whether it drafts tokens and verifies them later. Such a decoder takes no forced tokens.
    """

    lossless: ClassVar[bool] = False
    drafts: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitBank | None = None,
        policy: TerminationPolicy | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        if exits is not None and policy is not None:
            policy.validate(exits.depths)
            offered = {depth: exits.gates(depth) for depth in exits.depths}
            exits = exits.select_gates(policy.gates, depths=policy.depths)
            policy.check_gates(offered, backbone.spec.depth)
            if self.drafts and exits.depths[-1] == backbone.spec.depth:
                raise UserError(
                    f"{type(self).__name__} was given exits of which one is at depth {backbone.spec.depth}, the top. A "
                    f"draft from there has cost a full pass already. Ask the exits below alone: OnlyAt(policy, "
                    f"depths); or decode with EarlyExit."
                )
        self.backbone = backbone
        self.exits = exits
        self.policy = policy
        self.sampler = sampler or Greedy()

    @property
    def teacher_forced(self) -> bool:
        """Whether one pass over a known text tells what decoding along it would do."""
        return False

    def options(self) -> dict[str, object]:
        """What reports say of it beside its name: its own options, as JSON values."""
        return {}

    @abstractmethod
    def steps(self, session: Session) -> Iterator[Step]:
        """Yield steps without end, the prompt's own first; ``decode`` stops asking.

        ``session.token_B`` is what each row goes on with.
        """

    @final
    @torch.inference_mode()
    def decode(
        self,
        prompt_BT: Tensor,
        *,
        max_new_tokens: int,
        eos_token_id: Sequence[int] = (),
        pad_B: Tensor | None = None,
        forced_BT: Tensor | None = None,
        probe: Probe | None = None,
    ) -> Iterator[Step]:
        """Yield one ``Step`` for each generated token.

        Args:
            prompt_BT: Token ids, int64; rows padded at the left.
            max_new_tokens: Most tokens to generate.
            eos_token_id: Tokens that end a row; decoding ends when every row has ended. An ended row repeats the
                first of them.
            pad_B: Padding positions at the left of each row, or None.
            forced_BT: Tokens to go on with in place of the generated ones; the steps still tell what
                would have been generated at each position.
            probe: A clock.

        Raises:
            UserError: At the first step: if the prompt is not token ids of shape [B, T] within the vocabulary, or
                does not fit the context together with ``max_new_tokens``; if forced tokens are too few, or given to a
                decoder that drafts.
        """
        session = self.begin(
            prompt_BT,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_B=pad_B,
            forced_BT=forced_BT,
            probe=probe,
        )
        for step in self.steps(session):
            yield replace(step, token_B=session.told(step))
            if session.finished:
                return

    @final
    def begin(
        self,
        prompt_BT: Tensor,
        *,
        max_new_tokens: int,
        eos_token_id: Sequence[int] = (),
        pad_B: Tensor | None = None,
        forced_BT: Tensor | None = None,
        probe: Probe | None = None,
        sampler: Sampler | None = None,
    ) -> Session:
        """Check a prompt, and open a run that has read nothing yet. Arguments and errors are those of ``decode``.

        ``sampler`` takes the place of the decoder's own.
        """
        if self.policy is not None and self.policy.known_text:
            raise UserError(
                f"{self.policy.label} needs the full model's tokens, which nobody knows while decoding. Follow a known "
                f"text with it (engine.read(text).apply_policy(policy), `dynamax test`), or decode with another policy."
            )
        check_prompt(prompt_BT, max_new_tokens=max_new_tokens, spec=self.backbone.spec)
        rows, length = prompt_BT.shape
        if pad_B is not None and (pad_B.shape != (rows,) or bool(((pad_B < 0) | (pad_B >= length)).any())):
            raise UserError(
                f"pad_B is {pad_B.tolist()}; wanted: for each of the {rows} rows, how many of its {length} tokens are "
                f"padding, from 0 to {length - 1}. Count the padding at the left of each row."
            )
        if forced_BT is not None:
            self._check_forced(forced_BT, rows, max_new_tokens)
        return Session(
            self.backbone,
            self.exits,
            sampler or self.sampler,
            prompt_BT,
            max_new_tokens=max_new_tokens,
            capacity=prompt_BT.shape[1] + max_new_tokens,
            eos_token_id=eos_token_id,
            pad_B=pad_B,
            forced_BT=forced_BT,
            probe=probe,
        )

    def _check_forced(self, forced_BT: Tensor, rows: int, max_new_tokens: int) -> None:
        if self.drafts:
            raise UserError(
                f"{type(self).__name__} was given forced tokens, but its own are full decoding's already. "
                f"Force tokens on EarlyExit, or leave forced_BT out."
            )
        check_tokens(forced_BT, "The forced text", self.backbone.spec)
        if len(forced_BT) != rows:
            raise UserError(
                f"Forced tokens were given for {len(forced_BT)} rows, but the prompt has {rows}. Give a row each."
            )
        if forced_BT.shape[1] < max_new_tokens - 1:
            raise UserError(
                f"{forced_BT.shape[1]} forced tokens were given for {max_new_tokens} steps; wanted: at least "
                f"{max_new_tokens - 1}, one to go on with after each step but the last. Lower max_new_tokens, or force "
                f"more tokens."
            )


DecoderFactory = Callable[[Backbone, ExitBank | None, TerminationPolicy | None, Sampler | None], Decoder]
"""A decoder class, or one with its own options filled in: what YAML and ``Engine.decoder`` take."""


def read_exits(decoder: Decoder) -> tuple[ExitBank, TerminationPolicy]:
    """The exits and the policy of a decoder that cannot do without.

    Raises:
        UserError: If one is missing.
    """
    if decoder.exits is None or decoder.policy is None:
        missing = "exits" if decoder.exits is None else "policy"
        raise UserError(
            f"{type(decoder).__name__} was given no {missing}. Give it exits (heads that fit has trained, or untrained "
            f"ones) and a policy such as MaxProb(0.9), or decode with Full."
        )
    return decoder.exits, decoder.policy


def check_prompt(prompt_BT: Tensor, *, max_new_tokens: int, spec: Spec) -> None:
    """Raise if the prompt is not one that the backbone can read, or does not fit its context with the answer.

    Waits for the device once, to look at the tokens.

    Raises:
        UserError: If the prompt is no integer tensor of two dimensions, or empty, or has a token outside the
            vocabulary; if ``max_new_tokens`` is below 1, or both together are too long.
    """
    check_tokens(prompt_BT, "The prompt", spec)
    length = prompt_BT.shape[1]
    if length < 1 or max_new_tokens < 1:
        raise UserError(
            f"The prompt has {length} tokens and max_new_tokens is {max_new_tokens}; both must be at least 1. "
            f"Give a prompt that is not empty and ask for at least one token."
        )
    if length + max_new_tokens > spec.context:
        raise UserError(
            f"The prompt has {length} tokens and {max_new_tokens} more were asked for, but the backbone's context "
            f"holds {spec.context}. Shorten the prompt to {max(spec.context - max_new_tokens, 0)} tokens or lower "
            f"max_new_tokens."
        )


def check_tokens(tokens_BT: Tensor, what: str, spec: Spec) -> None:
    """Raise if these are not token ids of the backbone. Waits for the device once, to look at them.

    Args:
        tokens_BT: The tokens.
        what: What they are, for the message.
        spec: Of the backbone.

    Raises:
        UserError: If it is no integer tensor of two dimensions with at least one row, or a token lies outside the
            vocabulary.
    """
    if tokens_BT.dim() != 2 or tokens_BT.dtype not in (torch.int64, torch.int32):
        raise UserError(
            f"{what} is a {tokens_BT.dtype} tensor of shape {list(tokens_BT.shape)}; wanted: token ids, int64, of "
            f"shape [rows, tokens]. Give what the tokenizer returns, one text as tokens[None], ids as tokens.long()."
        )
    if not len(tokens_BT):
        raise UserError(f"{what} has no rows; wanted: shape [rows, tokens] with at least one row. Give a text.")
    least, most = torch.stack(tokens_BT.aminmax()).tolist() if tokens_BT.numel() else (0, 0)
    if least < 0 or most >= spec.vocab:
        raise UserError(
            f"{what} has the token {least if least < 0 else most}, but the backbone's vocabulary is 0 to "
            f"{spec.vocab - 1}. Encode the text with the backbone's own tokenizer."
        )
