"""From logits to tokens, without a host synchronisation. Knows neither exits nor depth."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dynamax.errors import UserError


class Sampler(ABC):
    """Turns logits into a distribution and draws from it."""

    @abstractmethod
    def distribution(self, logits_BV: Tensor) -> Tensor:
        """Probabilities ``p_BV`` that a token is drawn with, float32."""

    @abstractmethod
    def draw(self, probs_BV: Tensor) -> Tensor:
        """Draw ``token_B`` from probabilities; they need not sum to one."""

    @abstractmethod
    def uniform(self, like_B: Tensor) -> Tensor:
        """One number in [0, 1) a row, for acceptance tests; 0 accepts whatever has any probability."""

    @abstractmethod
    def restart(self, turn: int) -> None:
        """Draw from here on as in turn ``turn``, whatever was drawn before: the same numbers each time."""

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Draw ``token_B`` from logits."""
        return self.draw(self.distribution(logits_BV))


class Greedy(Sampler):
    """Always the most likely token."""

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """The argmax, without a distribution in between."""
        return logits_BV.argmax(-1)

    def distribution(self, logits_BV: Tensor) -> Tensor:
        """All mass on the argmax."""
        return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)

    def draw(self, probs_BV: Tensor) -> Tensor:
        """The argmax."""
        return probs_BV.argmax(-1)

    def uniform(self, like_B: Tensor) -> Tensor:
        """Any number serves: a drafted token has probability 0 or 1."""
        return torch.full_like(like_B, 0.5, dtype=torch.float32)

    def restart(self, turn: int) -> None:
        """Nothing is drawn by chance."""


class Sampled(Sampler):
    """Temperature, then top-k, then top-p, as transformers orders them.

    Args:
        temperature: Greater than 0.
        top_k: Keep only the k most likely tokens; None keeps all.
        top_p: Keep the fewest most likely tokens whose mass reaches ``top_p``, in (0, 1].
        seed: Of the generator, one for each sampler.
    """

    def __init__(
        self, temperature: float = 1.0, *, top_k: int | None = None, top_p: float = 1.0, seed: int = 0
    ) -> None:
        if not torch.finfo(torch.float32).tiny <= temperature < torch.inf:
            raise UserError(
                f"temperature is {temperature}; it must be above 0 in float32, and finite. For the most likely token, "
                f"leave it out (in Python, use Greedy)."
            )
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is {top_k}; it must be at least 1, or left out to keep all tokens.")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p}; it must lie in (0, 1]. 1 keeps all tokens.")
        if not -(2**63) <= seed < 2**64:
            raise UserError(f"seed is {seed}; it must fit 64 bits. Give a smaller number.")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.seed = seed
        self._start = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def distribution(self, logits_BV: Tensor) -> Tensor:
        """Softmax of the tempered logits over the tokens that top-k and top-p keep."""
        scores_BV = logits_BV.float()
        scores_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / self.temperature  # 0 at most: it cannot overflow
        if self.top_k is not None and self.top_k < scores_BV.shape[-1]:
            least_B1 = scores_BV.topk(self.top_k, -1).values[..., -1:]
            scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
        probs_BV = scores_BV.softmax(-1)
        if self.top_p < 1:
            sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
            before_BV = sorted_BV.cumsum(-1) - sorted_BV
            dropped_BV = (before_BV >= self.top_p).scatter(-1, order_BV, before_BV >= self.top_p)
            probs_BV = probs_BV.masked_fill(dropped_BV, 0.0)
            probs_BV = probs_BV / probs_BV.sum(-1, keepdim=True)
        return probs_BV

    def draw(self, probs_BV: Tensor) -> Tensor:
        """Inverse of the cumulative distribution; one number a row, where a race of exponentials needs V."""
        cdf_BV = probs_BV.cumsum(-1)
        mass_B1 = cdf_BV[:, -1:].contiguous()
        u_B1 = mass_B1 * torch.rand(mass_B1.shape, device=cdf_BV.device, generator=self._generator(cdf_BV.device))
        last_B1 = torch.searchsorted(cdf_BV, mass_B1)  # rounding may put u at the whole mass
        return torch.minimum(torch.searchsorted(cdf_BV, u_B1, right=True), last_B1)[:, 0]

    def uniform(self, like_B: Tensor) -> Tensor:
        """Uniform numbers from the sampler's own generator."""
        return torch.rand(like_B.shape, device=like_B.device, generator=self._generator(like_B.device))

    def restart(self, turn: int) -> None:
        """Begin anew with a seed of this turn's own."""
        self._start = hash((self.seed, turn)) % 2**63
        self._generators = {}

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._start)
        return self._generators[device]
