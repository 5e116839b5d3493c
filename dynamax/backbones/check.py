"""Logits of every way to run a backbone against a reference. Knows nothing of how the reference computes.

Any error in masks, positions, windows, scales or the cache shows in logits, and only there with certainty: hidden
states can agree while a logit scale is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.backbones.cache import Cache
from dynamax.backbones.check_state import CHECKS
from dynamax.errors import UserError
from dynamax.types import Span

Reference = Callable[[Tensor], Tensor]
"""One pass over ``tokens_BT`` by the model's own code: ``logits_BTV``, no padding, nothing kept."""

Pairs = Iterable[tuple[Tensor, Tensor]]
Mode = Callable[[Backbone, Reference, Tensor], Pairs]

QUICK = ("one pass", "uneven chunks", "short windows")
"""What is checked whenever a model is loaded."""

SHORT = 5
"""A window that any text here outgrows."""

TOLERANCES = {torch.float64: 5e-5, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2.5e-1}
"""Largest relative error, by dtype. In float64 it is transformers' own casts to float32 that are seen."""


@torch.no_grad()
def check_backbone(
    backbone: Backbone,
    reference: Reference,
    *,
    tokens_BT: Tensor | None = None,
    tolerance: float | None = None,
    modes: Collection[str] | None = None,
) -> dict[str, float]:
    """Compare every way to run a backbone with a reference.

    They are the keys of ``MODES``: a single pass, and through a cache with splits, debts, rollbacks, padding. Those of
    ``CHECKS`` are about what no logits show: state written without running a block, shifted keys, counted costs.

    Args:
        backbone: The backbone; on a device and in a dtype of its choosing.
        reference: The model's own logits, ``tokens_BT -> logits_BTV``, by code that shares as little as
            possible with the backbone. ``HFBackbone`` has one: ``backbone.reference``.
        tokens_BT: Tokens to run, at least 16 long. Random if left out. Windows need not be shorter: where the reference
            is the backbone's own, they are made so for one of the modes.
        tolerance: Largest error relative to the norm of the (centred) reference; by dtype if left out. In bfloat16
            that is wide: it finds a wrong mask or position, not a lost cap on the logits. Check in float32 too.
        modes: Names of the ways to try; all if left out.

    Returns:
        The error of each mode.

    Raises:
        UserError: If a mode differs: which, by how much, where first; or gives logits of another shape or dtype; if
            costs are counted wrongly.
    """
    weight, family = next(backbone.parameters()), backbone.spec.family
    if tokens_BT is None:
        tokens_BT = torch.randint(backbone.spec.vocab, (2, 24), generator=torch.Generator().manual_seed(0))
    if tokens_BT.shape[1] < 16:
        raise UserError(f"{tokens_BT.shape[1]} tokens were given to check a backbone with; give at least 16.")
    tokens_BT = tokens_BT.to(weight.device)
    bound = TOLERANCES[weight.dtype] if tolerance is None else tolerance
    errors = {}
    for mode in (*MODES, *CHECKS) if modes is None else modes:
        errors[mode] = 0.0
        if mode in CHECKS:
            errors[mode] = CHECKS[mode](backbone, tokens_BT, bound)
            continue
        for got_BTV, wanted_BTV in MODES[mode](backbone, reference, tokens_BT):
            if got_BTV.shape != wanted_BTV.shape or torch.finfo(got_BTV.dtype).bits < 32:
                raise UserError(
                    f"{family}, {mode}: logits {tuple(got_BTV.shape)} in {got_BTV.dtype} were given, "
                    f"{tuple(wanted_BTV.shape)} in float32 at least are wanted."
                )
            wanted_BTV = wanted_BTV.to(got_BTV.dtype)
            off_BTV = got_BTV - wanted_BTV
            error = (off_BTV.norm() / (wanted_BTV - wanted_BTV.mean(-1, keepdim=True)).norm()).item()
            if not error <= bound:
                gap_T = off_BTV.abs().amax((0, 2))
                worst = int(gap_T.argmax())
                raise UserError(
                    f"{family}, {mode}: logits differ from the model's own by {error:.1e} of their norm ({bound:.1e} "
                    f"is allowed); most at position {worst} of {len(gap_T)}, by {gap_T[worst]:.2e}. Do not use this "
                    f"backbone with these weights; compare its masks, positions, windows and scales with the model's "
                    f"forward."
                )
            errors[mode] = max(errors[mode], error)
    return errors


def chunked(backbone: Backbone, tokens_BT: Tensor, sizes: list[int], cache: Cache) -> Tensor:
    """Logits of tokens run to the top in chunks; the last size repeats as long as tokens last."""
    depth, logits = backbone.spec.depth, []
    while tokens_BT.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        h_BTD = backbone.run(backbone.embed(tokens_BT[:, :size], cache), Span(0, depth), cache)
        logits.append(backbone.unembed(h_BTD))
        tokens_BT = tokens_BT[:, size:]
    return torch.cat(logits, 1)


def every_split(backbone: Backbone, reference: Reference, tokens_BT: Tensor) -> Pairs:
    """The span cut in two, at each depth, through a cache."""
    wanted_BTV, depth = reference(tokens_BT), backbone.spec.depth
    for cut in range(1, depth):
        cache = backbone.new_cache()
        logits = []
        for piece_BT in tokens_BT.split(7, 1):
            h_BTD = backbone.run(backbone.embed(piece_BT, cache), Span(0, cut), cache)
            logits.append(backbone.unembed(backbone.run(h_BTD, Span(cut, depth), cache)))
        yield torch.cat(logits, 1), wanted_BTV


def debts(backbone: Backbone, reference: Reference, tokens_BT: Tensor) -> Pairs:
    """Positions that left at each depth in turn, paid by the last two."""
    depth, cache = backbone.spec.depth, backbone.new_cache()
    for index, token_BT in enumerate(tokens_BT[:, :-2].split(1, 1)):
        exit_ = 1 + index % (depth - 1) if depth > 1 else 1
        h_BTD = backbone.run(backbone.embed(token_BT, cache), Span(0, exit_), cache)
        if exit_ < depth:
            cache.owe(exit_, h_BTD)
    h_BTD = backbone.run(backbone.embed(tokens_BT[:, -2:], cache), Span(0, depth), cache)
    yield backbone.unembed(h_BTD), reference(tokens_BT)[:, -2:]


def rolled_back(backbone: Backbone, reference: Reference, tokens_BT: Tensor) -> Pairs:
    """Wrong tokens taken back before the right ones come."""
    cache, first = backbone.new_cache(), tokens_BT.shape[1] // 2
    chunked(backbone, tokens_BT[:, :first], [first], cache)
    before = cache.snapshot()
    chunked(backbone, tokens_BT.flip(1)[:, :5], [2, 1], cache)
    cache.rollback(before)
    yield chunked(backbone, tokens_BT[:, first:], [2, 1], cache), reference(tokens_BT)[:, first:]


def left_padding(backbone: Backbone, reference: Reference, tokens_BT: Tensor) -> Pairs:
    """Three rows padded by 0, 3 and 5, against each row alone."""
    pads, row_T = [0, 3, 5], tokens_BT[0]
    length = len(row_T)
    padded_BT = torch.stack([torch.cat([row_T.new_zeros(pad), row_T[: length - pad]]) for pad in pads])
    cache = backbone.new_cache(pad_B=torch.tensor(pads, device=row_T.device))
    got_BTV = chunked(backbone, padded_BT, [4, 5, 2, 1], cache)
    wanted_1TV = reference(row_T[None])
    for row, pad in enumerate(pads):
        yield got_BTV[row : row + 1, pad:], wanted_1TV[:, : length - pad]


def candidates(backbone: Backbone, reference: Reference, tokens_BT: Tensor) -> Pairs:
    """Logits of a few tokens only."""
    tokens_C = torch.arange(0, backbone.spec.vocab, max(1, backbone.spec.vocab // 7), device=tokens_BT.device)
    h_BTD = backbone.run(backbone.embed(tokens_BT), Span(0, backbone.spec.depth))
    yield backbone.project(backbone.normalize(h_BTD), tokens_C), reference(tokens_BT)[..., tokens_C]


def short_windows(backbone: Backbone, reference: Reference, tokens_BT: Tensor) -> Pairs:
    """Windows that are shorter than the text, in the backbone and in the model whose own forward is the reference."""
    if getattr(reference, "__self__", None) is not backbone:
        return []
    with backbone.short_windows(SHORT) as shortened:
        return MODES["one pass"](backbone, reference, tokens_BT) if shortened else []


MODES: dict[str, Mode] = {
    "one pass": lambda backbone, reference, tokens_BT: [
        (backbone.unembed(backbone.run(backbone.embed(tokens_BT), Span(0, backbone.spec.depth))), reference(tokens_BT))
    ],
    "uneven chunks": lambda backbone, reference, tokens_BT: [
        (chunked(backbone, tokens_BT, [5, 1, 3, 2], backbone.new_cache()), reference(tokens_BT))
    ],
    "single steps": lambda backbone, reference, tokens_BT: [
        (chunked(backbone, tokens_BT, [4, 1], backbone.new_cache()), reference(tokens_BT))
    ],
    "every split": every_split,
    "debts": debts,
    "rollback": rolled_back,
    "left padding": left_padding,
    "candidate tokens": candidates,
    "short windows": short_windows,
}
