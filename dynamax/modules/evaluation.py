"""One test run: example by example, the full model and then every policy at every threshold, side by side.

Agreement, depth, cost and time are taken along the full model's own answer, so that every policy is
asked about the same positions; scores are taken from answers of its own.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamax.decoding.base import Decoder
from dynamax.decoding.cost import CostModel
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.probe import Probe, Together, clock
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.modules.results import ExitStats, PolicyStats
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.schedule import AtDepth
from dynamax.stream import Answer
from dynamax.tasks.base import ChoiceExample, ChoiceTask, Example, GenerationTask, Task, TextExample, TextTask
from dynamax.types import Step

TIMED = 8
"""Examples that are timed where nobody says otherwise."""


@dataclass
class OperatingPoint:
    """One policy at one threshold, or the full model; and what it has done so far in this run."""

    decoder: Decoder
    costs: CostModel
    stats: PolicyStats
    policy: TerminationPolicy | None


class Evaluation(ABC):
    """One test run over one kind of task.

    Args:
        engine: The model and its exits.
        full: The full model.
        points: Policies at thresholds.

    Attributes:
        exits: What each exit said.
        examples: Examples run so far.
    """

    def __init__(self, engine: Engine, full: OperatingPoint, points: Sequence[OperatingPoint]) -> None:
        assert engine.exits is not None, "policies have exits to leave at"
        self.engine = engine
        self.bank: ExitBank = engine.exits
        self.full = full
        self.points = list(points)
        self.exits = {depth: ExitStats(depth) for depth in self.bank.depths}
        self.examples = 0

    @abstractmethod
    def add(self, example: Any) -> None:  # noqa: ANN401 - each kind has its own class of example
        """Run one example through the full model and every point."""

    def _read(self, tokens_1T: Tensor, start: int, top_T: Tensor | None = None) -> TeacherForcedPass:
        """Read a known text, and count what each exit says beside the top's most likely tokens."""
        read = self.engine.read(tokens_1T, start=start)
        top_T = read.logits_TV.argmax(-1) if top_T is None else top_T
        for evidence in read.exits:
            self.exits[evidence.depth].add(evidence, tuple(self.bank.gates(evidence.depth)), top_T)
        return read


class Generation(Evaluation):
    """Answers in words.

    Args:
        task: The task.
        engine: The model and its exits.
        full: The full model.
        points: Policies at thresholds.
        sampler: What all of them draw with; each answer begins it anew, so that all have the same chances.
        chat: Wrap prompts in the chat template.
        timed: Examples that are decoded along the full model's answer, and so timed and charged; on the others
            agreement and depth are read off one pass. Where that would not tell the same, all are decoded.
        probes: Watchers of every policy's decoding.
    """

    def __init__(
        self,
        task: GenerationTask,
        engine: Engine,
        full: OperatingPoint,
        points: Sequence[OperatingPoint],
        *,
        sampler: Sampler,
        chat: bool,
        timed: int | None,
        probes: Sequence[Probe],
    ) -> None:
        super().__init__(engine, full, points)
        self.task, self.sampler, self.chat, self.probes = task, sampler, chat, tuple(probes)
        readable = all(point.decoder.teacher_forced for point in points)
        self.timed = (TIMED if timed is None else timed) if readable else sys.maxsize

    def add(self, example: Example) -> None:
        """Answer in full, follow every point along that answer, and let it answer on its own."""
        prompt_1T = self.engine.encode(example.prompt, chat=self.chat)
        whole = self._answer(self.full, example, prompt_1T)
        self._count(self.full.stats, example, whole, whole)
        target_1T = torch.stack([step.token_B for step in whole.steps], 1)
        top_T = torch.cat([step.logits_BV.argmax(-1) for step in whole.steps])
        self.full.stats.add_steps(whole.steps[1:], top_T[1:])
        start = prompt_1T.shape[1] - 1
        read = self._read(torch.cat([prompt_1T, target_1T[:, :-1]], 1), start, top_T)
        for point in self.points:
            if self.examples < self.timed:
                self._along(self.full, prompt_1T, target_1T)
                steps = self._along(point, prompt_1T, target_1T, self.probes)
                # a drafting decoder draws the full model's tokens too, but other ones, and then the texts part
                comparable = not point.decoder.drafts or isinstance(self.sampler, Greedy)
                point.stats.add_steps(steps, top_T[1:] if comparable else None)
            else:
                point.stats.add_path(read.apply_policy(point.policy), top_T)
            self._count(point.stats, example, self._answer(point, example, prompt_1T), whole)
        if self.examples < self.timed:
            for depth, stats in self.exits.items():
                stats.times_ms += self._time_exit(depth, prompt_1T, target_1T)
        self.examples += 1

    def _answer(self, point: OperatingPoint, example: Example, prompt_1T: Tensor) -> Answer:
        self.sampler.restart(self.examples)
        options = self.engine.options(
            sampler=self.sampler, max_new_tokens=example.max_new_tokens, stop_strings=example.stop_strings or None
        )
        return self.engine.answer(point.decoder, prompt_1T, options)

    def _count(self, stats: PolicyStats, example: Example, answer: Answer, whole: Answer) -> None:
        stats.scores.append(self.task.score(example, answer.text))
        stats.answers.update([answer.text], [whole.text])

    def _along(
        self, point: OperatingPoint, prompt_1T: Tensor, target_1T: Tensor, probes: Sequence[Probe] = ()
    ) -> list[Step]:
        """Decode along known tokens, timed; a decoder that drafts decodes as many tokens of its own."""
        watch = clock(self.engine.device, warmup=0)
        forced_BT = None if point.decoder.drafts else target_1T
        decoded = point.decoder.decode(
            prompt_1T, max_new_tokens=target_1T.shape[1], forced_BT=forced_BT, probe=Together([watch, *probes])
        )
        steps = list(decoded)[1:]
        ms = sum(ms for times in watch.read().get("end", {}).values() for ms in times)
        places = range(prompt_1T.shape[1], prompt_1T.shape[1] + len(steps))
        costs = [point.costs.step(step, place) for step, place in zip(steps, places, strict=True)]
        point.stats.add_time(ms, costs, [point.costs.full(place) for place in places])
        return steps

    def _time_exit(self, depth: int, prompt_1T: Tensor, target_1T: Tensor) -> list[float]:
        watch = clock(self.engine.device)
        decoder = EarlyExit(self.engine.backbone, self.bank, AtDepth(depth))
        list(decoder.decode(prompt_1T, max_new_tokens=target_1T.shape[1], forced_BT=target_1T, probe=watch))
        return watch.read().get("end", {}).get(depth, [])


class Likelihood(Evaluation):
    """Likelihoods of given text: read off one pass, which exact state makes right (law 4).

    Args:
        task: The task.
        engine: The model and its exits.
        full: The full model.
        points: Policies at thresholds.

    Raises:
        UserError: If a decoder would do otherwise than one pass tells.
    """

    def __init__(
        self, task: ChoiceTask | TextTask, engine: Engine, full: OperatingPoint, points: Sequence[OperatingPoint]
    ) -> None:
        super().__init__(engine, full, points)
        self.task = task
        for point in points:
            if not point.decoder.teacher_forced:
                raise UserError(
                    f"{type(task).__name__} scores likelihoods, which are read off one exact pass, but "
                    f"{type(point.decoder).__name__} with {point.decoder.options()} would do otherwise. Use EarlyExit "
                    f"with Exact state and without lenses that run the last block, or a task that generates."
                )

    def add(self, example: ChoiceExample | TextExample) -> None:
        """Score the example under the full model and every point."""
        texts = self._document(example) if isinstance(example, TextExample) else self._candidates(example)
        for point in [self.full, *self.points]:
            nats = [self._nats(point, read, target_T) for read, target_T in texts]
            if isinstance(example, TextExample):
                assert isinstance(self.task, TextTask)
                tokens = sum(len(target_T) for _, target_T in texts)
                point.stats.scores.append(self.task.score_text(example, sum(nats), tokens))
            else:
                assert isinstance(self.task, ChoiceTask)
                point.stats.scores.append(self.task.score_choices(example, nats))
        self.examples += 1

    def _candidates(self, example: ChoiceExample) -> list[tuple[TeacherForcedPass, Tensor]]:
        texts = []
        for candidate in example.candidates:
            try:
                whole_1T, start = self.engine.encode_pair(example.prompt, candidate)
            except UserError as error:
                raise UserError(f"Example {example.id}: {error}") from error
            texts.append((self._read(whole_1T[:, :-1], start - 1), whole_1T[0, start:]))
        return texts

    def _document(self, example: TextExample) -> list[tuple[TeacherForcedPass, Tensor]]:
        assert isinstance(self.task, TextTask)
        text_1T = self.engine.with_start_token(self.engine.encode(example.text, chat=False))
        texts = []
        for window in self.task.windows(text_1T.shape[1]):
            tokens_1T = text_1T[:, window.start : window.stop]
            first = window.first - window.start
            texts.append((self._read(tokens_1T[:, :-1], first - 1), tokens_1T[0, first:]))
        return texts

    def _nats(self, point: OperatingPoint, read: TeacherForcedPass, target_T: Tensor) -> float:
        path = read.apply_policy(point.policy)
        point.stats.add_path(path, read.logits_TV.argmax(-1))
        return float(path.logits_TV.log_softmax(-1).gather(1, target_T[:, None]).sum())


def new_evaluation(
    task: Task,
    engine: Engine,
    full: OperatingPoint,
    points: Sequence[OperatingPoint],
    *,
    sampler: Sampler | None,
    chat: bool | None,
    timed: int | None,
    probes: Sequence[Probe],
) -> Evaluation:
    """A test run of this task, from nothing. Options that this kind of task cannot use are refused.

    Args:
        task: The task.
        engine: The model and its exits.
        full: The full model.
        points: Policies at thresholds.
        sampler: As given; None for the model's own way.
        chat: As given; None for plain text.
        timed: As given; None for the usual number.
        probes: Watchers of decoding.

    Raises:
        UserError: If an option was given that would change nothing.
    """
    if isinstance(task, GenerationTask):
        drawn = full.decoder.sampler  # the very one that all decoders draw with, so that restarting it restarts them
        return Generation(task, engine, full, points, sampler=drawn, chat=bool(chat), timed=timed, probes=probes)
    assert isinstance(task, ChoiceTask | TextTask), f"{type(task).__name__} is of no known kind"
    given = {"chat": chat, "sampler": sampler, "timed": timed}
    idle = [name for name, value in given.items() if value not in (None, False)]
    if idle:
        raise UserError(
            f"{type(task).__name__} scores likelihoods of plain text, so {' and '.join(idle)} would change nothing. "
            f"Leave {'it' if len(idle) == 1 else 'them'} out."
        )
    return Likelihood(task, engine, full, points)
