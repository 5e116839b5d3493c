"""What the text so far suggests as its next token, without a model. Knows tokens and nothing else.

For ``Past.derive``: each is worked out once a step, for all exits.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from dynamax.types import Past

Candidates = tuple[Tensor, Tensor | None]
"""Tokens ``tokens_C``, each once, and which of them count for which row, ``own_BC``; None where all count for all."""


def suggested(past: Past, limit: int, recent: int, likely: int) -> list[list[int]]:
    """For each row, at most ``limit`` tokens: those that followed its newest before, likely ones, those of its text."""
    guesses = past.likely(recent, likely) if recent else [[] for _ in past.texts]
    rows = zip(past.texts, guesses, strict=True)
    return [unique((followers(text), guessed, reversed(text)), limit) for text, guessed in rows]


def gathered(past: Past, limit: int, recent: int, likely: int, device: torch.device) -> Candidates:
    """``suggested``, for all rows together."""
    return together(suggested(past, limit, recent, likely), device)


def followers(text: list[int]) -> list[int]:
    """The tokens that stood behind earlier occurrences of the newest one, newest first."""
    return [text[place + 1] for place in range(len(text) - 2, -1, -1) if text[place] == text[-1]]


def unique(parts: Iterable[Iterable[int]], limit: int) -> list[int]:
    """The first ``limit`` different tokens."""
    return list(dict.fromkeys(chain.from_iterable(parts)))[:limit]


def together(rows: list[list[int]], device: torch.device) -> Candidates:
    """All rows' tokens ``tokens_C``, and which are whose, ``own_BC``; None where one row has them all."""
    tokens = rows[0] if len(rows) == 1 else list(dict.fromkeys(chain(*rows)))
    tokens_C = torch.tensor(tokens, device=device)
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
