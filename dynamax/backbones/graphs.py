"""What makes a function of tensors repeatable, and what refuses one that cannot be. Knows no blocks.

A graph repeats kernels on the tensors that it was captured with: these must stay where they are, and nothing may depend
on what Python sees of their values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

ATTENTION = torch.ops.aten._scaled_dot_product_efficient_attention
"""Returns two numbers on the host, which say where its dropout began; nobody reads them without a gradient."""

INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
"""Operations that look at values only if they are given a mask."""


class NotCapturableError(Exception):
    """What a span does depends on more than the tensors that a graph holds."""


class Recorder(ABC):
    """Makes a function of tensors that stay where they are repeatable."""

    @final
    def record(self, run: Callable[[], T]) -> Callable[[], T]:
        """What repeats ``run`` on the values that its tensors then have, and returns what this call made, written over.

        What is returned must be read before anything else is repeated: graphs share their memory.

        Raises:
            NotCapturableError: If ``run`` waits for the device or asks a tensor for a value, with the operation.
        """
        run()  # what is made once, such as a table, is made now
        with Watch():
            run()
        return self.capture(run)

    @abstractmethod
    def capture(self, run: Callable[[], T]) -> Callable[[], T]:
        """``record``, of a function that was found to be capturable."""


@final
class Graphs(Recorder):
    """CUDA graphs that share one pool of memory.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # one, since each keeps the memory that it has used

    def capture(self, run: Callable[[], T]) -> Callable[[], T]:
        """Warm up on a stream apart, then capture."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device):
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    run()
                torch.cuda.current_stream().wait_stream(self._stream)
                with torch.cuda.graph(graph, pool=self._pool):
                    made = run()
        except RuntimeError as error:
            raise NotCapturableError(str(error).strip().partition("\n")[0].rstrip(".")) from error

        def replay() -> T:
            graph.replay()
            return made

        return replay


@final
class Watch(TorchDispatchMode):
    """Refuses operations that a graph cannot hold: those that bring values to the host, or from it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Look at one operation, and run it."""
        looks = not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags)
        if func.overloadpacket in INDEXING:
            looks = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1])
        if looks:
            raise NotCapturableError(f"{func} looks at the values of a tensor")
        out = func(*args, **(kwargs or {}))
        given = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim}  # scalars are baked
        made = {x.device for x in tree_leaves(out) if isinstance(x, Tensor)}
        if func.overloadpacket == ATTENTION:
            made = {x.device for x in out if x.ndim}
        if len(given | made) > 1:
            raise NotCapturableError(f"{func} moves a tensor between {' and '.join(sorted(map(str, given | made)))}")
        return out
