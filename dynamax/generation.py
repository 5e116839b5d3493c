"""Between text and tokens: prompts in, text out, and what the model's makers and the caller ask of generation.

The only place that knows end tokens, stop strings, chat templates and ``generation_config``. Names and defaults are
those of transformers' ``generate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dynamax.decoding.sampling import Greedy, Sampled, Sampler
from dynamax.errors import UserError

Chat = Sequence[Mapping[str, str]]
"""Turns of a conversation: ``[{"role": "user", "content": "..."}]``."""

MAX_NEW_TOKENS = 64
"""Where nobody says otherwise."""
SAMPLING = ("temperature", "top_k", "top_p", "seed")
OBEYED = {"max_new_tokens", "max_length", "eos_token_id", "stop_strings", "do_sample", *SAMPLING}
NEUTRAL: dict[str, Sequence[object]] = {
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "dola_layers": (),
    "max_time": (),
}
"""Entries that change which tokens come out and are not followed here, with the values at which they change nothing."""
NEUTRAL_IN_SAMPLING: dict[str, Sequence[object]] = {
    "typical_p": (1.0,),
    "min_p": (0.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}
"""The same, of entries that only sampling heeds."""


@dataclass(frozen=True)
class GenerationOptions:
    """When generation ends, and how tokens are drawn.

    Attributes:
        sampler: Draws tokens.
        eos_token_id: Tokens that end the text; the first stands for all.
        stop_strings: Strings that end the text.
        max_new_tokens: Most tokens to generate.
        max_length: Most tokens of prompt and answer together; None for no such limit.
        asked: Whether the caller gave ``max_new_tokens``, so that it must be had in full or refused.
    """

    sampler: Sampler
    eos_token_id: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    max_length: int | None = None
    asked: bool = False

    def room(self, prompt: int, context: int) -> int:
        """Most tokens to generate behind a prompt of so many, in a context of so many.

        Raises:
            UserError: If ``max_length`` leaves no room.
        """
        if self.asked:
            return self.max_new_tokens
        if self.max_length is not None and prompt >= self.max_length:
            raise UserError(
                f"The prompt has {prompt} tokens, and max_length is {self.max_length} for prompt and answer together. "
                f"Raise max_length, or give max_new_tokens instead."
            )
        most = context if self.max_length is None else min(self.max_length, context)
        return max(1, min(self.max_new_tokens, most - prompt))


def generation_options(
    tokenizer: PreTrainedTokenizerBase | None,
    config: GenerationConfig | None = None,
    *,
    sampler: Sampler | None = None,
    **given: Any,  # noqa: ANN401 - entries of transformers' GenerationConfig
) -> GenerationOptions:
    """What a model's ``generation_config`` says, and over it what the caller gives.

    Args:
        tokenizer: Gives the end token where ``config`` names none.
        config: The model's own rules.
        sampler: Draws tokens; left out, ``do_sample``, ``temperature``, ``top_k`` and ``top_p`` decide.
        **given: Entries by transformers' names, and ``seed``. None means not given. Giving ``temperature``, ``top_k``
            or ``top_p`` means sampling, unless ``do_sample`` says no.

    Raises:
        UserError: If an entry is unknown, or asks for something that is not done here, such as a repetition penalty.
    """
    said = {name: value for name, value in given.items() if value is not None}
    known = GenerationConfig().to_dict()
    for name in said:
        if name not in known and name not in OBEYED:
            raise UserError(
                f"There is no generation option {name}. Options: {', '.join(sorted(OBEYED))}; other entries of "
                f"transformers' GenerationConfig can be given to switch off what the model's own says."
            )
    rules = {} if config is None else {k: v for k, v in config.to_dict().items() if v is not None}
    merged = {**rules, **said}
    if "max_new_tokens" in said:
        merged.pop("max_length", None)
    asked = [name for name in SAMPLING if name in said]
    do_sample = said.get("do_sample", bool(asked) or bool(rules.get("do_sample")))
    if sampler is not None and (asked or "do_sample" in said):
        raise UserError(f"A sampler was given beside {', '.join(asked) or 'do_sample'}. Leave one of them out.")
    if asked and not do_sample:
        raise UserError(
            f"{' and '.join(asked)} would change nothing, because do_sample is off: the most likely token is taken. "
            f"Set do_sample to true, or leave them out."
        )
    sampling = do_sample and not isinstance(sampler, Greedy)
    _refuse_unfollowed(merged, {**NEUTRAL, **(NEUTRAL_IN_SAMPLING if sampling else {})}, said)
    if sampler is None:
        sampler = _sampler(merged) if do_sample else Greedy()
    return GenerationOptions(
        sampler,
        _end_tokens(merged.get("eos_token_id"), tokenizer),
        _strings(merged.get("stop_strings", ())),
        merged.get("max_new_tokens", merged.get("max_length", MAX_NEW_TOKENS)),
        merged.get("max_length") if "max_new_tokens" not in merged else None,
        "max_new_tokens" in said,
    )


def _refuse_unfollowed(
    merged: Mapping[str, Any], neutral: Mapping[str, Sequence[object]], said: Mapping[str, Any]
) -> None:
    for name, value in merged.items():
        if name in neutral and value not in neutral[name]:
            origin = "was given" if name in said else "stands in the model's generation_config"
            off = next(iter(neutral[name]), None)
            remedy = f"Give {name}={off!r} to do without" if off is not None else "Remove it there"
            raise UserError(
                f"{name}={value!r} {origin}; it changes which tokens come out, and is not done here. {remedy}."
            )


def _sampler(merged: Mapping[str, Any]) -> Sampler:
    top_k = merged.get("top_k", 50)  # transformers' own default
    return Sampled(
        float(merged.get("temperature", 1.0)),
        top_k=top_k or None,
        top_p=float(merged.get("top_p", 1.0)),
        seed=int(merged.get("seed", 0)),
    )


def _end_tokens(given: Any, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:  # noqa: ANN401 - as in JSON
    if given is None:
        given = [] if tokenizer is None or tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ids = [given] if isinstance(given, int) else list(given)
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise UserError(f"eos_token_id is {given!r}; wanted: a token id, or a list of them. Correct it.")
    return tuple(ids)


def _strings(given: str | Sequence[str]) -> tuple[str, ...]:
    strings = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(string, str) and string for string in strings):
        raise UserError(f"stop_strings is {given!r}; wanted: one or more strings that are not empty. Correct it.")
    return strings


def encode(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | Chat,
    *,
    chat: bool | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A prompt to ``tokens_1T``.

    Args:
        tokenizer: The model's.
        prompt: Text, or the turns of a conversation.
        chat: Whether text is wrapped as a user's turn in the chat template; None where the tokenizer has one.
        device: Where the tokens go.

    Raises:
        UserError: If there is no tokenizer, a chat template is wanted and missing or fails, or the prompt is empty.
    """
    if tokenizer is None:
        raise UserError(
            "This engine has no tokenizer, so it reads no text. Give token ids to engine.decoder(...).decode."
        )
    if not prompt:
        raise UserError("The prompt is empty. Give at least one character.")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    if isinstance(prompt, str) and not (bool(tokenizer.chat_template) if chat is None else chat):
        ids = tokenizer(prompt)["input_ids"]
    else:
        if not tokenizer.chat_template:
            raise UserError(
                "chat is on, but this model's tokenizer has no chat template. Set chat to false, and give the "
                "prompt as text."
            )
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"The tokenizer makes no tokens of the prompt {prompt!r:.80}. Give another prompt.")
    return torch.tensor([ids], device=device)


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
