"""Between text and tokens: prompts in, answers out, stop strings honoured while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynamax.decoding.base import Decoder, Probe
from dynamax.errors import UserError
from dynamax.tasks.base import cut
from dynamax.types import Step


class Answer(NamedTuple):
    """What a decoder said: the text up to the first stop, and every step taken."""

    text: str
    steps: list[Step]

    @property
    def tokens_1T(self) -> Tensor:
        """The decoded tokens, shape [1, T]."""
        return torch.stack([step.token_B for step in self.steps], 1)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, device: torch.device) -> Tensor:
    """A prompt to ``tokens_1T``.

    Args:
        tokenizer: The backbone's.
        prompt: Text.
        chat: Wrap the prompt as a user's turn in the tokenizer's chat template.
        device: Where the tokens go.

    Raises:
        UserError: If a chat template is wanted and the tokenizer has none, or the prompt is empty.
    """
    if chat and not tokenizer.chat_template:
        raise UserError("chat is on, but this backbone's tokenizer has no chat template. Set chat to false.")
    if not prompt:
        raise UserError("The prompt is empty. Give at least one character.")
    if chat:
        prompt = tokenizer.apply_chat_template(  # type: ignore[assignment]
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    return torch.tensor([ids], device=device)


def answer(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompt_1T: Tensor,
    *,
    limit: int,
    stop: Sequence[str] = (),
    probe: Probe | None = None,
) -> Answer:
    """Decode one answer; stops at the end of text, a stop string or the limit."""
    end = cast(int | None, tokenizer.eos_token_id)
    stop_ids = () if end is None else (end,)
    steps: list[Step] = []
    tokens: list[int] = []
    text = ""
    for step in decoder.decode(prompt_1T, limit=limit, stop=stop_ids, probe=probe):
        steps.append(step)
        token = int(step.token_B[0])
        if token in stop_ids:
            break
        tokens.append(token)
        text = cast(str, tokenizer.decode(tokens))
        if any(mark in text for mark in stop):
            break
    return Answer(cut(text, stop), steps)


def unforced(decoder: Decoder, prompt_1T: Tensor, target_1T: Tensor, probe: Probe) -> list[Step]:
    """Decode as many tokens as the target has, whatever they are."""
    return list(decoder.decode(prompt_1T, limit=target_1T.shape[1], probe=probe))


def forced(decoder: Decoder, prompt_1T: Tensor, target_1T: Tensor, probe: Probe) -> list[Step]:
    """Decode along known tokens: what would have been said at each position, at the true cost."""
    limit = target_1T.shape[1]
    return list(decoder.decode(prompt_1T, limit=limit, forced_BT=target_1T, probe=probe))
