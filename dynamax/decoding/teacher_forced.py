"""What every exit says of every position of a known text, from one pass over it.

With exact state an early exit changes nothing for later positions (law 4), so what a policy would
do along a known text can be read off one full pass: positions stand in for rows. A lens that runs the
last block is the exception: here it sees the exit's states of earlier positions, as it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.decoding.base import check_tokens
from dynamax.decoding.history import most_likely
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.past import first_right
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Evidence, Past, Site


class PolicyPath(NamedTuple):
    """What a policy does along a text: the depth of each position, and the logits it speaks from there."""

    depth_T: Tensor
    logits_TV: Tensor


@final
class TeacherForcedPass:
    """Evidence of all exits over the positions from ``start`` on; their logits predict the next token.

    Args:
        backbone: The model.
        exits: Its exits; None for the top alone.
        tokens_1T: A known text.
        start: First position that is read; it is decided at the top, as the prompt's last position is.

    Attributes:
        exits: Evidence of each exit, shallowest first; positions stand in for rows.
        logits_TV: Logits of the top.

    Raises:
        UserError: If the text is no token ids of one row, has no position ``start``, or is longer than the context.
    """

    @torch.inference_mode()
    def __init__(self, backbone: Backbone, exits: ExitBank | None, tokens_1T: Tensor, *, start: int = 0) -> None:
        check_tokens(tokens_1T, "The text", backbone.spec)
        rows, length = tokens_1T.shape
        if rows != 1 or not length or not 0 <= start <= length:
            raise UserError(
                f"A text of shape {[rows, length]} is to be read from position {start}; wanted: one row of "
                f"at least one token, [1, tokens], and a position in it. Read several texts one after the other."
            )
        if length > backbone.spec.context:
            raise UserError(
                f"A text of {length} tokens is to be read in one pass, but the backbone's context holds "
                f"{backbone.spec.context}. Lower the task's window, or shorten its prompts."
            )
        self.total = backbone.spec.depth
        self._bank, self._start = exits, start
        texts = partial(prefixes, tokens_1T, start)
        self._past = Past(texts, self._likely, top=lambda: self.top_T, exits=self._right_exits)
        self._states: list[tuple[Site, Tensor]] = []
        depths = () if exits is None else exits.depths
        h_1TD = embedded_1TD = backbone.embed(tokens_1T)
        for depth, h_1TD in backbone.walk(embedded_1TD, sorted({*depths, self.total})):
            if depth in depths:
                self._states.append((backbone.site(depth), h_1TD))
        self.logits_TV = backbone.unembed(h_1TD[:, start:])[0]
        self.exits = self._evidence(depths)
        self._some: dict[tuple[int, ...], list[Evidence]] = {}

    def _evidence(self, depths: Sequence[int]) -> list[Evidence]:
        """Evidence of the exits at some depths, as if there were no others."""
        trail: list[Evidence] = []
        step_T = torch.arange(len(self.logits_TV), device=self.logits_TV.device)
        pick: Callable[[Tensor], Tensor] = lambda x_1T: x_1T[0, self._start :]  # noqa: E731
        for site, h_1TD in self._states:
            if self._bank is not None and site.depth in depths:
                given = {"pick": pick, "step": step_T, "trail": trail, "past": self._past}
                trail.append(self._bank.evidence(site, h_1TD, **given))
        return trail

    @cached_property
    def top_T(self) -> Tensor:
        """What the top says at each position."""
        return self.logits_TV.argmax(-1)

    def _likely(self, steps: int, count: int) -> list[list[int]]:
        """Of each position, what the top said at the positions before it."""
        said = most_likely(self.logits_TV, count)
        return [[token for row in reversed(said[max(0, t - steps) : t]) for token in row] for t in range(len(said))]

    def _right_exits(self, count: int) -> list[list[int]]:
        """Of each position, the first exits that were right at the positions before it, without the prompt's."""
        depths = first_right(self.exits, self.top_T).tolist()
        return [depths[max(1, t - count) : t][::-1] for t in range(len(depths))]

    @torch.inference_mode()
    def apply_policy(self, policy: TerminationPolicy | None) -> PolicyPath:
        """Follow a policy along the text; None never leaves.

        Raises:
            UserError: If there are no exits, or the policy does not fit them.
        """
        logits_TV = self.logits_TV.clone()
        depth_T = torch.full(logits_TV.shape[:1], self.total, device=logits_TV.device)
        for evidence, leaves_T in () if policy is None else self.departures(policy):
            logits_TV[leaves_T] = evidence.answer[leaves_T]
            depth_T[leaves_T] = evidence.depth
        return PolicyPath(depth_T, logits_TV)

    def asked(self, policy: TerminationPolicy) -> list[Evidence]:
        """Evidence of the exits that a policy asks, shallowest first.

        Raises:
            UserError: As ``apply_policy``.
        """
        if not self.exits:
            raise UserError(f"The policy {policy.label} was given, but there are no exits. Load the model with some.")
        policy.validate([evidence.depth for evidence in self.exits])
        if policy.depths is None:
            return self.exits
        depths = tuple(sorted(policy.depths))
        self._some[depths] = self._some.get(depths) or self._evidence(depths)
        return self._some[depths]

    def departures(self, policy: TerminationPolicy) -> Iterator[tuple[Evidence, Tensor]]:
        """The exits at which a policy lets positions leave, shallowest first, and which ones, ``leaves_T`` bool.

        Raises:
            UserError: As ``apply_policy``.
        """
        read = self.asked(policy)
        stays_T = torch.ones(len(self.logits_TV), dtype=torch.bool, device=self.logits_TV.device)
        stays_T[:1] = False
        for evidence in read:
            leaves_T = policy(evidence) & stays_T
            if leaves_T.any():
                stays_T = stays_T & ~leaves_T
                yield evidence, leaves_T


def prefixes(tokens_1T: Tensor, start: int) -> list[list[int]]:
    """What each position from ``start`` on has read, its own token included."""
    tokens = tokens_1T[0].tolist()
    return [tokens[: stop + 1] for stop in range(start, len(tokens))]
