"""What is worth testing: which exits to ask, and thresholds by exit that mean the same at each of them.

A score of 0.9 may be right more often at one exit than at another. So an isotonic regression over the search documents
says how often a score is right, exit by exit, and one wanted share gives a threshold for each exit. All sets of exits
are tried, and the one that costs least at the bound is kept. Nothing is promised here: other documents test it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from dynamax.calibration.promise import Level, losses
from dynamax.calibration.reliability import isotonic
from dynamax.calibration.scores import Reads, Scores
from dynamax.decoding.cost import CostModel
from dynamax.engine import Engine
from dynamax.policies.base import ScorePolicy, TerminationPolicy
from dynamax.policies.combine import OnlyAt
from dynamax.types import Step, Work

PATH = 64
"""Sets of thresholds that are tried."""

WITHIN = 1e-3
"""How much surer the greatest score of an exit counts than its least, beside how often they are right."""

BEYOND = 2.0
"""The path ends where the search documents lose this many times the bound: nothing further could be promised."""

CANDIDATES = 8
"""Policies that are tested where each has to decode."""

LEAST = 0.005
"""Share of tokens unlike the full model's, on the search documents, of the surest of them."""

CONTEXT = 128
"""Positions before a token whose bytes are counted."""

NOTHING = torch.zeros(0)

ROUNDING = 1e-12

Thresholds = dict[int, float]


class Calibration:
    """How sure an exit is at a score, on one scale for all exits: how often it was right at such scores.

    The shares are those of an isotonic regression, a rising step function. Within a step, the greater score counts as
    a little surer.

    Args:
        score_N: Scores.
        right_N: Whether the exit was right.
    """

    def __init__(self, score_N: np.ndarray, right_N: np.ndarray) -> None:
        rising = isotonic(score_N, right_N)
        self.score_N = np.unique(score_N)
        self.sure_N = rising(self.score_N) + WITHIN * np.arange(len(self.score_N)) / len(self.score_N)

    def threshold(self, sure: float) -> float | None:
        """The least known score that is so sure; None if none is."""
        place = int(np.searchsorted(self.sure_N, sure, side="left"))
        return float(self.score_N[place]) if place < len(self.score_N) else None


@dataclass(frozen=True)
class Searched:
    """What a policy scores on the search documents, one behind the other.

    Attributes:
        score_EN: The policy's score at each exit.
        right_EN: Whether the exit says what the full model says.
        starts_D: Where each document begins.
        reads: What the policy read at each exit.
    """

    score_EN: np.ndarray
    right_EN: np.ndarray
    starts_D: np.ndarray
    reads: Sequence[Reads]

    @classmethod
    def of(cls, scores: Sequence[Scores]) -> Searched:
        """Of at least one document."""
        score_EN = np.concatenate([each.score_ET for each in scores], 1)
        right_EN = np.concatenate([each.right_ET for each in scores], 1)
        lengths = [each.score_ET.shape[1] for each in scores]
        return cls(score_EN, right_EN, np.cumsum([0, *lengths[:-1]]), scores[0].reads)


@dataclass(frozen=True)
class Path:
    """Exits that are asked, and thresholds by depth, the surest first."""

    exits: tuple[int, ...]
    levels: list[Thresholds]


class Way(NamedTuple):
    """Exits that are asked, thresholds by depth, and what comes of it on the search documents."""

    exits: tuple[int, ...]
    levels: Thresholds
    loss: float
    cost: float


def found(
    engine: Engine, policy: ScorePolicy, searched: Searched, epsilon: float, level: Level
) -> list[TerminationPolicy]:
    """The policies to test, the surest first; none if no exit is worth asking.

    Args:
        engine: The model with its exits, for their costs.
        policy: Whose scores these are.
        searched: The search documents.
        epsilon: The bound on the mean loss.
        level: What one loss is.
    """
    assert engine.exits is not None, "an engine with exits"
    depths, full = engine.exits.depths, CostModel(engine.backbone).full(CONTEXT).bytes
    path = best_path(
        searched,
        depths,
        epsilon,
        level,
        lambda exits: price(engine, policy, searched.reads, exits) / full,
        together=policy.reads_trail,
    )
    return [] if path is None else [asked_at(policy, depths, path.exits, levels) for levels in path.levels]


def frontier(engine: Engine, policy: ScorePolicy, searched: Searched) -> list[TerminationPolicy]:
    """Few policies that cost little for what they lose, the surest first; none if full decoding costs no more.

    For a loss that one pass does not tell, such as that of a task's score. In its place stands the share of tokens
    unlike the full model's: at each of some shares, evenly spread in their logarithm, the policy that costs least.

    Source: Pareto Testing (Laufer-Goldshtein et al. 2022, arXiv 2210.07913): what is tested in order is the frontier of
    cost and a loss on the search documents.
    """
    assert engine.exits is not None, "an engine with exits"
    depths, full = engine.exits.depths, CostModel(engine.backbone).full(CONTEXT).bytes
    paths = ways(
        searched,
        depths,
        "document",
        lambda exits: price(engine, policy, searched.reads, exits) / full,
        together=policy.reads_trail,
    )
    saving = [way for path in paths for way in path if way.cost < 1]
    worst = max((way.loss for way in saving), default=0.0)
    chosen: list[Way] = []
    for bound in np.geomspace(LEAST, max(LEAST, worst), CANDIDATES):
        within = [way for way in saving if way.loss <= bound * (1 + ROUNDING)]
        if within and (best := min(within, key=lambda way: (way.cost, way.loss))) not in chosen:
            chosen.append(best)
    return [asked_at(policy, depths, way.exits, way.levels) for way in chosen]


def asked_at(policy: ScorePolicy, depths: Sequence[int], exits: Sequence[int], levels: Thresholds) -> OnlyAt:
    """The policy at some exits (places among all) alone; one without a threshold there leaves at a score of 1."""
    asked = [depths[index] for index in exits]
    return OnlyAt(policy.at({depth: levels.get(depth, 1.0) for depth in asked}), asked)


def best_path(
    searched: Searched,
    depths: Sequence[int],
    epsilon: float,
    level: Level,
    cost_of: Callable[[Sequence[int]], np.ndarray],
    *,
    together: bool = False,
) -> Path | None:
    """The set of exits that costs least at the bound on the search documents; None if full decoding costs no more.

    Args:
        searched: The search documents.
        depths: Of the exits.
        epsilon: The bound on the mean loss.
        level: What one loss is.
        cost_of: For the places of the exits that are asked, the cost of a token by where it leaves, over that of full
            decoding; the top is last.
        together: Whether all exits are asked, since the score of one depends on the others.
    """
    best, kept = 1.0, None
    for path in ways(searched, depths, level, cost_of, together=together):
        least = min((way.cost for way in path if way.loss <= epsilon), default=1.0)
        if least < best:
            ends = next((i for i, way in enumerate(path) if way.loss > BEYOND * epsilon), len(path))
            best, kept = least, Path(path[0].exits, [way.levels for way in path[:ends]])
    return kept


def ways(
    searched: Searched,
    depths: Sequence[int],
    level: Level,
    cost_of: Callable[[Sequence[int]], np.ndarray],
    *,
    together: bool,
) -> Iterator[list[Way]]:
    """For each set of exits, thresholds from the surest down; arguments as for ``best_path``."""
    maps = [Calibration(*pair) for pair in zip(searched.score_EN, searched.right_EN, strict=True)]
    for size in range(len(depths) if together else 1, len(depths) + 1):
        for exits in combinations(range(len(depths)), size):
            cost_E = cost_of(exits)
            yield [
                Way(exits, levels, *judged(searched, depths, exits, levels, cost_E, level))
                for levels in thresholds(maps, depths, exits)
            ]


def thresholds(maps: Sequence[Calibration], depths: Sequence[int], exits: Sequence[int]) -> list[Thresholds]:
    """Thresholds by depth, the surest first, each set once; an exit that is never so sure has none."""
    path: list[Thresholds] = []
    sure = np.concatenate([maps[index].sure_N for index in exits])
    for level in np.quantile(sure, np.linspace(1.0, 0.0, PATH)):
        found = {depths[index]: maps[index].threshold(float(level)) for index in exits}
        known = {depth: score for depth, score in found.items() if score is not None}
        if known and known not in path:
            path.append(known)
    return path


def judged(
    searched: Searched,
    depths: Sequence[int],
    exits: Sequence[int],
    levels: Thresholds,
    cost_E: np.ndarray,
    level: Level,
) -> tuple[float, float]:
    """Mean loss, and mean cost of a token, of thresholds on the search documents."""
    wrong_N, place_N = departures(searched, depths, exits, levels)
    return float(losses(wrong_N, searched.starts_D, level).mean()), float(cost_E[place_N].mean())


def departures(
    searched: Searched, depths: Sequence[int], exits: Sequence[int], levels: Thresholds
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each token is wrong, and its place among the exits that are asked; the top is last."""
    limits_E1 = np.array([levels.get(depths[index], np.inf) for index in exits])[:, None]
    leave_EN = searched.score_EN[list(exits)] >= limits_E1
    place_N = np.where(leave_EN.any(0), leave_EN.argmax(0), len(exits))
    right_EN = np.concatenate([searched.right_EN[list(exits)], np.ones((1, len(place_N)), dtype=bool)])
    return ~right_EN[place_N, np.arange(len(place_N))], place_N


def price(engine: Engine, policy: ScorePolicy, reads: Sequence[Reads], exits: Sequence[int]) -> np.ndarray:
    """Bytes of a token by where it leaves, ``cost_E``, if some exits (places among all) are asked; the top is last."""
    assert engine.exits is not None, "an engine with exits"
    total, depths = engine.backbone.spec.depth, [engine.exits.depths[index] for index in exits]
    bank = engine.exits.select_gates(policy.gates, depths=depths) if depths else None
    model, costs = CostModel(engine.backbone, bank), []
    for place, leave in enumerate((*depths, total)):
        passed = [(depth, reads[index]) for depth, index in zip(depths, exits, strict=True) if depth <= leave]
        few = place < len(depths) and passed[-1][1].few  # its token is one of the candidates
        in_full = [depth for depth, read in passed if read.logits] + ([] if few else [leave])
        ran = tuple(int(index < leave) for index in range(total))
        step = Step(
            token_B=NOTHING,
            depth_B=NOTHING,
            logits_BV=NOTHING,
            logits_read=tuple((depth, 1) for depth in dict.fromkeys(in_full)),
            gates_read=tuple((depth, gate) for depth, read in passed for gate in read.gates),
            work=Work(ran, ran, (0,) * total),
            rows_read=tuple((depth, read.rows) for depth, read in passed if read.rows),
        )
        costs.append(model.step(step, CONTEXT).bytes)
    return np.array(costs)
