"""Where a chunk stands: positions, rotary angles, attention masks. Knows windows, not families.

In a batch that goes in step, a start, a length and the padding determine everything (``StepPlan``). Where rows stand at
positions of their own, see ``ragged``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import final

import torch
from torch import Tensor

Rotary = Callable[[Tensor, Tensor, str | None], tuple[Tensor, Tensor]]
"""``(h_BTD, positions_BT, kind) -> (cos, sin)``; only the dtype and the device of ``h_BTD`` matter."""

AHEAD = 64
"""Positions whose angles are worked out at once, at least."""


@final
class AngleTable:
    """Rotary angles of the positions of one run without padding, worked out for many positions at once.

    A chunk of one position takes as many operations for its angles as one of a hundred, and an owed position would
    have its angles made again.

    Args:
        rotary: The model's.
        context: Positions that it accepts; no angle is asked for beyond, since some models then change them all.

    Attributes:
        context: The same.
    """

    def __init__(self, rotary: Rotary, context: int) -> None:
        self._rotary, self.context = rotary, context
        self._known: dict[tuple[str | None, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def span(self, like: Tensor, start: int, stop: int, kind: str | None) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions ``[start, stop)``, ``[1, T, R]``; dtype and device as for ``Rotary``."""
        key = kind, like.dtype, like.device
        if key not in self._known or self._known[key][0].shape[1] < stop:
            size = max(stop, min(2 * stop, stop + 16 * AHEAD, self.context), min(AHEAD, self.context))
            self._known[key] = self._rotary(like, torch.arange(size, device=like.device)[None], kind)
        cos, sin = self._known[key]
        return cos[:, start:stop], sin[:, start:stop]


class Plan(ABC):
    """What the host prepares for one chunk; all blocks that the chunk passes share it.

    Args:
        like: The chunk ``h_BTD``; gives rows, length, dtype and device.
        additive: True where attention adds its mask (eager), False where it takes booleans (sdpa).
        rotary: ``(h_BTD, positions_BT, kind) -> (cos, sin)``, or None for a model without.
        slopes: Of ALiBi, ``[H]``: what a score loses for each position between. Such masks are additive. None without.

    Attributes:
        rows: Rows of the batch.
        length: Positions of the chunk.
        place: Where the chunk stands: of two chunks of the same shape, those at the same place have the same plan.
    """

    place: Hashable

    def __init__(self, like: Tensor, *, additive: bool, rotary: Rotary | None, slopes: Tensor | None = None) -> None:
        self.rows, self.length = like.shape[:2]
        self._like = like.new_empty(0)
        self._additive = additive
        self._rotary = rotary
        self._slopes = slopes
        self._angles: dict[str | None, tuple[Tensor, Tensor]] = {}

    @cached_property
    def positions_BT(self) -> Tensor:
        """Position ids, counted from each row's first token. Shape [1 or B, T]."""
        return self.make_positions()

    @cached_property
    def live_BT(self) -> Tensor | None:
        """False on padding; None if nothing is padded."""
        return self.make_live()

    @abstractmethod
    def make_positions(self) -> Tensor:
        """See ``positions_BT``."""

    @abstractmethod
    def make_live(self) -> Tensor | None:
        """See ``live_BT``."""

    @final
    def angles(self, kind: str | None = None) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of the rotary embedding, for one kind of layer; None for a model without."""
        if self._rotary is None:
            return None
        if kind not in self._angles:
            self._angles[kind] = self.make_angles(self._rotary, kind)
        return self._angles[kind]

    def make_angles(self, rotary: Rotary, kind: str | None) -> tuple[Tensor, Tensor]:
        """See ``angles``."""
        return rotary(self._like, self.positions_BT, kind)

    @final
    def as_mask(self, seen_BHTK: Tensor, between: Tensor) -> Tensor:
        """A boolean mask (True: may attend) in the form that attention takes.

        Args:
            seen_BHTK: The mask, ``[1 or B, 1, T, K]``.
            between: Positions from each key to each row, of a shape that goes with the mask's; for ALiBi.
        """
        if not self._additive and self._slopes is None:
            return seen_BHTK
        least = max(torch.finfo(self._like.dtype).min, torch.finfo(torch.float32).min) / 2  # a score may be added
        if self._slopes is None:
            return torch.zeros_like(seen_BHTK, dtype=self._like.dtype).masked_fill(~seen_BHTK, least)
        bias_BHTK = self._slopes[:, None, None] * -between.to(self._slopes.dtype)
        return bias_BHTK.to(self._like.dtype).masked_fill(~seen_BHTK, least)


@final
class StepPlan(Plan):
    """A chunk at positions ``[start, start + length)`` of every row.

    Args:
        like: As for ``Plan``.
        start: Position of the first row of the chunk, padding counted.
        pad_B: Padding positions at the left of each row, or None.
        additive: As for ``Plan``.
        rotary: As for ``Plan``.
        past: Keys held from before the chunk; ``start`` unless positions are owed.
        table: Angles of a run without padding; None to work out those of this chunk alone.
        slopes: As for ``Plan``.

    Attributes:
        key: Positions, dtype and device: two plans of one run with equal keys are the same.
    """

    def __init__(
        self,
        like: Tensor,
        start: int,
        pad_B: Tensor | None = None,
        *,
        additive: bool = False,
        rotary: Rotary | None = None,
        past: int | None = None,
        table: AngleTable | None = None,
        slopes: Tensor | None = None,
    ) -> None:
        super().__init__(like, additive=additive, rotary=rotary, slopes=slopes)
        self.start = start
        self.past = self.place = start if past is None else past
        self.pad_B = pad_B
        self._table = table if pad_B is None else None
        self.key = (self.start, self.length, self.past, like.dtype, like.device)
        self._masks: dict[tuple[int | None, frozenset[int]], Tensor] = {}

    def make_positions(self) -> Tensor:
        """0 on padding."""
        rows_1T = torch.arange(self.start, self.start + self.length, device=self._like.device)[None]
        return rows_1T if self.pad_B is None else (rows_1T - self.pad_B[:, None]).clamp_min(0)

    def make_live(self) -> Tensor | None:
        """False on padding at the left."""
        if self.pad_B is None:
            return None
        rows_T = torch.arange(self.start, self.start + self.length, device=self._like.device)
        return rows_T >= self.pad_B[:, None]

    def make_angles(self, rotary: Rotary, kind: str | None) -> tuple[Tensor, Tensor]:
        """From the run's table, where there is one."""
        if self._table is None:
            return super().make_angles(rotary, kind)
        return self._table.span(self._like, self.start, self.start + self.length, kind)

    def first_key(self, window: int | None) -> int:
        """The oldest position that a row of the chunk may attend to; of keys held, those from there on are read."""
        return 0 if window is None else min(max(self.start - window + 1, 0), self.past)

    def mask(self, window: int | None, holes: frozenset[int] = frozenset()) -> Tensor | None:
        """Attention mask over the keys from ``first_key(window)`` on, or None where none is needed.

        Args:
            window: Positions each row sees, its own included; None for all.
            holes: Positions whose keys were never written and must not be seen.

        Returns:
            Booleans (True: may attend) or additive floats, shape [1 or B, 1, T, K]; with ALiBi [1 or B, H, T, K].
        """
        if self.pad_B is None and not holes and self._slopes is None:
            whole = self.start == 0 and (window is None or self.length <= window)
            if self.length == 1 or (whole and not self._additive):
                return None
        key = (window, holes)
        if key in self._masks:
            return self._masks[key]
        device = self._like.device
        rows_T = torch.arange(self.start, self.start + self.length, device=device)
        if self.past == self.start:
            keys_K = torch.arange(self.first_key(window), self.start + self.length, device=device)
        else:
            keys_K = torch.cat([torch.arange(self.first_key(window), self.past, device=device), rows_T])
        seen_TK = keys_K[None] <= rows_T[:, None]
        if window is not None:
            seen_TK &= keys_K[None] > rows_T[:, None] - window
        if holes:
            seen_TK &= ~torch.isin(keys_K, torch.tensor(sorted(holes), device=device))[None]
        mask = seen_TK[None, None]
        if self.pad_B is not None:
            mask = mask & (keys_K[None] >= self.pad_B[:, None])[:, None, None]
        mask = self.as_mask(mask, rows_T[:, None] - keys_K)
        self._masks[key] = mask
        return mask
