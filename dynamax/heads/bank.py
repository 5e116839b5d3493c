"""The heads of all exits, by depth: built, read while decoding, saved. Knows no backbone and no policy.

While decoding, a recurrent gate must read every position once and in order, also those that left
below it. Such positions reach its depth later, as debts that ride along with newer rows;
``catch_up`` reads them first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from dynamax.errors import UserError
from dynamax.heads import saved
from dynamax.heads.base import Gate, Lens
from dynamax.heads.exits import Exit, built, check_depths
from dynamax.types import Evidence, Memory, Site, Spec


class CacheView(Protocol):
    """What is read of a cache, and the memories that are kept in it."""

    filled: list[int]
    pad_B: Tensor | None
    memories: dict[tuple[int, str], Memory]

    def owed(self, depth: int) -> Tensor | None:
        """Positions that stopped at this depth, oldest first."""


class ExitBank(nn.Module):
    """The exit heads of one backbone.

    Args:
        exits: What stands at each depth (blocks completed, from 1 to the depth of the model less 1).
        sites: The place at a depth, such as ``backbone.site``.

    Attributes:
        depths: Depths that have an exit, ascending.
        recurrent_depths: Those with a recurrent gate, ascending.

    Raises:
        UserError: If there is no exit, a depth is none of the model's, repeated or not a whole number,
            or an exit has two gates of one class.
    """

    def __init__(self, exits: Mapping[int, Exit], sites: Callable[[int], Site]) -> None:
        super().__init__()
        spec = sites(1).spec
        check_depths(exits, spec.depth)
        self._width = spec.width
        self.depths = tuple(sorted(exits))
        self.exits = nn.ModuleDict({str(depth): built(exits[depth], sites(depth)) for depth in self.depths})
        self.recurrent_depths = recurrent_depths(self)

    def select_gates(self, gates: Collection[str] | None) -> ExitBank:
        """The same heads without the gates that are not named, so that recurrent ones among those are not run.

        Args:
            gates: Class names of the gates to keep; None keeps all.

        Raises:
            UserError: If a gate is named that no exit has.
        """
        if gates is None:
            return self
        there = sorted({name for depth in self.depths for name in self.gates(depth)})
        for name in gates:
            if name not in there:
                raise UserError(
                    f"The policy asks for the gate {name}, which no exit has; gates of the exits: "
                    f"{', '.join(there) or 'none'}. Name one of them in the policy (gate: NAME), or train exits with "
                    f"such a gate."
                )
        other = copy.copy(self)
        other._modules = {}
        other.exits = nn.ModuleDict(
            {
                str(depth): nn.ModuleDict(
                    {
                        "lens": self.lens(depth),
                        "gates": nn.ModuleDict({n: gate for n, gate in self.gates(depth).items() if n in gates}),
                    }
                )
                for depth in self.depths
            }
        )
        other.recurrent_depths = recurrent_depths(other)
        return other

    @property
    def recurrent(self) -> bool:
        """Whether any gate is."""
        return bool(self.recurrent_depths)

    def lens(self, depth: int) -> Lens:
        """The lens of the exit at ``depth``."""
        return cast(Lens, self._exit(depth)["lens"])

    def gates(self, depth: int) -> dict[str, Gate]:
        """The gates of the exit at ``depth``, by class name, in the order they were given."""
        return {name: cast(Gate, gate) for name, gate in cast(nn.ModuleDict, self._exit(depth)["gates"]).items()}

    def _exit(self, depth: int) -> nn.ModuleDict:
        if str(depth) not in self.exits:
            raise UserError(
                f"There is no exit at depth {depth}; there are exits at {', '.join(map(str, self.depths))}. "
                f"Ask for one of these, or add the exit and train it."
            )
        return cast(nn.ModuleDict, self.exits[str(depth)])

    def stream(self, h_BTD: Tensor) -> Tensor:
        """The residual stream alone, which gates read: rows of some backbones carry more behind it."""
        return h_BTD[..., : self._width]

    # -- while decoding ---------------------------------------------------------------------------

    def catch_up(self, depth: int, h_BTD: Tensor, cache: CacheView) -> dict[str, Tensor]:
        """Let the recurrent gates of one exit read on, up to and including the caller's rows.

        Rows that are owed at this depth and not yet read are read first, in the same chunk. Where a
        rule for skipped state has left no debts, the gates go on without the skipped rows.

        Args:
            depth: The exit.
            h_BTD: The newest positions that block ``depth - 1`` has completed.
            cache: The fill levels, debts and memories of this decoding run.

        Returns:
            Confidences ``p_BT`` of the caller's rows, for each recurrent gate.
        """
        passed, rows = cache.filled[depth - 1], h_BTD.shape[1]
        confidences: dict[str, Tensor] = {}
        for name, gate in self._recurrent(depth):
            memory = remembered(cache, depth, name)
            unread = passed - rows - memory.read
            assert unread >= 0, f"{name} at depth {depth} has read {memory.read} of {passed} positions already"
            owed_BTD = cache.owed(depth) if unread else None
            whole_BTD = h_BTD if owed_BTD is None else torch.cat([owed_BTD[:, -unread:], h_BTD], 1)
            memory.read = passed - whole_BTD.shape[1]
            confidences[name] = gate.confidence(self.stream(whole_BTD), memory)[:, -rows:]
            memory.read = passed
        return confidences

    def advance(self, depth: int, h_BTD: Tensor, cache: CacheView) -> None:
        """Let the recurrent gates of one exit read positions that skip it, as if they had come in as ``h_BTD``.

        For rules that fill skipped state, and for positions kept by a rollback, which may be none.
        """
        if h_BTD.shape[1] == 0:
            return
        for name, gate in self._recurrent(depth):
            memory = remembered(cache, depth, name)
            gate.score(self.stream(h_BTD), memory)
            memory.read += h_BTD.shape[1]

    def _recurrent(self, depth: int) -> list[tuple[str, Gate]]:
        return [(name, gate) for name, gate in self.gates(depth).items() if gate.recurrent]

    def read(
        self,
        depth: int,
        h_BTD: Tensor,
        *,
        cache: CacheView,
        total: int,
        step: int,
        trail: Sequence[Evidence],
        site: Site,
    ) -> Evidence:
        """The evidence of one exit for the newest position.

        Recurrent gates read all rows now; the lens and the other gates run when a policy asks.

        Args:
            depth: The exit.
            h_BTD: The newest positions that block ``depth - 1`` has completed; evidence is of the last.
            cache: As in ``catch_up``.
            total: Blocks of the backbone.
            step: Tokens generated before this one.
            trail: Evidence of the step's earlier exits.
            site: The place, with the cache behind its last block.
        """
        known = self.catch_up(depth, h_BTD, cache)
        newest_B1D = h_BTD[:, -1:]

        def confidence(name: str, gate: Gate) -> Callable[[], Tensor]:
            if name in known:
                return lambda: known[name][:, -1]
            return lambda: gate.confidence(self.stream(newest_B1D))[:, 0]

        def logits() -> Tensor:
            return site.project(self.lens(depth).translate(newest_B1D, site))[:, 0]

        gates = {name: confidence(name, gate) for name, gate in self.gates(depth).items()}
        hidden_BD = self.stream(newest_B1D)[:, 0]
        return Evidence(depth, total, step, hidden_BD, logits=logits, gates=gates, trail=trail)

    # -- on disk ----------------------------------------------------------------------------------

    def save(self, folder: str | Path, spec: Spec) -> None:
        """Write ``heads.safetensors`` and ``heads.json``, whole or not at all.

        Args:
            folder: Where to; made if it is missing.
            spec: The backbone the heads belong to.
        """
        saved.write(Path(folder), self.record(spec), self.state_dict())

    def record(self, spec: Spec) -> dict[str, Any]:
        """What ``save`` writes beside the weights: the backbone, and class and options of each head by depth."""
        return saved.record(spec, {d: (self.lens(d), list(self.gates(d).values())) for d in self.depths})

    @classmethod
    def load(cls, folder: str | Path, sites: Callable[[int], Site]) -> Self:
        """The bank that ``save`` wrote, in the precision it was saved in, on the CPU.

        Raises:
            UserError: If the files are missing or damaged, belong to another backbone, or hold a head whose
                class is unknown or has changed.
        """
        record, tensors = saved.read(Path(folder), sites(1).spec)
        exits = {}
        for depth, (lens, gates) in saved.recipes(record).items():
            exits[depth] = Exit(cast(Callable[[Site], Lens], lens), cast(list[Callable[[Site], Gate]], gates))
        bank = cls(exits, sites)
        try:
            bank.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise UserError(
                f"The heads in {folder} do not fit their classes: {error}. A class has changed since they were saved. "
                f"Train them again, or install the version that saved them."
            ) from error
        return bank


def remembered(cache: CacheView, depth: int, name: str) -> Memory:
    """The memory of one head in this decoding run; empty at first."""
    return cache.memories.setdefault((depth, name), Memory(pad_B=cache.pad_B))


def recurrent_depths(bank: ExitBank) -> tuple[int, ...]:
    """Depths at which a gate of the bank is recurrent."""
    return tuple(depth for depth in bank.depths if any(gate.recurrent for gate in bank.gates(depth).values()))
