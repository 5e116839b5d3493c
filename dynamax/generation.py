"""Prompts to tokens, and what the model's makers and the caller ask of generation.

The only place that knows chat templates and ``generation_config``. Names are those of transformers'
``generate``, and defaults but for the length; ``seed`` and ``chat`` are our own. Stop strings are cut from the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, tzinfo
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from dynamax.decoding.sampling import Greedy, Sampled, Sampler
from dynamax.errors import UserError
from dynamax.registry import near

Chat = Sequence[Mapping[str, str]]
"""Turns of a conversation: ``[{"role": "user", "content": "..."}]``."""

DAY = date(2024, 7, 26)
"""The date of prompts whose answers are kept or scored: they are the same whenever it is done."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which no tokenizer takes."""

MAX_NEW_TOKENS = 64
"""Where nobody says otherwise."""
SAMPLING = ("temperature", "top_k", "top_p", "seed")
WHOLE = ("a whole number", lambda value: type(value) is int)
NUMBER = ("a number", lambda value: type(value) in (int, float))
OBEYED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "top_k", "seed"), WHOLE),
    **dict.fromkeys(("temperature", "top_p"), NUMBER),
    "do_sample": ("true or false", lambda value: type(value) is bool),
    "eos_token_id": (
        "a token id, or a list of them",
        lambda value: all(type(token) is int and 0 <= token < 2**63 for token in _listed(value)),
    ),
    "stop_strings": (
        "one or more strings that are not empty",
        lambda value: all(isinstance(string, str) and string for string in _listed(value)),
    ),
}
"""Entries that are followed: what they may be, in words and as a test."""
NEUTRAL: dict[str, Sequence[object]] = {
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale"), (1,)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha"), (0,)),
    **dict.fromkeys(("remove_invalid_values", "token_healing"), (False,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), ([],)),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "constraints", "sequence_bias", "watermarking_config"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("dola_layers", "max_time"), ()),
    "renormalize_logits": (False, True),  # a softmax of what is normalised already
    "cache_implementation": (  # all but a quantised one
        *("dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked"),
        *("offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked"),
    ),
}
"""Entries that change which tokens come out and are not followed here, with the values at which they change nothing."""
NEUTRAL_IN_SAMPLING: dict[str, Sequence[object]] = {
    "typical_p": (1,),
    "min_p": (0,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
"""The same, of entries that only sampling heeds."""
NO_EFFECT: dict[str, Sequence[str]] = {
    "What generate returns beside tokens.": (
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    ),
    "How transformers keeps state, compiles and splits the work.": (
        *("use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "low_memory"),
        *("continuous_batching_config", "prefill_chunk_size"),
    ),
    "Of beam search, which num_beams asks for.": ("early_stopping", "length_penalty"),
    "Of drafts that the model verifies: the tokens are the same without.": (
        *("use_mtp", "speculation_type", "prompt_lookup_num_tokens", "max_matching_ngram_size", "is_assistant"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    ),
    "Of a batch with padding, or without any prompt.": ("pad_token_id", "bos_token_id", "decoder_start_token_id"),
    "Where the entries come from.": ("_from_model_config", "transformers_version"),
}
"""Entries of the model's own that change no token of one answer to one prompt, by the reason."""


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
            or ``top_p`` means sampling.

    Raises:
        UserError: If an entry is unknown, or asks for something that is not done here, such as a repetition penalty;
            if options of sampling are given beside ``do_sample`` false or a sampler.
    """
    said = {name: value for name, value in given.items() if value is not None}
    for name in said:
        if name not in OBEYED and name not in NEUTRAL and name not in NEUTRAL_IN_SAMPLING:
            raise UserError(
                f"There is no generation option {name}.{near(name, OBEYED)} Options: {', '.join(sorted(OBEYED))}; what "
                f"else the model's generation_config asks for can be switched off by its name."
            )
    own = {} if config is None else {name: value for name, value in config.to_dict().items() if value is not None}
    merged = {**own, **said}
    for name, other in (("max_new_tokens", "max_length"), ("max_length", "max_new_tokens")):
        if name in said:
            merged.pop(other, None)
    if "max_new_tokens" in said and "max_length" in said:
        raise UserError("max_new_tokens and max_length were both given; they limit the same. Leave one of them out.")
    implied = any(name in said for name in SAMPLING if name != "seed")
    do_sample = merged.get("do_sample", False) if "do_sample" in said or not implied else True
    asked = [name for name in SAMPLING if name in said]
    if sampler is not None and (asked or "do_sample" in said):
        raise UserError(f"A sampler was given beside {', '.join(asked) or 'do_sample'}. Leave one of them out.")
    if asked and not do_sample:
        raise UserError(
            f"{' and '.join(asked)} would change nothing, because do_sample is off: the most likely token is taken. "
            f"Set do_sample to true, or leave {'it' if len(asked) == 1 else 'them'} out."
        )
    _check_entries(merged, said, sampling=do_sample if sampler is None else not isinstance(sampler, Greedy))
    if sampler is None:
        sampler = Greedy()
        if do_sample:
            top_k = merged.get("top_k", 50)  # transformers' own default; 0 is none
            temperature, top_p = float(merged.get("temperature", 1)), float(merged.get("top_p", 1))
            sampler = Sampled(temperature, top_k=top_k or None, top_p=top_p, seed=merged.get("seed", 0))
    ends = merged.get("eos_token_id")
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    return GenerationOptions(
        sampler,
        tuple([] if ends is None else _listed(ends)),
        tuple(_listed(merged.get("stop_strings", []))),
        merged.get("max_new_tokens", merged.get("max_length", MAX_NEW_TOKENS)),
        merged.get("max_length") if "max_new_tokens" not in merged else None,
        "max_new_tokens" in said,
    )


def _listed(value: Any) -> list[Any]:  # noqa: ANN401 - as in JSON
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_entries(merged: Mapping[str, Any], said: Mapping[str, Any], *, sampling: bool) -> None:
    """Refuse entries of the wrong type, and those that ask for what is not done here."""
    for name, value in merged.items():
        origin = "was given" if name in said else "stands in the model's generation_config"
        if name in OBEYED:
            wanted, is_right = OBEYED[name]
            if not is_right(value):
                raise UserError(f"{name}={value!r:.80} {origin}; wanted: {wanted}. Correct it.")
        elif any(name in names for names in NO_EFFECT.values()):
            continue
        elif name in said or sampling or name not in NEUTRAL_IN_SAMPLING:
            neutral = {**NEUTRAL, **NEUTRAL_IN_SAMPLING}.get(name)
            if value not in (neutral or ()):
                does = "it is not known here" if neutral is None else "it changes which tokens come out"
                off = f"Give {name}={neutral[0]!r} to do without" if neutral else "Remove it there"
                raise UserError(f"{name}={value!r:.80} {origin}; {does}, and is not done here. {off}.")


def encode(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | Chat,
    *,
    chat: bool | None = None,
    day: date | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A prompt to ``tokens_1T``: what its answer is put behind, so without an end token that a tokenizer may add.

    Args:
        tokenizer: The model's.
        prompt: Text, or the turns of a conversation.
        chat: Whether text is wrapped as a user's turn in the chat template; None where the tokenizer has one.
        day: What a chat template that asks for the date is told; None for today.
        device: Where the tokens go.

    Raises:
        UserError: If there is no tokenizer, a chat template is wanted and missing or fails, or the prompt is empty.
    """
    if tokenizer is None:
        raise UserError(
            "This engine has no tokenizer, so it reads no text. Give token ids to engine.decoder(...).decode."
        )
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, Sequence) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise UserError(
            f"The prompt is {prompt!r:.80}; wanted: text, or the turns of a conversation, each of the form "
            f'{{"role": "user", "content": "..."}}. A list of such prompts goes to generate.'
        )
    if not prompt:
        raise UserError("The prompt is empty. Give at least one character.")
    if any(SURROGATE.search(turn["content"]) for turn in turns):
        raise UserError(f"The prompt {prompt!r:.80} is not valid Unicode: part of a character is missing. Correct it.")
    if isinstance(prompt, str) and not (bool(tokenizer.chat_template) if chat is None else chat):
        ids = _begun(tokenizer, prompt)
    else:
        if not tokenizer.chat_template:
            raise UserError(
                "A chat is wanted, but this model's tokenizer has no chat template. Set chat to false, and give the "
                "prompt as text."
            )
        try:
            with _today(day):
                text = tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns], add_generation_prompt=True, tokenize=False
                )
        except Exception as error:  # a template is the model's own program, and may raise anything
            raise UserError(
                f"The model's chat template refuses this conversation: {error}. Give the turns that it wants, or plain "
                f"text with chat set to false."
            ) from error
        if SURROGATE.search(str(text)):
            raise UserError("The model's chat template writes part of a character, which is no Unicode. Correct it.")
        ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"The tokenizer makes no tokens of the prompt {prompt!r:.80}. Give another prompt.")
    return torch.tensor([ids], device=device)


def _begun(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that goes on: with what the tokenizer puts before it, without what it puts behind it."""
    whole, plain = (tokenizer(text, add_special_tokens=added)["input_ids"] for added in (True, False))
    for start in range(len(whole) - len(plain), -1, -1):
        if whole[start : start + len(plain)] == plain:
            return whole[: start + len(plain)]
    return whole


@contextmanager
def _today(day: date | None) -> Iterator[None]:
    """Let chat templates take a day for today; None leaves it.

    transformers gives templates a clock and no way to set it: what is passed beside the turns has to be plain data.
    """
    if day is None:
        yield
        return

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Clock:
            return cls(day.year, day.month, day.day, tzinfo=tz)

    library: Any = chat_template_utils
    before, library.datetime = library.datetime, Clock
    try:
        yield
    finally:
        library.datetime = before
