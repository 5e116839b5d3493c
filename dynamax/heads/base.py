"""What an exit head is. A head is told of its site and never sees a backbone, a cache or a policy."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import ClassVar, Self

from torch import Tensor, nn

from dynamax.types import Evidence, Memory, Site


class ExitHead(nn.Module, ABC):
    """A small network at one depth. A subclass takes ``site`` first, then its own options.

    Attributes:
        recurrent: True if what it says of a position depends on the positions before. Such a head
            reads every position, in order, and remembers through ``Memory``.
        recipe: The options it was built with, defaults filled in; with its class and a site, enough
            to build it again. Recorded here, so that no subclass has to.
    """

    recurrent: ClassVar[bool] = False
    recipe: dict[str, object]

    def __new__(cls, *args: object, **options: object) -> Self:
        """Make the head and record its recipe."""
        head = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        given = signature.bind_partial(head, *args, **options)  # partial: copying makes heads without a site
        given.apply_defaults()
        head.recipe = {}
        for name in list(signature.parameters)[2:]:  # behind self and the site
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                head.recipe |= given.arguments[name]
            elif name in given.arguments:
                head.recipe[name] = given.arguments[name]
        return head

    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations of a position with none before it, two to a multiply-add; no output matrix."""


class Lens(ExitHead):
    """Says *which* token: translates a hidden state into the space the output matrix reads.

    Attributes:
        runs_last_block: True if it runs the backbone's last block, which is then charged to it.
    """

    runs_last_block: ClassVar[bool] = False

    @abstractmethod
    def translate(self, h_BTD: Tensor, site: Site) -> Tensor:
        """Residual stream to normalised states ``u_BTD``; the logits are ``site.project(u_BTD)``."""


class Gate(ExitHead):
    """Says *whether*: is leaving here right?

    A recurrent gate tells what its memory holds of one row, so that reading and writing it is charged.

    Attributes:
        keys: Values kept of each position; each is read by every later one, at a multiply-add.
        state: Values of recurrent state, read and written by every call.
    """

    keys: int = 0
    state: int = 0

    @abstractmethod
    def score(self, evidence: Evidence, memory: Memory | None = None) -> Tensor:
        """Log-odds that leaving is right, in the leading dimensions of ``evidence.hidden``.

        A gate that is not recurrent judges each position alone. It may read all of the evidence, such as
        ``evidence.probs`` or ``evidence.trail``; what it reads is computed then, and charged.

        A recurrent gate reads ``evidence.hidden`` of shape ``[B, T, D]``, and may read the logits of the same
        positions; there is no trail. It continues from ``memory.values`` (empty at the start), replaces its entries
        (never writes into the tensors) and masks padding by ``memory.live(T)``. ``memory.read`` is advanced by the
        caller. None means: a whole sequence from its start, nothing kept.
        """
