"""What an exit head is. A head knows its site; it never sees a backbone, a cache or a policy."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

from torch import Tensor, nn

from dynamax.types import Evidence, Memory, Site


class ExitHead(nn.Module, ABC):
    """A small network at one depth. A subclass takes ``site`` first, then its own options.

    A recurrent head states the size of its memory of one row, so that reading and writing it is charged.

    Attributes:
        recurrent: True if its output for a position depends on the positions before. Such a head reads every position,
            in order, and remembers through ``Memory``.
        keys: Values kept of each position; each is read by every later one, at a multiply-add.
        state: Values of recurrent state, read and written by every call.
        recipe: The options it was built with, defaults included; with its class and a site, enough to build it again.
            It is recorded here, so that no subclass has to.
    """

    recurrent: ClassVar[bool] = False
    keys: int = 0
    state: int = 0
    recipe: dict[str, object]

    def __new__(cls, site: Site | None = None, *values: object, **options: object) -> Self:
        """Make the head and record its recipe; a copy is made without a site, and gets its recipe later."""
        head = super().__new__(cls)
        own = list(inspect.signature(cls.__init__).parameters.values())[2:]  # behind self and the site
        defaults = {each.name: each.default for each in own if each.default is not each.empty}
        by_place = {each.name: value for each, value in zip(own, values, strict=False)}
        head.recipe = {**defaults, **by_place, **options}
        return head

    def flops(self) -> int:
        """Floating-point operations of one position that has none before it; the output matrix is not counted.

        Two for each weight of a matrix or a convolution. A head that computes anything else of size adds it.
        """
        return 2 * sum(weight.numel() for weight in self.read_weights() if weight.ndim > 1)

    def read_weights(self) -> Iterator[Tensor]:
        """What every call reads, beside the output matrix."""
        return iter(self.parameters())


class Lens(ExitHead):
    """Says *which* token: translates a hidden state into the space the output matrix reads.

    Attributes:
        last_blocks: How many of the backbone's last blocks it runs; they count their own calls, which are charged.
        writes_last_block: True if it runs the last block on the exit's own state. A rule for skipped state then writes
            that block's state from there.
    """

    last_blocks: int = 0
    writes_last_block: ClassVar[bool] = False

    @abstractmethod
    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Residual stream to normalised states ``u_BTD``, which ``project`` reads.

        A recurrent lens reads a whole sequence from its start here.
        """

    def continued(self, h_BTD: Tensor, site: Site, memory: Memory) -> Tensor:
        """As ``translate``, behind the positions that the memory holds; a recurrent lens has it.

        It replaces the entries of ``memory.values`` (never writes into the tensors) and masks padding by
        ``memory.live(T)``. ``memory.read`` is advanced by the caller.
        """
        raise NotImplementedError(f"{type(self).__name__} says recurrent = True, so it needs a method continued")

    def project(self, u_BTD: Tensor, site: Site, tokens_C: Tensor | slice | None = None) -> Tensor:
        """Normalised states to logits by the backbone's matrix, ``[..., V]``, or ``[..., C]`` of some tokens.

        These are given by their ids, or as a slice of all ids.

        A lens with an output matrix of its own overrides this and leaves that matrix out of ``read_weights``: it is
        charged as the backbone's is.
        """
        return site.project(u_BTD, tokens_C)


class Gate(ExitHead):
    """Says *whether* leaving here is right.

    Attributes:
        asks: Names of gates of the same exit whose scores it reads.
        recent: Earlier tokens whose exits it looks at; what it says then depends on where those tokens left.
    """

    asks: Sequence[str] = ()
    recent: int = 0

    @abstractmethod
    def score(self, evidence: Evidence, memory: Memory | None = None) -> Tensor:
        """Log-odds that leaving is right, in the leading dimensions of ``evidence.hidden``.

        While decoding, the operations of a step are recorded and repeated without the gate's own Python
        (``dynamax.heads.recorded``); so it keeps nothing but its memory. ``evidence.derive`` shares what several
        gates of an exit compute alike.

        A gate that is not recurrent judges each position alone. It may read all of the evidence, such as
        ``evidence.probs`` or ``evidence.trail``; what it reads is computed then, and charged.

        A recurrent gate reads ``evidence.hidden`` of shape ``[B, T, D]``, and may read the logits of the same
        positions; there is no trail. It continues from ``memory.values`` (empty at the start), replaces its entries
        (never writes into the tensors) and masks padding by ``memory.live(T)``. ``memory.read`` is advanced by the
        caller. None means: a whole sequence from its start, nothing kept.
        """
