"""What stands for CUDA graphs on a CPU: it repeats operations on the tensors that they had when they were captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynamax.backbones.graphs import Graphs, Recorder

T = TypeVar("T")


@final
class Operations(TorchDispatchMode):
    """Writes down operations with the tensors that they read and made.

    Attributes:
        lines: ``(operation, arguments, keywords, what it made)``. Views are left out: they still see their tensor.
        made: Storages that were made, by place in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, Any, Any, list[Any]]] = []
        self.made: dict[int, object] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run one operation and write it down."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {place_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x if isinstance(x, Tensor) and place_of(x) not in given else None for x in tree_leaves(out)]
        self.made |= {place_of(x): x for x in made if x is not None}
        if func._schema.is_mutable or any(x is not None for x in made):
            self.lines.append((func, args, kwargs, made))
        return out


def place_of(tensor: Tensor) -> int:
    """Where a tensor's storage is in memory."""
    return tensor.untyped_storage().data_ptr()


@final
class Operators(Recorder):
    """Repeats operations, each with the tensors it had, into the tensors it made: what a graph does.

    Nothing that Python decided is decided again. Whatever another recording returned is lost then, since graphs share
    their memory.
    """

    def __init__(self) -> None:
        self._returned: list[Tensor] = []

    def capture(self, run: Callable[[], T]) -> Callable[[], T]:
        """Write down one call."""
        with Operations() as operations:
            out = run()
        returned = [x for x in tree_leaves(out) if isinstance(x, Tensor) and place_of(x) in operations.made]
        self._returned += [x for x in returned if x.is_floating_point()]

        def replay() -> T:
            for x in self._returned:
                x.fill_(torch.nan)
            for func, args, kwargs, made in operations.lines:
                for held, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                    if held is not None:
                        held.copy_(new)
            return out

        return replay


def recorder(device: torch.device | str) -> Recorder:
    """Graphs on a GPU, repeated operations elsewhere."""
    device = torch.device(device)
    return Graphs(device) if device.type == "cuda" else Operators()
