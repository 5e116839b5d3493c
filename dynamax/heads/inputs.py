"""What gates may read of an exit: inputs as parts, a few numbers each. Knows no gate, no lens and no policy.

Every input gives ``[..., F]`` in the leading dimensions of ``evidence.hidden``, of order one and without gradient. What
it looks at is recorded by the evidence, and so charged. Most depend on one position alone, so they are for gates that
judge each position alone; a recurrent gate also reads positions that were skipped, of which the hidden state is all
that is known.

Sources of the kinds: JEI-DNN (lens statistics, arXiv 2310.09163), SpecEE (candidates and their change from exit to
exit, arXiv 2504.08850), PABEE (agreement of earlier exits, arXiv 2006.04152).
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self, final

import torch
from torch import Tensor

from dynamax.errors import UserError
from dynamax.heads.blocks import positive, rms_normalize
from dynamax.past import continuations, gathered
from dynamax.types import Evidence, Past, Site

REMEDY = "Decode, read a known text (engine.read), train over a store; or build the gate without this input."


class GateInput(ABC):
    """One thing that a gate reads. It has options, no parameters and no state.

    Attributes:
        asks: Names of gates of the same exit whose scores it reads.
        recent: Earlier tokens whose exits it looks at. What a gate says then depends on where those tokens left.
        recipe: The options it was built with, defaults included; recorded here, as ``ExitHead`` does.
    """

    asks: Sequence[str] = ()
    recent: int = 0
    recipe: dict[str, object]

    def __new__(cls, *values: object, **options: object) -> Self:
        """Make the input and record its recipe."""
        made = super().__new__(cls)
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        defaults = {each.name: each.default for each in own if each.default is not each.empty}
        by_place = {each.name: value for each, value in zip(own, values, strict=False)}
        made.recipe = {**defaults, **by_place, **options}
        return made

    def __init__(self) -> None:  # noqa: B027 - most have no options
        """No options."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GateInput) and type(self) is type(other) and self.recipe == other.recipe

    def __hash__(self) -> int:
        return hash((type(self), repr(self.recipe)))

    @abstractmethod
    def width(self, site: Site) -> int:
        """Numbers it gives for a position, F."""

    @abstractmethod
    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """The numbers, ``[..., F]``.

        Args:
            evidence: Of the exit.
            dtype: What the gate computes in; the numbers may have another precision.
        """

    def flops(self, site: Site) -> int:  # noqa: ARG002 - most compute next to nothing
        """Operations of a position; element-wise work counts where it is as long as the vocabulary."""
        return 0


@final
class Inputs:
    """The inputs of one gate, side by side.

    Where there are several, the F numbers of each are divided by the root of F. Optimisers move all weights alike: they
    would else learn from the many numbers of the hidden state long before they learn from the few of another input.

    Args:
        site: The exit's place.
        inputs: What is read; None for the normed hidden state alone.

    Attributes:
        width: Numbers of a position.
        flops: Operations of a position.
        asks: Names of gates of the same exit whose scores are read.
        recent: Earlier tokens whose exits are looked at.

    Raises:
        UserError: If there is no input, or one stands twice.
    """

    def __init__(self, site: Site, inputs: Sequence[GateInput] | None) -> None:
        self.parts = (HiddenState(),) if inputs is None else tuple(inputs)
        names = [type(part).__name__ for part in self.parts]
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise UserError(
                f"A gate was given the inputs {', '.join(names) or '(none)'}; wanted: at least one, each once. Leave "
                f"inputs out for the hidden state alone."
            )
        widths = [part.width(site) for part in self.parts]
        self.width = sum(widths)
        self._scales = [width**-0.5 for width in widths] if len(widths) > 1 else [1.0]
        self.flops = sum(part.flops(site) for part in self.parts)
        self.asks = tuple(dict.fromkeys(name for part in self.parts for name in part.asks))
        self.recent = max(part.recent for part in self.parts)

    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """All numbers, ``[..., width]``."""
        if len(self.parts) == 1:
            return self.parts[0].read(evidence, dtype).to(dtype)
        pairs = zip(self.parts, self._scales, strict=True)
        return torch.cat([part.read(evidence, dtype).to(dtype) * scale for part, scale in pairs], -1)


# -- the exit itself ----------------------------------------------------------------------------------


class HiddenState(GateInput):
    """The hidden state, divided by its root mean square: D numbers."""

    def width(self, site: Site) -> int:
        """The width of the residual stream."""
        return site.spec.width

    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """The normed state, shared by all gates of the exit."""
        return evidence.derive(rms_normalize, dtype)


class LensStatistics(GateInput):
    """How unsure the exit's lens is, in four numbers from 0 to 1; reads the logits.

    The greatest probability, the entropy of the probabilities p, the greatest less the second probability, and the
    entropy of p^2 / sum(p^2); both entropies over log V.

    Source: JEI-DNN (Regol et al. 2024, arXiv 2310.09163), whose entropies are in nats. FLOPs: 18 V + 4.
    """

    def width(self, site: Site) -> int:
        """Four."""
        return 4

    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """The numbers of all tokens' probabilities."""
        return uncertainty(evidence.probs.detach(), evidence.probs.shape[-1])

    def flops(self, site: Site) -> int:
        """The paper's count, 18 V + 12 with the weighted sum of the four, which is the gate's own."""
        return 18 * site.spec.vocab + 4


class CandidateStatistics(GateInput):
    """The four numbers of ``LensStatistics``, among a few candidates: reads their rows of the output matrix alone.

    Entropies are over log ``limit``.
    Candidates are tokens of the text: those that followed its newest token before, then its last ones. Likely tokens
    of steps before are none: a step that left early has others than the full model. The token that the exit says is
    still the lens's, read over all tokens when it leaves.

    Source: SpecEE (Xu et al. 2025, arXiv 2504.08850), whose candidates are those of a drafting model.

    Args:
        limit: Most candidates of a row.
    """

    def __init__(self, *, limit: int = 256) -> None:
        self.limit = positive("limit", limit)

    def width(self, site: Site) -> int:
        """Four."""
        return 4

    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """The numbers of the candidates' probabilities."""
        found = past_of(self, evidence).derive(gathered, self.limit, 0, 0, evidence.hidden.device)
        lead = evidence.hidden.shape[:-1]
        own = None if found[1] is None else found[1].view(*lead, -1)
        return uncertainty(evidence.few(found[0], own).softmax(-1).detach(), self.limit)  # rows have different numbers

    def flops(self, site: Site) -> int:
        """As many as ``LensStatistics``, of ``limit`` tokens."""
        return 18 * self.limit + 4


def uncertainty(probs: Tensor, count: int) -> Tensor:
    """The numbers of ``LensStatistics``, ``[..., 4]``, of probabilities ``[..., V]``; entropies over log ``count``."""
    nats = math.log(max(2, count))
    best = probs.topk(min(2, probs.shape[-1]), dim=-1).values
    second = best[..., 1] if best.shape[-1] > 1 else torch.zeros_like(best[..., 0])
    squared = probs.square()
    squared = squared / squared.sum(-1, keepdim=True)
    entropies = [torch.special.entr(each).sum(-1) / nats for each in (probs, squared)]
    return torch.stack([best[..., 0], entropies[0], best[..., 0] - second, entropies[1]], -1)


# -- the exits before it --------------------------------------------------------------------------------


class TrailStatistics(GateInput):
    """Whether the lens's token has settled, in four numbers; reads the logits here and at all exits below.

    The share of earlier exits that say the same token; how many of them say it without a break up to here, over their
    number; how much its probability has grown since the last exit, and since the first. All are 0 at the first exit.
    A policy that asks some of the exits alone makes the trail shorter than it was in training.

    Sources: PABEE (Zhou et al. 2020, arXiv 2006.04152); SpecEE (arXiv 2504.08850), which reads the change of
    probability. FLOPs: 4 V.
    """

    def width(self, site: Site) -> int:
        """Four."""
        return 4

    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """The numbers, from the tokens and probabilities of the trail."""
        trail, token = evidence.trail, evidence.token
        if not trail:
            return evidence.logits.new_zeros(*token.shape, 4)
        same_E = torch.stack([earlier.token == token for earlier in reversed(trail)], -1).to(evidence.logits.dtype)
        unbroken = same_E.cumprod(-1).mean(-1)
        before = [earlier.probs.gather(-1, token[..., None])[..., 0] for earlier in (trail[-1], trail[0])]
        grown = evidence.probs.amax(-1, keepdim=True) - torch.stack(before, -1)
        return torch.cat([torch.stack([same_E.mean(-1), unbroken], -1), grown], -1).detach()

    def flops(self, site: Site) -> int:
        """The greatest logit and the softmax of this exit; those of the trail are counted where they stand."""
        return 4 * site.spec.vocab


class GateScore(GateInput):
    """The log-odds of another gate of the same exit: how recurrent gates are combined with what they do not read.

    That gate learns from its own labels: no gradient goes into it from here.

    Args:
        gate: Class name of the gate, such as MambaGate.
    """

    def __init__(self, gate: str) -> None:
        self.gate = gate
        self.asks = (gate,)

    def width(self, site: Site) -> int:
        """One."""
        return 1

    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """The score; the gate is charged like any other that is asked."""
        return evidence.score(self.gate).detach()[..., None]


# -- the text so far ------------------------------------------------------------------------------------


class NgramAgreement(GateInput):
    """Whether what followed the same words before is the lens's token; reads the text and the logits.

    For 1 to ``orders`` last tokens: 1 if the token behind their newest earlier occurrence is the lens's, -1 if it is
    another, 0 if there is no such occurrence. FLOPs: V.

    Args:
        orders: Tokens of the longest sequence that is looked for.
    """

    def __init__(self, *, orders: int = 3) -> None:
        self.orders = positive("orders", orders)

    def width(self, site: Site) -> int:
        """One for each length."""
        return self.orders

    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """The numbers; the text is searched once for all exits of a step."""
        found = past_of(self, evidence).derive(continuations, self.orders, evidence.hidden.device)
        token, found = evidence.token[..., None], found.view(*evidence.hidden.shape[:-1], -1)
        return ((found == token).to(dtype) * 2 - 1) * (found >= 0)

    def flops(self, site: Site) -> int:
        """The greatest logit."""
        return site.spec.vocab


class Position(GateInput):
    """How many tokens were read, and how many generated: ``log1p`` of both, over 8, which three thousand reach."""

    def width(self, site: Site) -> int:
        """Two."""
        return 2

    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """The two logarithms."""
        lead, device = evidence.hidden.shape[:-1], evidence.hidden.device
        read = torch.tensor([len(text) for text in past_of(self, evidence).texts], device=device).view(lead)
        step = torch.as_tensor(evidence.step, device=device).expand(lead)
        return torch.stack([read, step], -1).to(dtype).log1p() / 8


class PastExits(GateInput):
    """The depths that the last tokens left at, newest first, as shares of all blocks; 1 where there were none.

    They depend on the policy. Where a text is known, in training too, those of a perfect policy stand in: the first
    exit that says the full model's token. So a decoder with such a gate is not read off one pass, and ``calibrate``
    refuses it.

    Args:
        tokens: How many tokens are looked at.
    """

    def __init__(self, *, tokens: int = 4) -> None:
        self.recent = positive("tokens", tokens)

    def width(self, site: Site) -> int:
        """One for each token."""
        return self.recent

    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """The shares."""
        exits = past_of(self, evidence).exits
        if exits is None:
            raise UserError(f"PastExits reads the exits of earlier tokens, and nobody knows them here. {REMEDY}")
        rows = [[*row, *[evidence.total] * (self.recent - len(row))] for row in exits(self.recent)]
        shares = torch.tensor(rows, device=evidence.hidden.device, dtype=dtype) / evidence.total
        return shares.view(*evidence.hidden.shape[:-1], -1)


def past_of(asked: GateInput, evidence: Evidence) -> Past:
    """What was read and said before; a UserError if nobody knows."""
    if evidence.past is None:
        raise UserError(f"{type(asked).__name__} reads the text so far, and nobody knows it here. {REMEDY}")
    return evidence.past
