"""What heads are trained towards, and what lenses predict at stored states.

Knows heads, their sites and stored states; not optimisers, epochs or policies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from dynamax.data.batch import HiddenBatch
from dynamax.data.states import fast_topk
from dynamax.heads.bank import ExitBank
from dynamax.types import Site

Kind = Literal["lenses", "gates"]
"""What an exit is made of: a lens says which token, gates say whether to leave."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Through = Literal["lens", "logit-lens"]
Question = Callable[[Site, Tensor, Tensor], Tensor]
"""Asks something of N positions: site, normalised ``u_ND`` and the full model's tokens ``oracle_N`` to N answers."""

LOGITS = 1 << 24
"""Logits held at a time: 64 MiB of float32."""
MARGIN = 1e-3
"""A rival token beats another only by more than this, which is more than rounding can change."""


class Objective(ABC):
    """A loss over the heads of all exits at once. Heads share nothing, so neither do their gradients.

    Attributes:
        trains: The kinds of heads that its loss has a gradient for.
        tokens: How many of the full model's most likely tokens the store must keep of a position.
    """

    trains: ClassVar[frozenset[Kind]]
    tokens: int = 1

    @abstractmethod
    def loss(self, bank: ExitBank, batch: HiddenBatch, sites: Mapping[int, Site]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, summed over the exits, and what is worth logging beside it.

        Args:
            bank: The heads.
            batch: Hidden states at the exits and the full model's most likely tokens.
            sites: The place of each exit, by depth.

        Returns:
            The loss, a scalar with a gradient, and detached scalars by name, such as ``positive/15``.
        """

    def forget(self, changed: Collection[Kind] | None) -> None:  # noqa: B027 - most objectives remember nothing
        """Forget what was remembered of heads that have changed.

        Args:
            changed: Kinds of heads; None where everything may have, documents too.
        """


def counted(batch: HiddenBatch) -> Tensor:
    """The N positions, of B x T, at which heads are trained and measured: where decoding would ask them."""
    return batch.live_BT & batch.answer_BT


def lens_states(bank: ExitBank, batch: HiddenBatch, site: Site) -> Tensor:
    """What an exit's lens makes of the counted positions: ``u_ND``, which the output matrix reads."""
    return bank.lens(site.depth).translate(batch.hidden[site.depth], site)[counted(batch)]


class ExitReader:
    """Reads exits out, and remembers documents for as long as nothing that is read changes.

    The product with the output matrix costs more than all else in training: 57 MFLOP a position on SmolLM2. A lens is
    frozen while gates train, so each document is read once.

    Args:
        through: ``lens``: the exit's own lens, whose token decoding emits; ``logit-lens``: final norm and output
            matrix alone.
        question: What is asked of a position.
    """

    def __init__(self, through: Through, question: Question) -> None:
        self.through: Through = through
        self.question = question
        self._known: dict[tuple[int, int], Tensor] = {}

    def forget(self, changed: Collection[Kind] | None) -> None:
        """Forget what may not be true any more.

        Args:
            changed: Kinds of heads that have changed; None where documents may have too.
        """
        if changed is None or (self.through == "lens" and "lenses" in changed):
            self._known.clear()

    def __call__(self, bank: ExitBank, batch: HiddenBatch, site: Site) -> Tensor:
        """The answers of one exit at the counted positions of a batch, row after row."""
        keys = [(site.depth, int(document)) for document in batch.documents_B]
        moving = self.through == "lens" and any(p.requires_grad for p in bank.lens(site.depth).parameters())
        if not moving and all(key in self._known for key in keys):
            known_N = torch.cat([self._known[key] for key in keys]).to(batch.live_BT.device)
            assert len(known_N) == counted(batch).sum(), "a document is counted at the same positions each time"
            return known_N
        with torch.no_grad(), torch.autocast(batch.live_BT.device.type, enabled=False):  # half-precision logits tie
            live_BT = counted(batch)
            if self.through == "lens":
                u_ND = lens_states(bank, batch, site)
                lens, place = bank.lens(site.depth), site
                site = replace(place, project=lambda u_ND, tokens_C=None: lens.project(u_ND, place, tokens_C))
            else:
                u_ND = site.normalize(batch.hidden[site.depth])[live_BT]
            answer_N = self.question(site, u_ND, batch.top_tokens_BTK[live_BT][:, 0])
        if not moving:
            lengths = live_BT.sum(1).tolist()
            self._known |= zip(keys, answer_N.cpu().split(lengths), strict=True)
        return answer_N


def best_token(site: Site, u_ND: Tensor, oracle_N: Tensor) -> Tensor:
    """The exit's most likely token."""
    rows = max(1, LOGITS // site.spec.vocab)
    return torch.cat([fast_topk(site.project(part_ND), 1)[1][:, 0] for part_ND in u_ND.split(rows)])


def in_top_k(k: int) -> Question:
    """Whether the full model's token is among the exit's ``k`` most likely ones: fewer than ``k`` tokens beat it.

    The tokens that beat it are mostly among those that the full model predicts elsewhere in the batch. These are
    compared first, and the whole vocabulary only where that does not decide.
    """

    def question(site: Site, u_ND: Tensor, oracle_N: Tensor) -> Tensor:
        rivals_C, place_N = oracle_N.unique(return_inverse=True)
        logits_NC = site.project(u_ND, rivals_C)
        beaten_N = (logits_NC > logits_NC.gather(1, place_N[:, None]) + MARGIN).sum(-1) >= k
        open_M = (~beaten_N).nonzero()[:, 0]
        within_N = torch.zeros_like(beaten_N)
        rows = max(1, LOGITS // site.spec.vocab)
        for part_M in open_M.split(rows):
            within_N[part_M] = among(site.project(u_ND[part_M]), oracle_N[part_M], k)
        return within_N

    return question


def among(logits_NV: Tensor, oracle_N: Tensor, k: int) -> Tensor:
    """Whether fewer than ``k`` tokens have greater logits than the oracle's."""
    least_N = fast_topk(logits_NV, min(k, logits_NV.shape[1]))[0][:, -1]
    return logits_NV.gather(1, oracle_N[:, None])[:, 0] >= least_N
