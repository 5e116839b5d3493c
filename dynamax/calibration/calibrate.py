"""From documents to a policy with a promise: search on some of them, test on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dynamax.calibration.promise import Level, Promise, losses
from dynamax.calibration.risk import Method, documents_needed, promised
from dynamax.calibration.scores import Outcome, Scores, decided, fingerprint, outcome, scored, split, texts
from dynamax.calibration.search import Searched, found
from dynamax.data.text import Document
from dynamax.decoding.early_exit import EarlyExit
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.policies.base import ScorePolicy, ScoresByDepth, TerminationPolicy
from dynamax.policies.schedule import Never

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps what is gone through, with a label."""

MADE_UP = (torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([False, False, True, True]))
"""Scores, and whether they are right, that a policy is fitted to only to see whether it fits the exits."""


@dataclass(frozen=True)
class Calibrated:
    """What came of a calibration.

    Attributes:
        policy: The policy; Never where nothing could be promised.
        promise: What is promised of it.
        search: Scores of the search documents, exit by exit.
        test: Scores of the test documents.
    """

    policy: TerminationPolicy
    promise: Promise
    search: list[Scores]
    test: list[Scores]


def calibrate(
    engine: Engine,
    policy: ScorePolicy,
    documents: Sequence[Document],
    *,
    epsilon: float,
    delta: float = 0.1,
    method: Method = "ltt",
    level: Level = "document",
    share: float = 0.5,
    progress: Progress = lambda parts, label: parts,
) -> Calibrated:
    """Thresholds of a policy, and the exits it asks, whose risk is at most epsilon; see ``promised``.

    Args:
        engine: The model with its exits.
        policy: Its score is used; its threshold is not. If it must be fitted, it is fitted to the searched documents.
        documents: Drawn as the texts will be that the promise is about. Documents of one origin stay together.
        epsilon: The bound on the mean loss, in (0, 1).
        delta: Probability in (0, 1) that the bound does not hold.
        method: ltt, ucb, crc or naive.
        level: What one loss is.
        share: Part of the documents' origins, in (0, 1), that is searched; the rest tests.
        progress: See ``Progress``.

    Raises:
        UserError: If an option is out of range, there are no exits or too few documents, or decoding would read
            something else than one pass over a text.
    """
    check(engine, policy, epsilon=epsilon, delta=delta, share=share)
    first, second = split(documents, [document.origin for document in documents], share)
    policy, search = searched(engine, policy, first, second, progress)
    candidates = found(engine, policy, Searched.of(search), epsilon, level)
    tested: list[list[Outcome]] = []
    test: list[Scores] = []
    for text in texts(engine, progress(second, "test")):
        tested.append([outcome(text, candidate) for candidate in (*candidates, Never())])
        test.append(scored(text, policy))
    lengths = [len(row[0].wrong_T) for row in tested]
    starts_D = np.cumsum([0, *lengths[:-1]])
    columns = list(zip(*tested, strict=True))
    wrong_CN = [np.concatenate([one.wrong_T for one in column]) for column in columns]
    asked = Promise(
        level=level,
        epsilon=epsilon,
        delta=delta,
        method=method,
        documents=len(tested),
        tokens=sum(lengths),
        loss=0.0,
        blocks=0.0,
        data=fingerprint(second),
        model=engine.backbone.spec.fingerprint,
    )
    policy_and_promise = concluded(
        candidates,
        np.stack([losses(wrong_N, starts_D, level) for wrong_N in wrong_CN], 1),
        [float(np.concatenate([one.depth_T for one in column]).mean()) for column in columns],
        asked,
        binary=level != "document",
    )
    return Calibrated(*policy_and_promise, search, test)


def check(engine: Engine, policy: ScorePolicy, *, epsilon: float, delta: float, share: float) -> None:
    """What ``calibrate`` refuses (UserError), as far as can be known before there are documents."""
    for name, value in {"epsilon": epsilon, "delta": delta, "share": share}.items():
        if not 0 < value < 1:
            raise UserError(f"calibrate was given {name} {value}; it must lie between 0 and 1. Change it.")
    if engine.exits is None:
        raise UserError("calibrate was given a model without exits. Give heads, or exits such as LogitLens.")
    depths = engine.exits.depths
    asked = policy.fitted(lambda _: dict.fromkeys(depths, MADE_UP)).at(dict.fromkeys(depths, 0.5))
    asked.validate(depths)
    if not engine.decoder(asked, EarlyExit).teacher_forced:
        raise UserError(
            f"calibrate reads each text in one pass, and what {policy.label} decides here depends on where earlier "
            f"tokens left, so it could not be promised: the policy looks at earlier steps, a gate reads PastExits, or "
            f"a lens runs blocks of the backbone. Calibrate another policy, or other exits."
        )


def searched(
    engine: Engine, policy: ScorePolicy, first: Sequence[Document], second: Sequence[Document], progress: Progress
) -> tuple[ScorePolicy, list[Scores]]:
    """The policy, fitted to the first documents if it must be, and what it scores along them.

    Raises:
        UserError: If the first documents, or the second ones, which test, have no answers.
    """
    counts = [sum(map(decided, part)) for part in (first, second)]
    if not all(counts):
        raise UserError(
            f"calibrate was given {len(first) + len(second)} documents: {counts[0]} to search and {counts[1]} to test, "
            f"once those without an answer are left out. Wanted: at least one of each, and some hundreds for a "
            f"promise. Give more."
        )

    def scores_of(other: ScorePolicy) -> ScoresByDepth:
        seen = Searched.of([scored(text, other) for text in texts(engine, progress(first, "fit"))])
        assert engine.exits is not None, "or check would have refused"
        pairs = zip(seen.score_EN, seen.right_EN, strict=True)
        return {
            depth: (torch.from_numpy(score_N), torch.from_numpy(right_N))
            for depth, (score_N, right_N) in zip(engine.exits.depths, pairs, strict=True)
        }

    policy = policy.fitted(scores_of)
    return policy, [scored(text, policy) for text in texts(engine, progress(first, "search"))]


def concluded(
    candidates: Sequence[TerminationPolicy],
    lost_DC: np.ndarray,
    blocks_C: Sequence[float],
    asked: Promise,
    *,
    binary: bool,
) -> tuple[TerminationPolicy, Promise]:
    """The least sure of the candidates whose promise holds, and the promise.

    Args:
        candidates: The surest first.
        lost_DC: The loss of each document under each candidate, and last under Never.
        blocks_C: Blocks a token under each of them.
        asked: The promise as it is asked for; loss, blocks and reason are not known yet.
        binary: Whether every loss is 0 or 1.
    """
    reason, place = None, None
    if not candidates:
        bound = "" if asked.level == "score" else " at this bound"
        reason = f"no threshold at any exit costs less than full decoding{bound} on the search documents"
    else:
        place = promised(lost_DC[:, :-1], asked.epsilon, asked.delta, asked.method, binary=binary)
        if place is None:
            reason = refused(float(lost_DC[:, 0].mean()), len(lost_DC), asked.epsilon, asked.delta)
    chosen = len(candidates) if place is None else place
    promise = replace(asked, loss=float(lost_DC[:, chosen].mean()), blocks=blocks_C[chosen], reason=reason)
    return (Never() if place is None else candidates[place]), promise


def refused(risk: float, count: int, epsilon: float, delta: float) -> str:
    """Why not even the surest candidate holds, and what would be needed."""
    lost = f"the surest thresholds lose {risk:.2%} on {count} test documents"
    if risk >= epsilon:
        return f"{lost}; exits that are right more often are needed"
    needed = documents_needed(risk, epsilon, delta)
    many = "more than 100,000" if needed is None else f"about {needed:,}"
    return f"{lost}, which are too few to promise it; {many} would be needed"
