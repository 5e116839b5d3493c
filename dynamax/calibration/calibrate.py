"""From documents to a policy with a promise: search on some of them, test on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dynamax.calibration.promise import Level, Promise, losses
from dynamax.calibration.risk import Method, documents_needed, promised
from dynamax.calibration.scores import Outcome, Scores, fingerprint, outcome, scored, split, texts
from dynamax.calibration.search import Searched, found
from dynamax.data.text import Document
from dynamax.decoding.early_exit import EarlyExit
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.policies.base import ScorePolicy, TerminationPolicy
from dynamax.policies.schedule import Never


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
    progress: Callable[[Iterable[Document], str], Iterable[Document]] = lambda parts, label: parts,
) -> Calibrated:
    """Thresholds of a policy, and the exits it asks, whose risk is at most epsilon; see ``promised``.

    Args:
        engine: The model with its exits.
        policy: Its score is used; its threshold is not.
        documents: Drawn as the texts will be that the promise is about. Documents of one origin stay together.
        epsilon: The bound on the mean loss, in (0, 1).
        delta: Probability in (0, 1) that the bound does not hold.
        method: ltt, ucb, crc or naive.
        level: What one loss is.
        share: Part of the documents' origins, in (0, 1), that is searched; the rest tests.
        progress: Wraps what is gone through, with a label.

    Raises:
        UserError: If an option is out of range, there are no exits or too few documents, or decoding would read
            something else than one pass over a text.
    """
    check(engine, policy, epsilon=epsilon, delta=delta, share=share)
    first, second = split(documents, share)
    search = [scored(text, policy) for text in texts(engine, progress(first, "search"))]
    if not search or not second:
        raise UserError(
            f"calibrate was given {len(documents)} documents: {len(search)} to search and {len(second)} to test, once "
            f"those without an answer are left out. Wanted: at least one of each, and some hundreds for a promise. "
            f"Give more."
        )
    candidates = found(engine, policy, Searched.of(search), epsilon, level)
    tested: list[list[Outcome]] = []
    test: list[Scores] = []
    for text in texts(engine, progress(second, "test")):
        tested.append([outcome(text, candidate) for candidate in (*candidates, Never())])
        test.append(scored(text, policy))
    return Calibrated(*concluded(engine, tested, candidates, second, (epsilon, delta, method, level)), search, test)


def check(engine: Engine, policy: ScorePolicy, *, epsilon: float, delta: float, share: float) -> None:
    """What ``calibrate`` refuses (UserError), as far as can be known before there are documents."""
    for name, value in {"epsilon": epsilon, "delta": delta, "share": share}.items():
        if not 0 < value < 1:
            raise UserError(f"calibrate was given {name} {value}; it must lie between 0 and 1. Change it.")
    if engine.exits is None:
        raise UserError("calibrate was given a model without exits. Give heads, or exits such as LogitLens.")
    asked = policy.at(dict.fromkeys(engine.exits.depths, 0.5))
    asked.validate(engine.exits.depths)
    if not engine.decoder(asked, EarlyExit).teacher_forced:
        raise UserError(
            f"calibrate reads each text in one pass, and what {policy.label} decides here depends on where earlier "
            f"tokens left, so it could not be promised: the policy looks at earlier steps, a gate reads PastExits, or "
            f"a lens runs blocks of the backbone. Calibrate another policy, or other exits."
        )


def concluded(
    engine: Engine,
    tested: Sequence[Sequence[Outcome]],
    candidates: Sequence[TerminationPolicy],
    documents: Sequence[Document],
    asked: tuple[float, float, Method, Level],
) -> tuple[TerminationPolicy, Promise]:
    """The least sure of the candidates whose promise holds, and the promise.

    Args:
        engine: The model.
        tested: Of each document, the outcome under each candidate, and last under Never.
        candidates: The surest first.
        documents: Those that were tested.
        asked: Epsilon, delta, method and level.
    """
    epsilon, delta, method, level = asked
    starts_D = np.cumsum([0, *(len(row[0].wrong_T) for row in tested[:-1])])
    wrong_CN = [
        np.concatenate(column) for column in zip(*([one.wrong_T for one in row] for row in tested), strict=True)
    ]
    lost_DC = np.stack([losses(wrong_N, starts_D, level) for wrong_N in wrong_CN], 1)
    reason, place = None, None
    if not candidates:
        reason = "no threshold at any exit costs less than full decoding at this bound on the search documents"
    else:
        place = promised(lost_DC[:, :-1], epsilon, delta, method, binary=level != "document")
        if place is None:
            reason = refused(float(lost_DC[:, 0].mean()), len(lost_DC), epsilon, delta)
    chosen = len(candidates) if place is None else place
    promise = Promise(
        level=level,
        epsilon=epsilon,
        delta=delta,
        method=method,
        documents=len(tested),
        tokens=sum(len(row[0].wrong_T) for row in tested),
        loss=float(lost_DC[:, chosen].mean()),
        blocks=float(np.concatenate([row[chosen].depth_T for row in tested]).mean()),
        data=fingerprint(documents),
        model=engine.backbone.spec.fingerprint,
        reason=reason,
    )
    return (Never() if place is None else candidates[place]), promise


def refused(risk: float, count: int, epsilon: float, delta: float) -> str:
    """Why not even the surest candidate holds, and what would be needed."""
    lost = f"the surest thresholds lose {risk:.2%} on {count} test documents"
    if risk >= epsilon:
        return f"{lost}; exits that are right more often are needed"
    needed = documents_needed(risk, epsilon, delta)
    many = "more than 100,000" if needed is None else f"about {needed:,}"
    return f"{lost}, which are too few to promise it; {many} would be needed"
