"""The loop that decoders of one token a step share: feed, stop, force. It knows no blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynamax.types import Step


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
        ValueError: If there are too few forced tokens for the limit.
    """
    if forced_BT is not None and forced_BT.shape[1] < limit - 1:
        raise ValueError(
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


def checked_prompt(prompt_BT: Tensor, *, limit: int, context: int) -> None:
    """Raise if prompt and answer together do not fit the backbone's context.

    Raises:
        ValueError: If the prompt is empty, the limit below 1, or both together are too long.
    """
    length = prompt_BT.shape[1]
    if length < 1 or limit < 1:
        raise ValueError(
            f"The prompt has {length} tokens and the limit is {limit}; both must be at least 1. "
            f"Give a prompt that is not empty and ask for at least one token."
        )
    if length + limit > context:
        raise ValueError(
            f"The prompt has {length} tokens and {limit} more were asked for, but the backbone's context holds "
            f"{context}. Shorten the prompt to {max(context - limit, 0)} tokens or lower the limit."
        )
