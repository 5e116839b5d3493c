"""What was read and said before a position: along known texts, and what it suggests as the next token.

Knows tokens and evidence; no head, no policy, no run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from dynamax.types import Evidence, Past


class KnownText(NamedTuple):
    """What is known beside the hidden states of texts that are read as a whole.

    Attributes:
        tokens_BT: Token ids.
        step_BT: Tokens generated before each position, as decoding would count them.
        top_BT: The full model's next token at each position.
    """

    tokens_BT: Tensor
    step_BT: Tensor
    top_BT: Tensor


def known_past(text: KnownText, counted_BT: Tensor, exits: Callable[[], Iterable[Evidence]]) -> Past:
    """What was read and said before each of the counted positions of known texts.

    Args:
        text: The texts.
        counted_BT: The positions.
        exits: Gives evidence of all exits at these positions.
    """
    top_N = text.top_BT[counted_BT]

    def texts() -> list[list[int]]:
        rows = text.tokens_BT.tolist()
        return [rows[row][: place + 1] for row, place in counted_BT.nonzero().tolist()]

    def before(said_N: Tensor, count: int, first: int) -> list[list[int]]:
        """Of each position, what was said at the last ones before it, from a step on; the newest first."""
        said = dict(zip(map(tuple, counted_BT.nonzero().tolist()), said_N.tolist(), strict=True))
        step = text.step_BT.tolist()
        return [
            [
                said[row, t]
                for t in range(place - 1, place - 1 - count, -1)
                if (row, t) in said and step[row][t] >= first
            ]
            for row, place in said
        ]

    right_N = cache(lambda: first_right(exits(), top_N))
    return Past(
        texts,
        lambda steps, _: before(top_N, steps, 0),
        top=lambda: top_N,
        exits=lambda count: before(right_N(), count, 1),
    )


@torch.no_grad()
def first_right(exits: Iterable[Evidence], top_N: Tensor) -> Tensor:
    """Depth of the first exit that says the full model's token, ``depth_N``; all blocks where none does."""
    right_EN = [torch.where(each.token == top_N, each.depth, each.total) for each in exits]
    return torch.stack(right_EN).amin(0)


# -- what the text suggests: for ``Past.derive``, once a step for all exits ---------------------------------

Candidates = tuple[Tensor, Tensor | None]
"""Tokens ``tokens_C``, each once, and which of them count for which row, ``own_BC``; None where all count for all."""


def suggested(past: Past, limit: int, recent: int, likely: int, frequent: int = 0) -> list[list[int]]:
    """For each row, at most ``limit`` tokens: those that followed its newest before, likely ones, those of its text.

    Tokens below ``frequent`` are left out.
    """
    guesses = past.likely(recent, likely) if recent else [[] for _ in past.texts]
    rows = zip(past.texts, guesses, strict=True)
    return [unique((followers(text), guessed, reversed(text)), limit, frequent) for text, guessed in rows]


def gathered(past: Past, limit: int, recent: int, likely: int, device: torch.device, frequent: int = 0) -> Candidates:
    """``suggested``, for all rows together."""
    return together(suggested(past, limit, recent, likely, frequent), device)


def followers(text: list[int]) -> list[int]:
    """The tokens that stood behind earlier occurrences of the newest one, newest first."""
    return [text[place + 1] for place in range(len(text) - 2, -1, -1) if text[place] == text[-1]]


def unique(parts: Iterable[Iterable[int]], limit: int, frequent: int) -> list[int]:
    """The first ``limit`` different tokens that are not below ``frequent``."""
    tokens = dict.fromkeys(chain.from_iterable(parts))
    return [token for token in tokens if token >= frequent][:limit]


def together(rows: list[list[int]], device: torch.device) -> Candidates:
    """All rows' tokens ``tokens_C``, and which are whose, ``own_BC``; None where one row has them all."""
    tokens = rows[0] if len(rows) == 1 else list(dict.fromkeys(chain(*rows)))
    tokens_C = torch.tensor(tokens, dtype=torch.long, device=device)
    if all(len(row) == len(tokens) for row in rows):
        return tokens_C, None
    places = {token: place for place, token in enumerate(tokens)}
    own_BC = torch.zeros(len(rows), len(tokens), dtype=torch.bool)
    for own_C, row in zip(own_BC, rows, strict=True):
        own_C[[places[token] for token in row]] = True
    return tokens_C, own_BC.to(device)


def continuations(past: Past, orders: int, device: torch.device) -> Tensor:
    """The token that followed the newest earlier occurrence of the last 1 to ``orders`` tokens, ``token_BO``.

    -1 where the text has no such occurrence.
    """
    return torch.tensor([continued(text, orders) for text in past.texts], device=device).view(-1, orders)


def continued(text: list[int], orders: int) -> list[int]:
    """``continuations`` of one text.

    >>> continued([1, 2, 3, 9, 2, 4, 1, 2], 3)
    [4, 3, -1]
    """
    found = [-1] * orders
    for place in range(len(text) - 2, -1, -1):
        alike = 0
        while alike < min(orders, place + 1) and text[place - alike] == text[-1 - alike]:
            alike += 1
        for order in range(alike):
            if found[order] < 0:
                found[order] = text[place + 1]
        if alike == orders:  # the shorter ones have been met by now
            break
    return found
