"""What logits do not show: state written without running a block, shifted keys, counted costs.

Each check runs one block after the other on the hidden states of a text, and gives the largest error that it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dynamax.backbones.base import Backbone
from dynamax.backbones.cache import Cache
from dynamax.errors import UserError
from dynamax.kernels.products import Product
from dynamax.types import Span

FIRST = 8
"""Positions of the text that a block has been through before it is looked at."""


def entering(backbone: Backbone, tokens_BT: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each block, and what comes into it."""
    h_BTD = backbone.embed(tokens_BT)
    for index in range(backbone.spec.depth):
        yield index, h_BTD
        h_BTD = backbone.run(h_BTD, Span(index, index + 1))


def run_into(backbone: Backbone, index: int, h_BTD: Tensor) -> Cache:
    """A cache for one block, which has been through these positions."""
    cache = backbone.new_cache(span=Span(index, index + 1))
    backbone.run(h_BTD, Span(index, index + 1), cache)
    return cache


def held(cache: Cache) -> list[Tensor]:
    """Keys, values and recurrent state of the one block."""
    state, filled = cache.states[-1], cache.filled[-1]
    keys = () if state.keys is None else state.keys.read(0, filled)
    recurrent = () if state.recurrent is None else state.recurrent.tensors or ()
    return [*keys, *recurrent]


def gap(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest error relative to the norm of what is wanted; infinite where shapes differ."""
    if [x.shape for x in got] != [x.shape for x in wanted]:
        return float("inf")
    errors = [
        ((x - y).double().norm() / y.double().norm().clamp_min(1e-30)).item() for x, y in zip(got, wanted, strict=True)
    ]
    return max(errors, default=0.0)


def judged(error: float, bound: float, backbone: Backbone, index: int, what: str, remedy: str) -> float:
    """The error of one block, if it is within the bound."""
    if not error <= bound:
        raise refuse(backbone, index, f"{what} by {error:.1e} of the norm ({bound:.1e} is allowed). {remedy}")
    return error


def refuse(backbone: Backbone, index: int, what: str) -> UserError:
    """The error of one block."""
    return UserError(f"{backbone.spec.family}, block {index}: {what}")


def written_state(backbone: Backbone, tokens_BT: Tensor, bound: float) -> float:
    """What ``write`` leaves of two positions, against what the block itself leaves of them."""
    worst = 0.0
    for index, h_BTD in entering(backbone, tokens_BT):
        if not backbone.state_kinds(index):
            continue
        cache = run_into(backbone, index, h_BTD[:, :FIRST])
        backbone.write(h_BTD[:, FIRST : FIRST + 2], index, cache)
        error = gap(held(cache), held(run_into(backbone, index, h_BTD[:, : FIRST + 2])))
        what = "the state that is written without running it differs from its own"
        remedy = "Compare write_state (of a row: input_norm, keys_and_values, turn, write) with the block's forward."
        worst = max(worst, judged(error, bound, backbone, index, what, remedy))
    return worst


def shifted_keys(backbone: Backbone, tokens_BT: Tensor, bound: float) -> float:
    """Keys and values shifted by one position, against those written one position later."""
    worst = 0.0
    for index, h_BTD in entering(backbone, tokens_BT):
        if tuple(backbone.state_kinds(index)) != ("keys",):
            continue
        found: list[list[Tensor]] = []
        for before in (FIRST, FIRST + 1):
            cache = run_into(backbone, index, h_BTD[:, :before])
            backbone.write(h_BTD[:, -2:], index, cache)
            found.append([x[:, :, before:] for x in held(cache)])
        error = gap(list(backbone.shift(found[0][0], found[0][1], index)), found[1])
        what = "keys that are shifted by one position differ from those written there"
        remedy = "Compare shift (of a row: rotary, rotary_types, turn, turned) with what the block's attention turns."
        worst = max(worst, judged(error, bound, backbone, index, what, remedy))
    return worst


def counted_costs(backbone: Backbone, tokens_BT: Tensor, bound: float) -> float:
    """``block_cost`` against the values that are held, and the multiply-adds that PyTorch counts for one position.

    What recurrence costs beside its weights depends on how the scan is written, so there the count is a bound.
    """
    if any(isinstance(module, Product) for module in backbone.modules()):
        return 0.0  # PyTorch cannot count packed products; what they cost is what it was before
    for index, h_BTD in entering(backbone, tokens_BT[:1, : FIRST + 1]):
        cost = backbone.block_cost(index)
        cache = run_into(backbone, index, h_BTD[:, :FIRST])
        state = cache.states[index]
        keys = 0 if state.keys is None else sum(x.numel() for x in state.keys.read(0, FIRST)) / FIRST
        recurrent = 0 if state.recurrent is None else sum(x.numel() for x in state.recurrent.tensors or ())
        for name, said, found in (("keys", cost.keys, keys), ("state", cost.state, recurrent)):
            if said != found:
                raise refuse(
                    backbone,
                    index,
                    f"block_cost counts {said} values of {name}, but {found:g} are held. Mend block_cost (of a row: "
                    f"attention_cost, mixer).",
                )
        seen = FIRST + 1 if cost.window is None else min(FIRST + 1, cost.window)
        one_BTD, span = h_BTD[:, FIRST:], Span(index, index + 1)
        ran = multiply_adds(lambda cache=cache, x=one_BTD, span=span: backbone.run(x, span, cache))
        cache = run_into(backbone, index, h_BTD[:, :FIRST])
        wrote = multiply_adds(lambda cache=cache, x=one_BTD, index=index: backbone.write(x, index, cache))
        attending = cost.scores * seen
        whole = attending if cost.write >= cost.active else 0  # the whole block runs
        written = cost.write + whole if backbone.state_kinds(index) else 0
        for name, said, found in (("running it", cost.active + attending, ran), ("writing its state", written, wrote)):
            if not said * 0.99 <= found <= (said + cost.scan) * 1.01:
                more = f" and up to {cost.scan} of a scan" if cost.scan else ""
                raise refuse(
                    backbone,
                    index,
                    f"{name} takes {found} multiply-adds for one position behind {FIRST}, but block_cost counts "
                    f"{said}{more}. Mend block_cost (of a row: expert_share, attention_cost, uses_parameter, mixer).",
                )
    return 0.0


def multiply_adds(run: Callable[[], object]) -> int:
    """Multiply-adds of matrix products and attention that a function takes."""

    def attention(q: Any, k: Any, v: Any, *_: object, **__: object) -> int:  # noqa: ANN401 - shapes
        (batch, heads, rows, size), keys = q, k[2]
        return 2 * batch * heads * rows * keys * (size + v[3])

    def grouped(x: Any, weight: Any, *_: object, **__: object) -> int:  # noqa: ANN401
        return 2 * x[0] * x[1] * weight[-1]

    operations: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._grouped_mm: grouped,
    }
    with FlopCounterMode(display=False, custom_mapping=operations) as counter:
        run()
    return counter.get_total_flops() // 2


Check = Callable[[Backbone, Tensor, float], float]

CHECKS: dict[str, Check] = {
    "written state": written_state,
    "shifted keys": shifted_keys,
    "counted costs": counted_costs,
}
