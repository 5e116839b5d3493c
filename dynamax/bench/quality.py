"""What each precision of weights costs in quality and gives in time, for one model on this machine."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import median

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.backbones.precision import PRECISIONS, set_precision
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.types import Span

WINDOW = 256
"""Positions of a pass."""

STEPS = 24
"""Steps that are timed, behind ``WARM`` others."""

WARM = 6


@dataclass(frozen=True)
class Quality:
    """A precision beside the model as it was loaded.

    Attributes:
        precision: Its name; None for the model as it was loaded.
        weights: Class of the products; None as above.
        reason: Why it cannot be had here; None if it can. All figures are then None.
        ms_per_token: Median time of a step of one position at full depth, output matrix included.
        same_argmax: Share of positions with the same most likely token.
        kl: Mean Kullback-Leibler divergence of its distribution from the model's own, in nats.
        positions: How many were compared.
    """

    precision: str | None
    weights: str | None = None
    reason: str | None = None
    ms_per_token: float | None = None
    same_argmax: float | None = None
    kl: float | None = None
    positions: int = 0


def passages() -> str:
    """The texts that come with the project."""
    lines = files("dynamax").joinpath("data", "prompts", "passages.jsonl").read_text("utf-8").splitlines()
    return "\n\n".join(json.loads(line)["passage"] for line in lines)


@torch.inference_mode()
def qualities(engine: Engine, text: str, positions: int) -> Iterator[Quality]:
    """The model as it was loaded, then each precision, in the order of ``PRECISIONS``.

    Args:
        engine: The model, in float32 and in no precision.
        text: What is read.
        positions: How many positions of it.

    Raises:
        UserError: If the text has fewer.
    """
    tokens_T = engine.encode(text, chat=False)
    tokens_T = (tokens_T if isinstance(tokens_T, Tensor) else torch.tensor(tokens_T)).flatten()
    if len(tokens_T) < positions:
        raise UserError(
            f"The text has {len(tokens_T)} tokens, and {positions} positions were asked for. Give a longer text."
        )
    windows = [part[None] for part in tokens_T[:positions].split(WINDOW)]
    plain = engine.backbone
    own = [read(plain, window_1T) for window_1T in windows]
    yield Quality(None, ms_per_token=step_ms(plain, windows[0]), same_argmax=1.0, kl=0.0, positions=positions)
    for name in PRECISIONS:
        backbone = copy.deepcopy(plain)
        try:
            choice = set_precision(backbone, name)
        except UserError as error:
            yield Quality(name, reason=str(error))
            continue
        assert choice is not None
        same, kl = compared(backbone, windows, own)
        yield Quality(name, choice.format, None, step_ms(backbone, windows[0]), same, kl, positions)


def compared(
    backbone: Backbone,
    windows: Sequence[Tensor],
    own: Sequence[Tensor],
    reader: Callable[[Backbone, Tensor], Tensor] | None = None,
) -> tuple[float, float]:
    """Share of equal argmax and mean divergence from ``own``, log-probabilities of the same windows.

    Args:
        backbone: Reads the windows.
        windows: Tokens ``[1, T]`` each.
        own: Log-probabilities ``[T, V]`` of each.
        reader: How they are read; ``read`` if left out.
    """
    same, kl, count = 0, 0.0, 0
    for window_1T, wanted_TV in zip(windows, own, strict=True):
        found_TV = (reader or read)(backbone, window_1T)
        same += int((found_TV.argmax(-1) == wanted_TV.argmax(-1)).sum())
        kl += float((wanted_TV.exp() * (wanted_TV - found_TV)).sum(-1).double().sum())
        count += len(found_TV)
    return same / count, kl / count


def read(backbone: Backbone, window_1T: Tensor) -> Tensor:
    """Log-probabilities ``[T, V]`` of one pass."""
    h_BTD = backbone.run(backbone.embed(window_1T), Span(0, backbone.spec.depth))
    return backbone.unembed(h_BTD)[0].log_softmax(-1)


def step_ms(backbone: Backbone, window_1T: Tensor) -> float:
    """Median milliseconds of a step of one position, after a short prompt."""
    cache, span = backbone.new_cache(), Span(0, backbone.spec.depth)
    prompt_1T, spent = window_1T[:, :16], []
    backbone.run(backbone.embed(prompt_1T, cache), span, cache)
    for _ in range(WARM + STEPS):
        begin = time.perf_counter()
        backbone.unembed(backbone.run(backbone.embed(prompt_1T[:, :1], cache), span, cache))
        spent.append(1000 * (time.perf_counter() - begin))
    return median(spent[WARM:])


def table(found: Sequence[Quality]) -> str:
    """A line for each precision, and a line for each that cannot be had."""
    base = found[0].ms_per_token
    lines = [f"{'precision':<12}{'weights':<10}{'ms a step':>11}{'speed-up':>10}{'same token':>12}{'KL, nats':>11}"]
    for row in found:
        if row.reason is None:
            assert base is not None
            assert row.ms_per_token is not None
            lines.append(
                f"{row.precision or 'as loaded':<12}{row.weights or '':<10}{row.ms_per_token:>11.2f}"
                f"{base / row.ms_per_token:>9.2f}x{row.same_argmax:>12.2%}{row.kl:>11.1e}"
            )
    lines += [f"{row.precision:<12}{row.reason}" for row in found if row.reason is not None]
    return "\n".join(lines)
