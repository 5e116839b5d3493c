"""Rules for the state of skipped blocks: what becomes of it when a position leaves early.

``Exact`` owes the position to the blocks above, which read it together with a later one; the other rules are the
approximations of the papers. Knows backbones and caches, no heads: the caller lets the gates above read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.backbones.cache import AnyCache, Cache
from dynamax.backbones.state import KeyValueState
from dynamax.errors import UserError


class SkippedState(ABC):
    """What becomes of the state of blocks ``[depth, L)`` when positions leave at ``depth``.

    Attributes:
        exact: True if the state is what full decoding of the same tokens leaves.
        copies_keys: True if the rule is about keys and values, which recurrent blocks have none of.
        any_row: True if it also works where each row of a batch stands at a position of its own.
        gates_read_exit: True if gates above read the exit's hidden state in place of their own.
    """

    exact: ClassVar[bool] = False
    copies_keys: ClassVar[bool] = False
    any_row: ClassVar[bool] = False
    gates_read_exit: ClassVar[bool] = False

    def validate(self, backbone: Backbone) -> None:
        """Refuse a backbone that the rule cannot be applied to.

        Raises:
            UserError: If keys would be copied and a block keeps a recurrent state.
        """
        recurrent = [index for index in range(backbone.spec.depth) if "recurrent" in backbone.state_kinds(index)]
        if self.copies_keys and recurrent:
            raise UserError(
                f"The rule {type(self).__name__} copies keys and values, but {len(recurrent)} of the "
                f"{backbone.spec.depth} blocks of this {backbone.spec.family} keep a recurrent state. "
                f"Use Exact, Propagate or Skip."
            )

    @abstractmethod
    def leave(self, backbone: Backbone, cache: AnyCache, depth: int, h_BTD: Tensor, *, last_block_ran: bool) -> None:
        """Positions ``h_BTD`` leave after ``depth`` blocks.

        Args:
            backbone: The backbone whose blocks are skipped.
            cache: Its state.
            depth: Blocks completed.
            h_BTD: The residual stream there.
            last_block_ran: True if the exit's lens has run the last block (DYNAMAX): that block's keys
                and values are then the ones it computed from ``h_BTD``, whatever the rule.
        """


class Exact(SkippedState):
    """Owe the positions: deeper blocks read them in one chunk with the next position that comes by."""

    exact = True
    any_row = True

    def leave(self, backbone: Backbone, cache: AnyCache, depth: int, h_BTD: Tensor, *, last_block_ran: bool) -> None:
        """Owe the positions at ``depth``; a last block that ran for the lens kept nothing."""
        cache.owe(depth, h_BTD)


class Approximation(SkippedState):
    """A rule that fills the state of skipped blocks at once, one block after the other."""

    def leave(self, backbone: Backbone, cache: AnyCache, depth: int, h_BTD: Tensor, *, last_block_ran: bool) -> None:
        """Fill the state of the blocks above; a last block that ran for the lens is written from what it read."""
        top = backbone.spec.depth - 1 if last_block_ran else backbone.spec.depth
        for block in range(depth, top):
            self.fill(backbone, cache, block, h_BTD)
        for block in range(top, backbone.spec.depth):
            backbone.write(h_BTD, block, cache)

    @abstractmethod
    def fill(self, backbone: Backbone, cache: AnyCache, block: int, h_BTD: Tensor) -> None:
        """Bring the state of one skipped block past the positions ``h_BTD``."""


class Propagate(Approximation):
    """Keys and values, or window and recurrent state, from the exit's hidden state, by each block's own projections.

    Source: CALM (arXiv 2207.07061); DYNAMAX's "recompute".
    """

    any_row = True
    gates_read_exit = True

    def fill(self, backbone: Backbone, cache: AnyCache, block: int, h_BTD: Tensor) -> None:
        """Write the block's state as if ``h_BTD`` had come in here."""
        backbone.write(h_BTD, block, cache)


class CopyToken(Approximation):
    """Each skipped block repeats its own keys and values of the previous token, keys turned to the new position.

    Source: the code that DYNAMAX's authors published.
    """

    copies_keys = True

    def fill(self, backbone: Backbone, cache: AnyCache, block: int, h_BTD: Tensor) -> None:
        """Append the last position's keys and values, once for each position of ``h_BTD``."""
        cache = in_step(cache)
        keys, at = keys_of(cache, block), cache.filled[block]
        keys.reserve(at + h_BTD.shape[1])
        for position in range(at, at + h_BTD.shape[1]):
            k_BHTD, v_BHTD = keys.read(position - 1, position)
            keys.write(*backbone.shift(k_BHTD, v_BHTD, block), position)
        cache.filled[block] += h_BTD.shape[1]


class CopyLayer(Approximation):
    """Each skipped block takes the previous block's keys and values of the same token.

    Source: DYNAMAX as others describe it.
    """

    copies_keys = True

    def fill(self, backbone: Backbone, cache: AnyCache, block: int, h_BTD: Tensor) -> None:
        """Append the keys and values that the block below holds for these positions."""
        cache = in_step(cache)
        keys, at = keys_of(cache, block), cache.filled[block]
        stop = at + h_BTD.shape[1]
        keys.reserve(stop)
        keys.write(*keys_of(cache, block - 1).read(at, stop), at)
        cache.filled[block] = stop


class Skip(Approximation):
    """State left as it is: no later position attends to the skipped ones, and a recurrent state never saw them.

    Source: DYNAMAX's "no recompute" on Mamba.
    """

    def fill(self, backbone: Backbone, cache: AnyCache, block: int, h_BTD: Tensor) -> None:
        """Leave holes, and nothing in a recurrent state."""
        cache = in_step(cache)
        cache.states[block].skip(cache.filled[block], h_BTD.shape[1])
        cache.filled[block] += h_BTD.shape[1]


def in_step(cache: AnyCache) -> Cache:
    """The cache of a batch whose rows go in step, which is what most rules work on."""
    assert isinstance(cache, Cache), "a rule that does not say any_row is never given another"
    return cache


def keys_of(cache: Cache, block: int) -> KeyValueState:
    """Keys and values of a block that has them."""
    keys = cache.states[block].keys
    assert keys is not None, "the rule has been validated against the backbone"
    return keys
