"""Lens distillation: each lens learns the full model's prediction, or the text. Knows no gate and no policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dynamax.data.batch import HiddenBatch
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.objectives.base import Kind, Objective, counted, lens_states
from dynamax.types import Site

Hard = Literal["full-model", "text"]


class LensDistillation(Objective):
    """Cross-entropy of every lens with the full model's tokens and probabilities, or with the text itself.

    The softmax runs over the tokens that the full model (or the text) has in the batch, and over ``candidates`` drawn
    from the rest of the vocabulary. Their logits are raised by ``log(rest / drawn)``, so that they represent all of the
    rest and the denominator is right on average. Tokens left out of every softmax would never become less likely.

    Sources: the tuned lens (Belrose et al. 2023, arXiv 2303.08112), which distils to the whole distribution; sampled
    softmax (Jean et al. 2015, arXiv 1412.2007).

    Args:
        hard: What the hard part of the target is: the ``full-model``'s most likely token, which agreement is measured
            against, or the next token of the ``text``.
        soft: Share, in [0, 1], of the soft part: the full model's ``top`` most likely tokens, at their probabilities.
        top: Tokens of the soft part, at most what the store keeps.
        candidates: Tokens drawn from the rest of the vocabulary; None for all of it, which is exact and slow.

    Raises:
        UserError: If an option is out of range.
    """

    trains: ClassVar[frozenset[Kind]] = frozenset(["lenses"])

    def __init__(
        self, *, hard: Hard = "full-model", soft: float = 0.5, top: int = 4, candidates: int | None = 1024
    ) -> None:
        if not 0.0 <= soft <= 1.0 or top < 1 or (candidates is not None and candidates < 1):
            raise UserError(
                f"LensDistillation was given soft {soft}, top {top} and candidates {candidates}; soft must lie in "
                f"[0, 1], top and candidates must be at least 1. For the whole vocabulary, set candidates to null."
            )
        self.hard: Hard = hard
        self.soft = soft
        self.top = top
        self.candidates = candidates
        self.tokens = top if soft else 1

    def loss(self, bank: ExitBank, batch: HiddenBatch, sites: Mapping[int, Site]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over the lenses that have something to learn; ``cross_entropy/DEPTH`` is reported."""
        means = {depth: loss_N.sum() / max(1, len(loss_N)) for depth, loss_N in self.each(bank, batch, sites).items()}
        total = sum(means.values(), torch.zeros((), device=batch.live_BT.device))
        return total, {f"cross_entropy/{depth}": loss.detach() for depth, loss in means.items()}

    def each(self, bank: ExitBank, batch: HiddenBatch, sites: Mapping[int, Site]) -> dict[int, Tensor]:
        """The loss at each counted position, ``loss_N``, of each lens that has something to learn, by depth."""
        live_BT = counted(batch)
        target_NT, share_NT = self._targets(batch, live_BT)
        choice = choose(target_NT, sites[bank.depths[0]].spec.vocab, self.candidates)
        losses: dict[int, Tensor] = {}
        for depth in bank.depths:
            lens, site = bank.lens(depth), sites[depth]
            if not list(lens.parameters()):
                continue
            logits_NC = lens.project(lens_states(bank, batch, site), site, choice.tokens_C) + choice.raise_C
            logp_NT = logits_NC.gather(1, choice.place_NT) - logits_NC.logsumexp(-1, keepdim=True)
            losses[depth] = -(share_NT * logp_NT).sum(-1)
        return losses

    def _targets(self, batch: HiddenBatch, live_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Target tokens of each position and their shares, which add up to 1: the hard one, then the soft ones."""
        likely_NK, probs_NK = batch.top_tokens_BTK[live_BT], batch.top_probs_BTK[live_BT]
        next_BT = batch.top_tokens_BTK[..., 0] if self.hard == "full-model" else batch.tokens_BT.roll(-1, 1)
        hard_N1 = next_BT[live_BT][:, None]
        if self.soft == 0.0:
            return hard_N1, torch.ones_like(hard_N1, dtype=torch.float32)
        if self.top > likely_NK.shape[1]:
            raise UserError(
                f"LensDistillation was given top {self.top}, but the store keeps {likely_NK.shape[1]} tokens a "
                f"position. Lower top, or fill a store with more."
            )
        soft_NT = probs_NK[:, : self.top] / probs_NK[:, : self.top].sum(-1, keepdim=True)
        share_NT = torch.cat([torch.full_like(soft_NT[:, :1], 1 - self.soft), self.soft * soft_NT], 1)
        return torch.cat([hard_N1, likely_NK[:, : self.top]], 1), share_NT


class Choice(NamedTuple):
    """The tokens a softmax runs over.

    Attributes:
        tokens_C: The tokens; None for the whole vocabulary.
        raise_C: What is added to their logits, so that the drawn ones represent all of the rest.
        place_NT: Where the targets are among them.
    """

    tokens_C: Tensor | None
    raise_C: Tensor
    place_NT: Tensor


def choose(target_NT: Tensor, vocab: int, count: int | None) -> Choice:
    """The targets' tokens, and ``count`` of the rest of the vocabulary; all of it if None or if so few are left.

    The draw depends on the targets alone, so that a resumed run draws the same.
    """
    likely_C, place_NT = target_NT.unique(return_inverse=True)
    left = vocab - len(likely_C)
    if count is None or count >= left:
        return Choice(None, torch.zeros((), device=target_NT.device), target_NT)
    rest = torch.ones(vocab, dtype=torch.bool, device=target_NT.device)
    rest[likely_C] = False
    generator = torch.Generator().manual_seed(int(target_NT.sum()))
    drawn = torch.randperm(left, generator=generator)[:count].to(target_NT.device)
    tokens_C = torch.cat([likely_C, rest.nonzero()[:, 0][drawn]])
    raise_C = torch.zeros(len(tokens_C), device=target_NT.device)
    raise_C[len(likely_C) :] = math.log(left / count)
    return Choice(tokens_C, raise_C, place_NT)
