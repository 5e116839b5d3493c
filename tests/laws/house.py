"""What the laws are tried on: a backbone of every family, exits that lie, policies that throw dice."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamax.backbones.base import Backbone
from dynamax.backbones.hf import HFBackbone
from dynamax.decoding.base import Decoder
from dynamax.decoding.sampling import Sampler
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.base import Lens
from dynamax.heads.gates import AttentionGate, LinearGate, MambaGate
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Evidence, Memory, Site
from tests.tiny import tiny

VOCAB = 61
DEPTH = 6


class LyingLens(Lens):
    """The logit lens, wrong on a third of its calls: tiny random models repeat themselves and accept every draft."""

    def __init__(self, site: Site, *, share: float = 0.35) -> None:
        super().__init__()
        self.share = share
        self._dice = torch.Generator().manual_seed(site.depth)

    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        lie = torch.rand((), generator=self._dice) < self.share
        return -site.normalize(h_BTD) if lie else site.normalize(h_BTD)

    def flops(self) -> int:
        return 0


class Dice(TerminationPolicy):
    """Leaves at random, rows in lockstep; reads the recurrent gates so that they must be right."""

    def __init__(self, chance: float = 0.5, seed: int = 0) -> None:
        self.chance = chance
        self._dice = torch.Generator().manual_seed(seed)

    def __call__(self, evidence: Evidence) -> Tensor:
        leave = torch.rand((), generator=self._dice) < self.chance
        return torch.full(evidence.hidden.shape[:1], bool(leave))


class Listener(TerminationPolicy):
    """Leaves when the Mamba gate's confidence is on one side of a wandering line: any error in its state shows."""

    def __call__(self, evidence: Evidence) -> Tensor:
        confidence_B = evidence.confidence("MambaGate")
        line = 0.5 + 0.4 * torch.sin(torch.tensor(2.0 * evidence.step + evidence.depth)) * 0.5
        return confidence_B >= line


def loud(bank: ExitBank, seed: int = 0) -> ExitBank:
    """The same bank with redrawn weights, so that no head is silent."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=dice, dtype=parameter.dtype))
    return bank


def pair(family: str) -> tuple[PreTrainedModel, HFBackbone]:
    """A tiny random model and the backbone around it, the same for all tests: leave them as they are."""
    return _known(family, torch.float32 is torch.float64)


@functools.cache
def _known(family: str, upcast: bool) -> tuple[PreTrainedModel, HFBackbone]:
    return fresh_pair(family)


def fresh_pair(family: str) -> tuple[PreTrainedModel, HFBackbone]:
    """A model and a backbone that a test may change."""
    model = tiny(family, depth=DEPTH, vocab=VOCAB)
    return model, HFBackbone(model)


def exits(backbone: Backbone, depths: Sequence[int] = (2, 3, 5)) -> ExitBank:
    """Lying lenses, gates of every kind."""
    exit_ = Exit(lens=LyingLens, gates=[LinearGate, MambaGate, AttentionGate])
    return loud(ExitBank(dict.fromkeys(depths, exit_), backbone.site).double().requires_grad_(False))


def prompt(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: Sequence[int] = (9, 6, 4)) -> tuple[Tensor, Tensor]:
    """Prompts padded at the left, and the padding of each row."""
    longest = max(lengths)
    rows = [torch.nn.functional.pad(prompt(n, seed=n)[0], (longest - n, 0)) for n in lengths]
    return torch.stack(rows), torch.tensor([longest - n for n in lengths])


def generate(model: PreTrainedModel, prompt_BT: Tensor, limit: int, pad_B: Tensor | None = None) -> Tensor:
    """transformers' own greedy decoding: the tokens after the prompt. Padded rows are decoded alone, unpadded."""
    if pad_B is not None:
        rows = zip(prompt_BT, pad_B.tolist(), strict=True)
        return torch.cat([generate(model, row_T[None, pad:], limit) for row_T, pad in rows])
    said: dict[str, Tensor] = vars(model).setdefault("said", {})  # the tests ask for the same texts
    key = str(prompt_BT.tolist())
    if key not in said or said[key].shape[1] < limit:
        options = {"max_new_tokens": limit, "min_new_tokens": limit, "do_sample": False, "pad_token_id": 0}
        out = model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **options)
        said[key] = out[:, prompt_BT.shape[1] :]
    return said[key][:, :limit]


def fresh(memory: Memory) -> Memory:
    """A memory that has read nothing, with the same padding."""
    return Memory(memory.pad_B)


def check_first_two_tokens(
    decoder: Decoder, backbone: HFBackbone, sampler: Sampler, start_1T: Tensor, runs: int
) -> None:
    """Shares of the first two tokens in many runs against the full model's exact distributions of each."""
    first_V = sampler.distribution(backbone.model(start_1T).logits[:, -1])[0]
    drawn = torch.tensor([[int(s.token_B) for s in decoder.decode(start_1T, max_new_tokens=3)] for _ in range(runs)])
    second_V = torch.zeros_like(first_V)
    for token in first_V.nonzero().flatten():
        longer_1T = torch.cat([start_1T, token.view(1, 1)], 1)
        second_V += first_V[token] * sampler.distribution(backbone.model(longer_1T).logits[:, -1])[0]
    for place, wanted_V in enumerate((first_V, second_V)):
        share_V = torch.bincount(drawn[:, place], minlength=len(wanted_V)) / runs
        spread_V = (wanted_V * (1 - wanted_V) / runs).sqrt()
        assert (share_V - wanted_V).abs().le(4.5 * spread_V + 2 / runs).all()
