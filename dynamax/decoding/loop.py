"""The loop that decoders of one token a step share: feed, stop, force. It knows no blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynamax.errors import UserError
from dynamax.types import Spec, Step


def drive(
    step: Callable[[Tensor, int, Tensor], Step],
    prompt_BT: Tensor,
    *,
    limit: int,
    stop: Sequence[int],
    forced_BT: Tensor | None,
) -> Iterator[Step]:
    """Yield steps until the limit, or until every row has met a stop token.

    Args:
        step: ``(tokens_BT to read, index, ended_B) -> Step``.
        prompt_BT: What the first step reads.
        limit: Most steps.
        stop: Token ids that end a row; an ended row repeats the first of them.
        forced_BT: Tokens to go on with in place of the step's own; what follows the last step is not needed.

    Raises:
        UserError: If there are too few forced tokens for the limit.
    """
    if forced_BT is not None and forced_BT.shape[1] < limit - 1:
        raise UserError(
            f"{forced_BT.shape[1]} forced tokens were given for {limit} steps; wanted: at least {limit - 1}, one to go "
            f"on with after each step but the last. Lower the limit, or force more tokens."
        )
    feed_BT = prompt_BT
    stop_S = torch.tensor(stop, device=prompt_BT.device, dtype=torch.long)
    ended_B = torch.zeros(prompt_BT.shape[0], dtype=torch.bool, device=prompt_BT.device)
    for index in range(limit):
        taken = step(feed_BT, index, ended_B)
        if forced_BT is None and len(stop_S):
            token_B = torch.where(ended_B, stop_S[0], taken.token_B)
            taken = replace(taken, token_B=token_B)
            ended_B = ended_B | torch.isin(token_B, stop_S)
        yield taken
        if index + 1 == limit or ended_B.all():
            return
        feed_BT = (taken.token_B if forced_BT is None else forced_BT[:, index])[:, None]


def checked_prompt(prompt_BT: Tensor, *, limit: int, spec: Spec) -> None:
    """Raise if the prompt is not one that the backbone can read, or does not fit its context with the answer.

    Waits for the device once, to look at the tokens.

    Raises:
        UserError: If the prompt is no integer tensor of two dimensions, or empty, or has a token outside the
            vocabulary; if the limit is below 1, or both together are too long.
    """
    if prompt_BT.dim() != 2 or prompt_BT.dtype not in (torch.int64, torch.int32):
        raise UserError(
            f"The prompt is a {prompt_BT.dtype} tensor of shape {list(prompt_BT.shape)}; wanted: token ids, int64, of "
            f"shape [rows, tokens]. Give what the tokenizer returns, one prompt as prompt[None], ids as prompt.long()."
        )
    rows, length = prompt_BT.shape
    if not rows:
        raise UserError("The prompt has no rows; wanted: shape [rows, tokens] with at least one row. Give a prompt.")
    if length < 1 or limit < 1:
        raise UserError(
            f"The prompt has {length} tokens and the limit is {limit}; both must be at least 1. "
            f"Give a prompt that is not empty and ask for at least one token."
        )
    least, most = torch.stack(prompt_BT.aminmax()).tolist()
    if least < 0 or most >= spec.vocab:
        raise UserError(
            f"The prompt has the token {least if least < 0 else most}, but the backbone's vocabulary is 0 to "
            f"{spec.vocab - 1}. Encode the prompt with the backbone's own tokenizer."
        )
    if length + limit > spec.context:
        raise UserError(
            f"The prompt has {length} tokens and {limit} more were asked for, but the backbone's context holds "
            f"{spec.context}. Shorten the prompt to {max(spec.context - limit, 0)} tokens or lower the limit."
        )
