"""Which drafted tokens stand beside the full model's distributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamax.decoding.sampling import Sampler


def verify(
    p_BTV: Tensor, q_TBV: Sequence[Tensor | None], draft_BT: Tensor, ended_B: Tensor, sampler: Sampler
) -> tuple[int, Tensor]:
    """Speculative sampling's acceptance (arXiv 2211.17192, algorithm 1), rows in lockstep.

    Args:
        p_BTV: The full model's distributions, one more than there are drafts.
        q_TBV: The distributions the drafts were drawn from; None for a draft that was not drawn by chance.
        draft_BT: Drafted tokens.
        ended_B: Rows whose text has ended; they accept everything.
        sampler: Draws and tosses.

    Returns:
        How many drafts all rows keep, and the token that follows them in each row.
    """
    drafts = draft_BT.shape[1]
    for index in range(drafts):
        p_BV, q_BV, draft_B1 = p_BTV[:, index], q_TBV[index], draft_BT[:, index, None]
        p_B = p_BV.gather(1, draft_B1)[:, 0]
        q_B = torch.ones_like(p_B) if q_BV is None else q_BV.gather(1, draft_B1)[:, 0]
        accepted_B = (sampler.uniform(p_B) * q_B < p_B) | ended_B
        if not bool(accepted_B.all()):
            rest_BV = p_BV.scatter(1, draft_B1, 0.0) if q_BV is None else (p_BV - q_BV).clamp_min(0)
            return index, torch.where(accepted_B, draft_B1[:, 0], sampler.draw(rest_BV))
    return drafts, sampler.draw(p_BTV[:, drafts])
