"""The state of a block, ours beside transformers'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dynamax.backbones.state import BlockState
from tests.tiny import RECURRENT

CLOSE = {"rtol": 0, "atol": 1e-11}
STATEFUL = {variant.model_type for variant in RECURRENT.values()}
PURE = {"mamba", "mamba2", "falcon_mamba"}
State = dict[str, Tensor]


def reference(model: PreTrainedModel, tokens_BT: Tensor) -> list[State]:
    """What transformers' own cache holds after one full pass, block by block; sliding layers kept whole."""
    cache = DynamicCache(config=model.config) if model.config.model_type in STATEFUL else DynamicCache()
    keyword = "cache_params" if model.config.model_type in PURE else "past_key_values"
    model(tokens_BT, use_cache=True, **{keyword: cache})
    return [told(layer) for layer in cache.layers]


def told(layer: Any) -> State:  # noqa: ANN401
    """Keys, values, window and recurrent state of one layer, as far as it has them."""
    held = {name: getattr(layer, name) for name in ("keys", "values") if getattr(layer, name, None) is not None}
    for name, ours in (("conv_states", "window"), ("recurrent_states", "state")):
        tensor = getattr(layer, name, {}).get(0)
        if tensor is not None:
            held[ours] = tensor
    return held


def state(cell: BlockState, filled: int) -> State:
    """The same of one of our states of ``filled`` positions, the window laid out as transformers has it."""
    held = {}
    if cell.keys is not None:
        held |= dict(zip(("keys", "values"), cell.keys.read(0, filled), strict=True))
    if cell.recurrent is not None and cell.recurrent.tensors is not None:
        held |= dict(zip(("window", "state"), cell.recurrent.tensors, strict=False))
        held["window"] = held["window"].transpose(1, 2)
    return held


def row_of(held: State, row: int, pad: int) -> State:
    """What is held of one row, behind its padding."""
    alone = {name: tensor[row : row + 1] for name, tensor in held.items()}
    return {name: tensor[:, :, pad:] if name in ("keys", "values") else tensor for name, tensor in alone.items()}


def same(got: State, wanted: State) -> None:
    """Both hold the same."""
    assert got.keys() == wanted.keys()
    for name, mine in got.items():
        theirs = wanted[name]
        if name == "window":
            theirs = theirs[..., -mine.shape[-1] :]  # transformers keeps one input more than is needed
        torch.testing.assert_close(mine, theirs, **CLOSE)
