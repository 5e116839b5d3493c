"""An answer on its way: token by token, as text that can be shown. Does not know how models are loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import final

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynamax.decoding.base import Decoder
from dynamax.decoding.batching import Scheduler
from dynamax.decoding.cost import FREE, Cost, CostModel
from dynamax.errors import UserError
from dynamax.generation import GenerationOptions
from dynamax.types import Step


@dataclass(frozen=True)
class Token:
    """One token of a stream.

    Attributes:
        text: What can be shown now: whole characters; empty while a character or a stop string may be incomplete.
        token: Its id; None for the text that was held back until the end.
        depth: Blocks it ran through.
    """

    text: str
    token: int | None
    depth: int


@dataclass(frozen=True)
class AnswerCost:
    """What an answer cost beside full decoding of the same tokens; the prompt's own pass is left out.

    Attributes:
        tokens: Decoded tokens, the first one left out.
        blocks_per_token: Block calls a token.
        total: Blocks of the model.
        cost: FLOPs and bytes of all of them.
        full: The same of full decoding.
    """

    tokens: int
    blocks_per_token: float
    total: int
    cost: Cost
    full: Cost


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: The text, cut at the first stop string; no end token in it.
        tokens: Token ids, the end token included.
        depths: Blocks that each token ran through; the first comes from the prompt's own pass, at full depth.
        finish_reason: ``eos``, ``stop_string`` or ``length``.
        cost: What was saved.
        seconds: Wall time of decoding; what the reader of a stream does between tokens is not counted. Of several
            answers side by side, the time of each step counts for all that it gave a token.
        first_token_seconds: The part of it until the first token.
        steps: All that was counted, step by step.
    """

    text: str
    tokens: list[int]
    depths: list[int]
    finish_reason: str
    cost: AnswerCost
    seconds: float
    first_token_seconds: float
    steps: list[Step]


@final
class Transcript:
    """An answer as it grows, a step at a time.

    Args:
        decoder: What decodes.
        tokenizer: The model's.
        prompt: Tokens of the prompt.
        options: When it ends.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, prompt: int, options: GenerationOptions
    ) -> None:
        self._decoder, self._prompt = decoder, prompt
        self._text = TextStream(tokenizer, options)
        self._steps: list[Step] = []
        self._seconds: list[float] = []

    @property
    def stopped(self) -> bool:
        """Whether an end token or a stop string has ended it."""
        return self._text.stopped is not None

    def add(self, step: Step, began: float) -> Token:
        """Take one more step, which was waited for since ``began`` (``time.perf_counter``); its token and text.

        Raises:
            UserError: If its logits hold NaN.
        """
        token = int(step.token_B[0])  # waits for the device
        self._seconds.append(time.perf_counter() - began)
        if bool(step.logits_BV.isnan().any()):
            raise UserError(
                f"The logits at depth {step.depth} hold NaN, so there is no next token. Check the weights of the model "
                f"and of the heads, or load them with a wider dtype such as float32."
            )
        self._steps.append(step)
        return Token(self._text.add(token), token, step.depth)

    def rest(self) -> Token | None:
        """The text that was held back, at the end; None if there is none."""
        text = self._text.rest()
        return Token(text, None, self._steps[-1].depth) if text else None

    def answer(self) -> Answer:
        """All of the answer."""
        if not self._steps:
            raise UserError(
                "This stream failed before its first token, so it has no answer. Mend that, and begin anew."
            )
        self._text.rest()
        return Answer(
            self._text.text,
            [int(step.token_B[0]) for step in self._steps],
            [step.depth for step in self._steps],
            self._text.stopped or "length",
            self._cost(),
            sum(self._seconds),
            self._seconds[0],
            self._steps,
        )

    def _cost(self) -> AnswerCost:
        costs = CostModel(self._decoder.backbone, self._decoder.exits)
        steps = [step for step in self._steps if not step.prefill]
        places = range(self._prompt, self._prompt + len(steps))
        return AnswerCost(
            len(steps),
            sum(sum(step.work.calls) for step in steps) / max(1, len(steps)),
            costs.spec.depth,
            sum((costs.step(step, place) for step, place in zip(steps, places, strict=True)), FREE),
            sum((costs.full(place) for place in places), FREE),
        )


@final
class Stream(Iterator[Token]):
    """An answer on its way; iterate over its tokens.

    Args:
        decoder: What decodes.
        tokenizer: The model's.
        prompt_1T: The prompt.
        options: When it ends.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        prompt_1T: Tensor,
        options: GenerationOptions,
    ) -> None:
        if prompt_1T.shape[:-1] != (1,):
            raise UserError(
                f"The prompt has the shape {list(prompt_1T.shape)}; an answer is to one prompt, [1, tokens]. Answer "
                f"several one after the other, or together with the decoder's decode."
            )
        self._transcript = Transcript(decoder, tokenizer, prompt_1T.shape[1], options)
        decoded = decoder.decode(
            prompt_1T,
            max_new_tokens=options.room(prompt_1T.shape[1], decoder.backbone.spec.context),
            eos_token_id=options.eos_token_id,
        )
        self._tokens = self._run(decoded)

    def __next__(self) -> Token:
        return next(self._tokens)

    @property
    def stopped(self) -> bool:
        """Whether an end token or a stop string has ended it."""
        return self._transcript.stopped

    def _run(self, decoded: Iterator[Step]) -> Iterator[Token]:
        began = time.perf_counter()
        for step in decoded:
            yield self._transcript.add(step, began)
            if self._transcript.stopped:
                return
            began = time.perf_counter()
        if (rest := self._transcript.rest()) is not None:
            yield rest

    def answer(self) -> Answer:
        """All of the answer; what has not been iterated over is decoded now."""
        for _ in self:
            pass
        return self._transcript.answer()


def answers_together(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    options: Sequence[GenerationOptions],
    rows: int,
) -> list[Answer]:
    """Answers to several prompts, side by side; see ``Scheduler``.

    Args:
        decoder: What decodes; one that a scheduler takes.
        tokenizer: The model's.
        prompts: Token ids ``[1, T]`` of each.
        options: When each answer ends, and what draws its tokens.
        rows: Most answers at a time.
    """
    scheduler = Scheduler(decoder, rows)
    growing: dict[int, Transcript] = {}
    context = decoder.backbone.spec.context
    for prompt_1T, own in zip(prompts, options, strict=True):
        length = prompt_1T.shape[1]
        ticket = scheduler.submit(
            prompt_1T,
            max_new_tokens=own.room(length, context),
            eos_token_id=own.eos_token_id,
            sampler=own.sampler,
        )
        growing[ticket] = Transcript(decoder, tokenizer, length, own)
    while scheduler.busy:
        began = time.perf_counter()
        for told in scheduler.step():
            growing[told.ticket].add(told.step, began)
            if growing[told.ticket].stopped and not told.ended:
                scheduler.cancel(told.ticket)
    return [transcript.answer() for transcript in growing.values()]


def cut(text: str, stop_strings: Sequence[str]) -> str:
    r"""``text`` up to the earliest of the stop strings; all of it if none occurs.

    >>> cut(" Paris.\nQ: And", (".", "\n"))
    ' Paris'
    """
    ends = [end for end in map(text.find, stop_strings) if end >= 0]
    return text[: min(ends)] if ends else text


@final
class TextStream:
    """The text of tokens as they come: whole characters only, and nothing from a stop string on.

    Args:
        tokenizer: The model's.
        options: End tokens and stop strings.

    Attributes:
        text: All text so far, cut at the first stop string.
        stopped: Why nothing follows: ``eos`` or ``stop_string``; None while it may go on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: GenerationOptions) -> None:
        self.text = ""
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._options = options
        self._tokens: list[int] = []
        self._shown = ""

    def add(self, token: int) -> str:
        """Take one more token; the text that can be shown now, which may be empty."""
        if token in self._options.eos_token_id:
            self.stopped = "eos"
            return self.rest()
        self._tokens.append(token)
        whole = str(self._tokenizer.decode(self._tokens))
        self.text = cut(whole, self._options.stop_strings)
        if self.text != whole:
            self.stopped = "stop_string"
            return self.rest()
        if whole.endswith("\ufffd"):  # part of a character; the next token completes it
            return ""
        return self._show(whole[: len(whole) - self._held(whole)])

    def rest(self) -> str:
        """What was held back; for the end."""
        return self._show(self.text)

    def _held(self, text: str) -> int:
        """Characters at the end that may turn out to begin a stop string."""
        lengths = [
            length
            for stop in self._options.stop_strings
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ]
        return max(lengths, default=0)

    def _show(self, text: str) -> str:
        new = text[len(commonprefix([self._shown, text])) :]
        self._shown = text
        return new
