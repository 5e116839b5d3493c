"""What exits say along known texts, where that makes a policy leave, and what it costs. Knows no training.

With exact state, leaving early changes nothing for later positions, so all of this is read off stored states. A
position that left is owed to the blocks above, which read it in one call with the next position that comes by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax.backbones.base import Backbone
from dynamax.data.batch import HiddenBatch
from dynamax.decoding.cost import FREE, Cost, CostModel
from dynamax.heads.bank import ExitBank
from dynamax.objectives.base import ExitReader, counted, in_top_k
from dynamax.types import Site, Step, Work


@dataclass(frozen=True)
class Readings:
    """What E exits said at N positions, document after document, in order.

    Attributes:
        depths: Of the exits, ascending.
        total: Blocks of the backbone.
        right_EN: Whether each exit's token is the full model's.
        confidence: Of each gate by name, ``[E, N]``.
        document_N: Which document a position belongs to.
        origin_N: Hash of what the document goes back to.
        context_N: Positions before each.
    """

    depths: tuple[int, ...]
    total: int
    right_EN: Tensor
    confidence: Mapping[str, Tensor]
    document_N: Tensor
    origin_N: Tensor
    context_N: Tensor

    def part(self, chosen_N: Tensor) -> Readings:
        """Some of the positions, of whole documents."""
        return Readings(
            self.depths,
            self.total,
            self.right_EN[:, chosen_N],
            {name: said_EN[:, chosen_N] for name, said_EN in self.confidence.items()},
            self.document_N[chosen_N],
            self.origin_N[chosen_N],
            self.context_N[chosen_N],
        )

    def halves(self) -> tuple[Readings, Readings]:
        """Documents of every other origin, and the rest."""
        origins, place_N = self.origin_N.unique(return_inverse=True)
        if len(origins) < 2:
            raise ValueError(
                f"The held-out documents go back to {len(origins)} prompt; halves need two. Raise --validation."
            )
        return self.part(place_N % 2 == 0), self.part(place_N % 2 == 1)

    def depth(self, stop_N: Tensor) -> Tensor:
        """Blocks completed where a position stops at exit ``stop_N``; E is the top."""
        return torch.tensor([*self.depths, self.total])[stop_N]

    def agreed(self, stop_N: Tensor) -> Tensor:
        """Whether the token said where a position stops is the full model's."""
        top_1N = torch.ones_like(self.right_EN[:1])
        return torch.cat([self.right_EN, top_1N]).gather(0, stop_N[None])[0]


@torch.inference_mode()
def read(bank: ExitBank, sites: Mapping[int, Site], batches: Iterable[HiddenBatch]) -> Readings:
    """Ask all exits about the documents of ``batches``.

    The first position that counts, the prompt's last, is left out: decoding decides it at the top.
    """
    reader = ExitReader("lens", in_top_k(1))
    right: list[list[Tensor]] = []
    said: dict[str, list[list[Tensor]]] = {name: [] for name in bank.gates(bank.depths[0])}
    places: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        counted_BT = counted(batch)
        asked_BT = counted_BT & (counted_BT.cumsum(1) > 1)
        right.append([reader(bank, batch, sites[depth])[asked_BT[counted_BT]] for depth in bank.depths])
        evidence = bank.known_texts(batch.hidden, sites, asked_BT, batch.text)
        for name, parts in said.items():
            parts.append([evidence[depth].confidence(name).float() for depth in bank.depths])
        row_N, context_N = asked_BT.nonzero(as_tuple=True)
        places.append((batch.documents_B[row_N], batch.origins_B[row_N], context_N))
    return Readings(
        bank.depths,
        next(iter(sites.values())).spec.depth,
        _joined(right),
        {name: _joined(parts) for name, parts in said.items()},
        *(torch.cat(column) for column in zip(*places, strict=True)),
    )


def _joined(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.cat(column) for column in zip(*parts, strict=True)])


# -- where a position stops ------------------------------------------------------------------------


def first(leaves_EN: Tensor) -> Tensor:
    """The first exit at which each position leaves, ``stop_N``; E, the top, where it leaves at none."""
    top_1N = torch.ones_like(leaves_EN[:1])
    return torch.cat([leaves_EN, top_1N]).int().argmax(0)


def always(readings: Readings, exit_: int) -> Tensor:
    """Every position stops at one exit."""
    return torch.full_like(readings.document_N, exit_)


def oracle(readings: Readings, consistency: float) -> Tensor:
    """The least depth that any gate over these lenses could reach at a consistency.

    A position stops at the first exit that is right. Of those that would climb highest, as many as the consistency
    allows to be wrong stop at the first exit instead.
    """
    stop_N = first(readings.right_EN)
    spare = int((1.0 - consistency) * len(stop_N) + 1e-9)
    stop_N[stop_N.argsort(descending=True, stable=True)[:spare]] = 0
    return stop_N


# -- what it costs ---------------------------------------------------------------------------------


class Ledger:
    """Costs of steps that stop where they stop, state being exact; the heads asked and the output matrix included.

    Args:
        backbone: The model.
        bank: Its exits.
        gate: The gate that decides, by name; None for none.
    """

    def __init__(self, backbone: Backbone, bank: ExitBank, gate: str | None) -> None:
        self.depths = (*bank.depths, backbone.spec.depth)
        self.gate = gate
        self.costs = CostModel(backbone, bank.select_gates(() if gate is None else (gate,)))
        self._steps: dict[tuple[int, tuple[int, ...], int], Cost] = {}
        self._full: dict[int, Cost] = {}

    def charge(self, readings: Readings, stop_N: Tensor) -> tuple[Cost, Cost]:
        """The sum over all positions, and the full model's."""
        spent, full = FREE, FREE
        waiting, last = [0] * len(self.depths), None
        columns = (readings.document_N.tolist(), stop_N.tolist(), readings.context_N.tolist())
        for document, stop, context in zip(*columns, strict=True):
            if document != last:
                waiting, last = [0] * len(self.depths), document
            rows = tuple(1 + owed for owed in waiting[: stop + 1])
            waiting = [0] * len(rows) + [1 + owed for owed in waiting[stop + 1 :]]
            spent += self.step(stop, rows, context)
            full += self.full(context)
        return spent, full

    def full(self, context: int) -> Cost:
        """One token of the full model."""
        if context not in self._full:
            self._full[context] = self.costs.full(context)
        return self._full[context]

    def step(self, stop: int, rows: tuple[int, ...], context: int) -> Cost:
        """One step that stops at an exit (the last is the top).

        Args:
            stop: Number of the exit.
            rows: Positions read by the blocks up to each exit passed.
            context: Positions before this one.
        """
        key = (stop, rows, context)
        if key not in self._steps:
            self._steps[key] = self.costs.step(self._step(stop, rows), context)
        return self._steps[key]

    def _step(self, stop: int, rows: tuple[int, ...]) -> Step:
        depth, total = self.depths[stop], self.depths[-1]
        held, start = [], 0
        for read_, end in zip(rows, self.depths, strict=False):
            held += [read_] * (end - start)
            start = end
        above = [0] * (total - depth)
        work = Work((*[1] * depth, *above), (*held, *above), (0,) * total)
        asked = () if self.gate is None else tuple((d, self.gate) for d in self.depths[:-1] if d <= depth)
        return Step(torch.empty(0), torch.tensor([depth]), torch.empty(0), ((depth, 1),), asked, work)
