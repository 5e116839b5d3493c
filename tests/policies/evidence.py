"""Evidence by hand, with a count of what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynamax.types import Evidence


def evidence(
    logits_BV: Tensor,
    *,
    depth: int = 4,
    step: int | Tensor = 0,
    hidden: Tensor | None = None,
    gates: Mapping[str, Tensor] | None = None,
    trail: Sequence[Evidence] = (),
) -> Evidence:
    """One exit's evidence, of a backbone of 12 blocks."""
    hidden = torch.zeros(logits_BV.shape[0], 3) if hidden is None else hidden
    known = {name: (lambda _, p_B=p_B: p_B.double().logit()) for name, p_B in (gates or {}).items()}
    return Evidence(depth, 12, step, hidden, logits=lambda: logits_BV, gates=known, trail=trail)


def climb(tokens_BE: Sequence[Sequence[int]], *, vocab: int = 5) -> list[Evidence]:
    """Evidence of several exits, whose lenses say these tokens."""
    seen: list[Evidence] = []
    for index, token_B in enumerate(torch.tensor(tokens_BE).T):
        logits_BV = torch.nn.functional.one_hot(token_B, vocab).float()
        seen.append(evidence(logits_BV, depth=2 * (index + 1), trail=list(seen)))
    return seen
