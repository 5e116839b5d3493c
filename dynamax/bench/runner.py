"""Measures all contenders, prompt by prompt in turn. Knows no contender by name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dynamax.bench.answers import Answer, timed
from dynamax.bench.base import Contender
from dynamax.bench.floors import BYTES, Floor, known
from dynamax.bench.memory import Growth, available, release
from dynamax.bench.outline import Outline
from dynamax.bench.progress import Progress
from dynamax.errors import UserError

Loading = Literal["together", "in turn"]
SPARE = 1.25
"""Memory that a contender may take, beside the weights of the model, as a share of them."""


@dataclass
class Record:
    """All that was measured of one contender.

    Attributes:
        contender: The contender.
        load_seconds: Time of loading.
        memory: Bytes by which the process grew; None where that is unknown.
        answers: The answers, but for the warm-up.
    """

    contender: Contender
    load_seconds: float = 0.0
    memory: int | None = None
    answers: list[Answer] = field(default_factory=list)


@dataclass
class Findings:
    """All that was measured.

    Attributes:
        records: One for each contender that ran.
        floors: By format of the weights.
        absent: Reasons by the name of a contender that did not run.
        loading: Whether all contenders were in memory together, or each alone.
    """

    records: list[Record]
    floors: list[Floor]
    absent: dict[str, str]
    loading: Loading


class Runner:
    """Measures contenders.

    Args:
        contenders: Each with whether it was asked for by its name: what was, and cannot run, is an error.
        prompts: Token ids of each prompt.
        rounds: How often every prompt is answered.
        sizes: Of the model; None where they are unknown: then there is no floor, and contenders are loaded in turn.
    """

    def __init__(
        self,
        contenders: Mapping[Contender, bool],
        prompts: Sequence[Sequence[int]],
        *,
        rounds: int,
        sizes: Outline | None,
    ) -> None:
        self._asked = dict(contenders)
        self._prompts = prompts
        self._rounds = rounds
        self._sizes = sizes
        self._absent: dict[str, str] = {}

    def run(self) -> Findings:
        """Measure.

        Raises:
            UserError: If a contender that was asked for by its name cannot run, or none can.
        """
        ready = [each for each in self._asked if self._may_run(each)]
        formats = dict.fromkeys(known(each.weights) for each in ready) if self._sizes else ()
        floors = [Floor(each, self._sizes.linears) for each in formats] if self._sizes else []
        loading = self._loading(ready, floors)
        answers = len(ready) * (1 + self._rounds * len(self._prompts))
        with Progress(answers) as self._progress:
            records = self._together(ready, floors) if loading == "together" else self._in_turn(ready, floors)
        if not records:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._absent.items())
            raise UserError(f"None of the contenders can run here. {reasons}. Name others with --contenders.")
        return Findings(records, floors, self._absent, loading)

    def _may_run(self, contender: Contender) -> bool:
        reason = contender.absent()
        if reason is not None:
            self._leave_out(contender, reason)
        return reason is None

    def _leave_out(self, contender: Contender, reason: str) -> None:
        if self._asked[contender]:
            raise UserError(f"{contender.name} was asked for and cannot run: {reason}.")
        self._absent[contender.name] = reason

    def _loading(self, contenders: Sequence[Contender], floors: Sequence[Floor]) -> Loading:
        there = available()
        if self._sizes is None or there is None:
            return "in turn"
        formats = [known(each.weights) for each in contenders] + [each.weights for each in floors]
        return "together" if SPARE * self._sizes.weights * sum(BYTES[each] for each in formats) < there else "in turn"

    def _together(self, contenders: Sequence[Contender], floors: Sequence[Floor]) -> list[Record]:
        """Every prompt by every contender in turn; who begins changes from prompt to prompt."""
        records = [record for each in contenders if (record := self._loaded(each))]
        for floor in floors:
            self._progress.say(f"floor in {floor.weights}", long=True)
            floor.load()
        turn = 0
        for number in range(1, self._rounds + 1):
            for index in range(len(self._prompts)):
                for place in range(len(records)):
                    self._answer(records[(place + turn) % len(records)], index, number)
                for floor in floors:
                    floor.measure()
                turn += 1
        for each in (*floors, *contenders):
            each.unload()
        return records

    def _in_turn(self, contenders: Sequence[Contender], floors: Sequence[Floor]) -> list[Record]:
        """One contender after the other, each alone in memory."""
        records = []
        for each in contenders:
            if record := self._loaded(each):
                records.append(record)
                for number in range(1, self._rounds + 1):
                    for index in range(len(self._prompts)):
                        self._answer(record, index, number)
            each.unload()
            release()
        for floor in floors:
            self._progress.say(f"floor in {floor.weights}", long=True)
            floor.load()
            for _ in range(self._rounds * len(self._prompts)):
                floor.measure()
            floor.unload()
        return records

    def _loaded(self, contender: Contender) -> Record | None:
        """Load a contender and let it answer the longest prompt, which is the warm-up; None if it cannot."""
        try:
            self._progress.say(f"preparing {contender.name}", long=True)
            contender.prepare()
            self._progress.say(f"loading {contender.name}", long=True)
            growth, began = Growth(), time.perf_counter()
            contender.load()
            seconds = time.perf_counter() - began
            self._progress.say(f"warming up {contender.name}", long=True)
            timed(contender, max(self._prompts, key=len))
        except Exception as error:  # whatever another package raises for a model that it does not take
            if contender.ours and not isinstance(error, UserError):
                raise
            contender.unload()
            self._leave_out(contender, _told(error))
            self._progress.expect(-1 - self._rounds * len(self._prompts))
            return None
        self._progress.step()
        return Record(contender, seconds, growth.peak())

    def _answer(self, record: Record, index: int, number: int) -> None:
        place = f"round {number} of {self._rounds}, prompt {index + 1} of {len(self._prompts)}"
        self._progress.say(f"{place}: {record.contender.name}")
        answer = timed(record.contender, self._prompts[index], index=index, number=number)
        record.answers.append(answer)
        self._progress.step()


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".") if lines else "it does not say why"
    return text if isinstance(error, UserError) else f"it failed with {type(error).__name__}: {text}"
