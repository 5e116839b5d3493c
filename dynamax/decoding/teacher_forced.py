"""What every exit says of every position of a known text, from one pass over it.

With exact state an early exit changes nothing for later positions (law 4), so what a policy would
do along a known text can be read off one full pass: positions stand in for rows. A lens that runs the
last block is the exception: here it sees the exit's states of earlier positions, as it was trained.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Evidence, Site, Span


class PolicyPath(NamedTuple):
    """What a policy does along the text: the depth of each position, and the logits it speaks from there."""

    depth_T: Tensor
    logits_TV: Tensor


class TeacherForcedPass:
    """Evidence of all exits over the positions from ``start`` on; their logits predict the next token.

    Args:
        backbone: The model.
        bank: Its exits.
        tokens_1T: A known text.
        start: First position surveyed; it is decided at the top, as the prompt's last position is.

    Raises:
        UserError: If the text is longer than the backbone's context.
    """

    @torch.inference_mode()
    def __init__(self, backbone: Backbone, bank: ExitBank, tokens_1T: Tensor, *, start: int) -> None:
        if tokens_1T.shape[1] > backbone.spec.context:
            raise UserError(
                f"A text of {tokens_1T.shape[1]} tokens is to be read in one pass, but the backbone's context holds "
                f"{backbone.spec.context}. Lower the task's window, or shorten its prompts."
            )
        self.total = backbone.spec.depth
        self.exits: list[Evidence] = []
        h_BTD, at = backbone.embed(tokens_1T), 0
        step_T = torch.arange(tokens_1T.shape[1] - start, device=tokens_1T.device)
        for depth in bank.depths:
            h_BTD, at = backbone.run(h_BTD, Span(at, depth)), depth
            self.exits.append(_evidence(bank, backbone.site(depth), h_BTD, start, step_T, self.exits))
        h_BTD = backbone.run(h_BTD, Span(at, self.total))
        self.logits_TV = backbone.unembed(h_BTD[:, start:])[0]

    @torch.inference_mode()
    def play(self, policy: TerminationPolicy) -> PolicyPath:
        """Follow a policy along the text."""
        logits_TV = self.logits_TV.clone()
        depth_T = torch.full(logits_TV.shape[:1], self.total, device=logits_TV.device)
        stays_T = torch.ones_like(depth_T, dtype=torch.bool)
        stays_T[:1] = False
        for evidence in self.exits:
            leaves_T = policy(evidence) & stays_T
            if leaves_T.any():
                logits_TV[leaves_T] = evidence.logits_BV[leaves_T]
                depth_T[leaves_T] = evidence.depth
                stays_T &= ~leaves_T
        return PolicyPath(depth_T, logits_TV)


def _evidence(bank: ExitBank, site: Site, h_BTD: Tensor, start: int, step_T: Tensor, trail: list[Evidence]) -> Evidence:
    rows_1TD = h_BTD[:, start:]
    return Evidence(
        site.depth,
        site.spec.depth,
        step_T,
        bank.stream(rows_1TD)[0],
        logits=lambda: _logits(bank, site, h_BTD, start),
        gates={
            name: (lambda gate=gate: gate.confidence(bank.stream(h_BTD))[0, start:])
            for name, gate in bank.gates(site.depth).items()
        },
        trail=trail,
    )


def _logits(bank: ExitBank, site: Site, h_BTD: Tensor, start: int) -> Tensor:
    return site.project(bank.lens(site.depth).translate(h_BTD, site)[:, start:])[0]
