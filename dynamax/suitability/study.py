"""How early a model knows its next token, read by two lenses without training, and what that could save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynamax.calibration.scores import split
from dynamax.data.text import Document
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.objectives.ridge import RidgeLens
from dynamax.suitability.prices import LENSES, Lens, Price, counted, timed

PENALTY = 0.03
"""Of the ridge lenses."""
WORTH = 0.05
"""Least share of a full token's cost that is worth saving."""
BOUND = 0.15
"""Least share that a perfect gate must save before training is worth a try: real gates save a part of that."""
LOGITS = 1 << 25
"""Logits that are held at a time."""


@dataclass(frozen=True)
class Reading:
    """What a lens says at one depth, on the held-out positions.

    Attributes:
        agreement: Share of positions at which it says the top's token.
        leaves: Largest share that leaves by a threshold on MaxProb while the wanted share of all tokens stays the
            top's. The threshold is chosen on these same positions, which flatters a little.
    """

    agreement: float
    leaves: float


@dataclass(frozen=True)
class Row:
    """One depth: what each lens says there, and prices in bytes, and in time if it was measured."""

    depth: int
    readings: dict[Lens, Reading]
    bytes: Price
    time: Price | None

    @property
    def price(self) -> Price:
        """In time if it was measured."""
        return self.time or self.bytes

    def saves_by_threshold(self, lens: Lens) -> float:
        """What MaxProb would save at this exit alone, the lens read at all tokens; below 0 if it costs more."""
        return self.readings[lens].leaves * self.price.saves - self.price.asks(lens)

    def saves_by_gate(self, lens: Lens) -> float:
        """The same of a gate that is as sure as MaxProb and costs nothing: the lens is read by tokens that leave."""
        return self.readings[lens].leaves * (self.price.saves - self.price.asks(lens))


@dataclass(frozen=True)
class Oracle:
    """A perfect gate at every depth that costs nothing: each token leaves at the first depth where the lens is right.

    Attributes:
        depth: Mean of these depths; that of the top where the lens is right at none.
        saves: Share of the cost that it saves.
    """

    depth: float
    saves: float


@dataclass(frozen=True)
class Study:
    """What was found.

    Attributes:
        blocks: Of the model.
        documents: For fitting, and held out.
        positions: The same in positions.
        keep: Share of tokens that are to stay the top's.
        rows: One a depth.
        oracle: By lens.
    """

    blocks: int
    documents: tuple[int, int]
    positions: tuple[int, int]
    keep: float
    rows: list[Row]
    oracle: dict[Lens, Oracle]

    @property
    def threshold(self) -> tuple[Row, Lens]:
        """The exit, and its lens, at which a threshold on MaxProb saves most."""
        return max(
            ((row, lens) for row in self.rows for lens in LENSES), key=lambda at: at[0].saves_by_threshold(at[1])
        )

    @property
    def gate(self) -> tuple[Row, Lens]:
        """The exit, and its lens, at which a gate saves most."""
        return max(((row, lens) for row in self.rows for lens in LENSES), key=lambda at: at[0].saves_by_gate(at[1]))

    @property
    def verdict(self) -> Literal["yes", "only when tuned", "no"]:
        """``yes`` if a gate as sure as MaxProb saves enough, ``only when tuned`` if a perfect gate would."""
        row, lens = self.gate
        if row.saves_by_gate(lens) >= WORTH:
            return "yes"
        return "only when tuned" if max(each.saves for each in self.oracle.values()) >= BOUND else "no"


@torch.inference_mode()
def study(
    engine: Engine,
    documents: Sequence[Document],
    *,
    keep: float = 0.98,
    every: int = 1,
    share: float = 0.5,
    measure: bool = False,
    progress: Callable[[Iterable[Document], str], Iterable[Document]] = lambda parts, label: parts,
) -> Study:
    """Fit ridge lenses on some documents, and read all depths of the others.

    Args:
        engine: The model; its exits are not read.
        documents: Texts; of each, positions behind the one that the prompt's own pass decides. Those of one origin stay
            together.
        keep: Share of tokens that are to stay the top's, in (0, 1).
        every: Read each ``every``-th depth.
        share: Part of the documents' origins, in (0, 1), that lenses are fitted on.
        measure: Whether to time the model here, beside counting bytes.
        progress: Wraps what is gone through, with a label.

    Raises:
        UserError: If an option is out of range, or there are too few documents.
    """
    backbone, total = engine.backbone, engine.backbone.spec.depth
    for name, value in {"keep": keep, "share": share}.items():
        if not 0 < value < 1:
            raise UserError(f"suitability was given {name} {value}; it must lie between 0 and 1. Change it.")
    if not 1 <= every < total:
        raise UserError(
            f"suitability was given every {every}; wanted: 1 to {total - 1}, as the model has {total} blocks."
        )
    depths = range(every, total, every)
    fitting, held = split(documents, [document.origin for document in documents], share)
    lenses = {depth: RidgeLens(backbone.spec.width, PENALTY, engine.device) for depth in depths}
    for states in normed_states(engine, progress(fitting, "fit"), depths):
        for depth, lens in lenses.items():
            lens.add(states[depth], states[total])
    known = lenses[depths[0]].count
    maps = {depth: lens.solve() for depth, lens in lenses.items()} if known else {}
    found: dict[tuple[Lens, int], list[Tensor]] = {}
    for states in normed_states(engine, progress(held, "read"), depths) if known else ():
        top_N = said(engine, states[total])[0]
        for depth, (a_DD, b_D) in maps.items():
            u_ND = states[depth]
            mapped_ND = (u_ND.double() @ a_DD + b_D + u_ND).to(u_ND.dtype)
            for lens, read_ND in zip(LENSES, (u_ND, mapped_ND), strict=True):
                token_N, prob_N = said(engine, read_ND)
                found.setdefault((lens, depth), []).append(torch.stack([token_N == top_N, prob_N]).cpu())
    if not found:
        raise UserError(
            f"suitability was given {len(documents)} documents: {len(fitting)} to fit lenses on, {len(held)} to read, "
            f"and in one of these parts there is no answer of two tokens. Give more documents, of more prompts."
        )
    scored = {key: torch.cat(parts, 1).unbind() for key, parts in found.items()}
    right: dict[Lens, Tensor] = {lens: torch.stack([scored[lens, depth][0] for depth in depths]) for lens in LENSES}
    prices, times = counted(backbone, depths), timed(backbone, depths) if measure else {}
    rows = []
    for depth in depths:
        readings: dict[Lens, Reading] = {}
        for lens in LENSES:
            right_N, prob_N = scored[lens, depth]
            readings[lens] = Reading(float(right_N.mean()), leaves(right_N, prob_N, keep))
        rows.append(Row(depth, readings, prices[depth], times.get(depth)))
    return Study(
        blocks=total,
        documents=(len(fitting), len(held)),
        positions=(known, right["logit"].shape[1]),
        keep=keep,
        rows=rows,
        oracle={lens: oracle(right_DN, rows, lens, total) for lens, right_DN in right.items()},
    )


def normed_states(engine: Engine, documents: Iterable[Document], depths: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Normed states ``u_ND`` of each document by depth, the top among them, at the positions that exits may decide."""
    backbone = engine.backbone
    for document in documents:
        first = max(1, document.prompt)  # the position before it is decided by the prompt's own pass
        if len(document.tokens) - 1 > first:
            tokens_1T = torch.tensor([document.tokens[:-1]], device=engine.device)
            walk = backbone.walk(backbone.embed(tokens_1T), [*depths, backbone.spec.depth])
            yield {depth: backbone.normalize(h_1TD[:, first:])[0] for depth, h_1TD in walk}


def said(engine: Engine, u_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The token that normed states say, and its probability, ``N`` each."""
    tokens, probs = [], []
    for part_ND in u_ND.split(max(1, LOGITS // engine.backbone.spec.vocab)):
        logits_NV = engine.backbone.project(part_ND[None])[0]
        most_N, token_N = logits_NV.max(-1)
        tokens.append(token_N)
        probs.append((most_N - logits_NV.logsumexp(-1)).exp())
    return torch.cat(tokens), torch.cat(probs)


def leaves(right_N: Tensor, score_N: Tensor, keep: float) -> float:
    """Largest share that a threshold lets leave with at most ``1 - keep`` of all positions leaving wrong."""
    order_N = score_N.argsort(descending=True)
    wrong_N = (1 - right_N[order_N]).cumsum(0)
    ends_N = torch.ones(len(score_N), dtype=torch.bool)  # equal scores leave together
    ends_N[:-1] = score_N[order_N].diff() != 0
    fits_N = (ends_N & (wrong_N <= (1 - keep) * len(score_N) + 1e-9)).nonzero()
    return (int(fits_N[-1]) + 1) / len(score_N) if len(fits_N) else 0.0


def oracle(right_DN: Tensor, rows: Sequence[Row], lens: Lens, total: int) -> Oracle:
    """Where each position leaves if it leaves as soon as the lens is right."""
    depth_D = torch.tensor([*(row.depth for row in rows), total], dtype=torch.float64)
    saves_D = torch.tensor([*(row.price.saves - row.price.asks(lens) for row in rows), 0.0], dtype=torch.float64)
    first_N = torch.cat([right_DN, torch.ones(1, right_DN.shape[1])]).argmax(0)
    return Oracle(float(depth_D[first_N].mean()), float(saves_D[first_N].mean()))
