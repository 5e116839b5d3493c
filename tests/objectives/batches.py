"""Stored states made up, with a full model whose tokens a lens can learn to say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynamax.data.batch import HiddenBatch
from dynamax.heads import Exit, ExitBank, LinearGate, TunedLens
from dynamax.types import Site, Spec


def toy_sites(depths: Sequence[int], *, vocab: int, total: int = 12, identity: bool = False) -> dict[int, Site]:
    """Places whose output matrix is random, or the identity, so that a state is its own logits; no norm."""
    generator = torch.Generator().manual_seed(0)
    width = vocab if identity else 8
    matrix_VD = torch.eye(vocab) if identity else torch.randn(vocab, width, generator=generator)
    spec = Spec("toy", total, width, vocab, 64, "toy")

    def project(u_BTD: Tensor, tokens_C: Tensor | None = None) -> Tensor:
        return u_BTD @ (matrix_VD if tokens_C is None else matrix_VD[tokens_C]).to(u_BTD).T

    return {depth: Site(depth, spec, lambda h_BTD: h_BTD, project, lambda h_BTD, count: h_BTD) for depth in depths}


def toy_bank(sites: dict[int, Site]) -> ExitBank:
    """A bank of tuned lenses and linear gates."""
    site = next(iter(sites.values()))
    given = Exit(lens=TunedLens, gates=[LinearGate])
    return ExitBank(dict.fromkeys(sites, given), lambda depth: sites.get(depth, site))


def made(
    sites: dict[int, Site],
    *,
    lengths: Sequence[int] = (7, 5, 6),
    prompt: int = 2,
    top: int = 4,
    seed: int = 0,
    first: int = 0,
) -> HiddenBatch:
    """Random states, deeper ones less noisy, of a full model that turns them before it reads them."""
    generator = torch.Generator().manual_seed(seed)
    spec = next(iter(sites.values())).spec
    rows, longest = len(lengths), max(lengths)
    turn_DD = torch.linalg.qr(torch.randn(spec.width, spec.width, generator=torch.Generator().manual_seed(9))).Q
    clean_BTD = torch.randn(rows, longest, spec.width, generator=generator)
    hidden = {depth: clean_BTD + torch.randn(clean_BTD.shape, generator=generator) / depth for depth in sites}
    site = next(iter(sites.values()))
    best = site.project(clean_BTD @ turn_DD).softmax(-1).topk(top, -1)
    live_BT = torch.arange(longest) < torch.tensor(lengths)[:, None]
    places_T = torch.arange(longest)
    answer_BT = (places_T >= prompt - 1) & (places_T < torch.tensor(lengths)[:, None] - 1)
    tokens_BT = torch.randint(spec.vocab, (rows, longest), generator=generator)
    documents_B = torch.arange(first, first + rows)
    origins_B = documents_B * 40503  # spread over the parts, about a third of them below a quarter
    return HiddenBatch(tokens_BT, hidden, best.indices, best.values, live_BT, answer_BT, documents_B, origins_B)


def stir(module: nn.Module) -> None:
    """Move every parameter by noise."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
