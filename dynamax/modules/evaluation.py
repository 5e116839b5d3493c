"""One example at a time: the full model, then every policy at every threshold, side by side.

Agreement, depth, cost and time are taken along the full model's own answer, so that every policy is
asked about the same positions; scores are taken from answers of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynamax.backbones.base import Backbone
from dynamax.decoding.base import Decoder, Probe
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.probe import Together, clock
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.metrics.cost import CostModel
from dynamax.modules.answers import Answer, answer, encode, forced
from dynamax.modules.results import ExitStats, PolicyStats
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.schedule import AtDepth
from dynamax.tasks.base import ChoiceExample, ChoiceTask, Example, GenerationTask, Task, TextExample, TextTask
from dynamax.types import Step

Along = Callable[[Decoder, Tensor, Tensor, Probe], list[Step]]


@dataclass
class OperatingPoint:
    """One policy at one threshold, or the full model; and what it has done so far."""

    decoder: Decoder
    costs: CostModel
    tally: PolicyStats
    policy: TerminationPolicy


@dataclass
class EvalContext:
    """What an evaluation works with, and what it has found.

    Attributes:
        backbone: The model.
        tokenizer: Its tokenizer.
        bank: Its exits.
        full: The full model.
        points: Policies at thresholds.
        sampler: What all of them draw with; each answer begins it anew, so that all have the same chances.
        chat: Wrap prompts in the chat template.
        timed: Examples that are decoded along the full model's answer, and so timed and charged; the
            others are followed on a survey, which says the same of agreement and depth.
        probes: Watchers of every policy's decoding.
    """

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    bank: ExitBank
    full: OperatingPoint
    points: list[OperatingPoint]
    sampler: Sampler
    chat: bool
    timed: int
    probes: list[Probe] = field(default_factory=list)
    exits: dict[int, ExitStats] = field(init=False)

    def __post_init__(self) -> None:
        self.exits = {depth: ExitStats(depth) for depth in self.bank.depths}

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.parameters()).device


class Evaluation(ABC):
    """How examples of one kind of task are put to the model."""

    @abstractmethod
    def add(self, example: Any) -> None:  # noqa: ANN401 - each kind has its own class of example
        """Run one example through the full model and every point."""


class Generation(Evaluation):
    """Answers in words."""

    def __init__(self, task: GenerationTask, bench: EvalContext, along: Along) -> None:
        self.task = task
        self.bench = bench
        self.along = along
        # lossless draws are the full model's too, but not the same ones, and then the texts part
        self.comparable = along is forced or isinstance(bench.sampler, Greedy)
        self._done = 0

    def add(self, example: Example) -> None:
        """Answer in full, follow every point along that answer, and let it answer on its own."""
        bench = self.bench
        prompt_1T = encode(bench.tokenizer, example.prompt, chat=bench.chat, device=bench.device)
        whole = self._answer(bench.full, example, prompt_1T)
        self._count(bench.full.tally, example, whole.text, whole.text)
        target_1T = whole.tokens_1T
        top_T = torch.cat([step.logits_BV.argmax(-1) for step in whole.steps])
        bench.full.tally.decoded(whole.steps[1:], top_T[1:])
        timed = self._done < bench.timed
        survey = self._survey(prompt_1T, target_1T, top_T)
        for point in bench.points:
            if timed:
                self._along(bench.full, prompt_1T, target_1T)
                steps = self._along(point, prompt_1T, target_1T, bench.probes)
                point.tally.decoded(steps, top_T[1:] if self.comparable else None)
            else:
                point.tally.played(survey.play(point.policy), top_T)
            own = self._answer(point, example, prompt_1T)
            self._count(point.tally, example, own.text, whole.text)
        if timed:
            self._time_exits(prompt_1T, target_1T)
        self._done += 1

    def _answer(self, point: OperatingPoint, example: Example, prompt_1T: Tensor) -> Answer:
        self.bench.sampler.restart(self._done)
        return answer(point.decoder, self.bench.tokenizer, prompt_1T, limit=example.limit, stop=example.stop)

    def _count(self, tally: PolicyStats, example: Example, text: str, whole: str) -> None:
        tally.scores.append(self.task.score(example, text))
        tally.same_answers.append(text.strip() == whole.strip())

    def _along(
        self, point: OperatingPoint, prompt_1T: Tensor, target_1T: Tensor, probes: Sequence[Probe] = ()
    ) -> list[Step]:
        watch = clock(self.bench.device, warmup=0)
        steps = self.along(point.decoder, prompt_1T, target_1T, Together([watch, *probes]))[1:]
        ms = sum(ms for times in watch.read().get("end", {}).values() for ms in times)
        start = prompt_1T.shape[1]
        costs = [point.costs.step(step, start + index) for index, step in enumerate(steps)]
        full = [point.costs.full(start + index) for index in range(len(steps))]
        point.tally.charged(ms, costs, full)
        return steps

    def _survey(self, prompt_1T: Tensor, target_1T: Tensor, top_T: Tensor) -> TeacherForcedPass:
        text_1T = torch.cat([prompt_1T, target_1T[:, :-1]], 1)
        survey = TeacherForcedPass(self.bench.backbone, self.bench.bank, text_1T, start=prompt_1T.shape[1] - 1)
        count_exits(self.bench, survey, top_T)
        return survey

    def _time_exits(self, prompt_1T: Tensor, target_1T: Tensor) -> None:
        for depth, tally in self.bench.exits.items():
            watch = clock(self.bench.device)
            decoder = EarlyExit(self.bench.backbone, self.bench.bank, AtDepth(depth))
            forced(decoder, prompt_1T, target_1T, watch)
            tally.times_ms += watch.read().get("end", {}).get(depth, [])


class Likelihood(Evaluation):
    """Likelihoods of given text: read off one survey, which exact state makes right (law 4)."""

    def __init__(self, task: ChoiceTask | TextTask, bench: EvalContext) -> None:
        self.task = task
        self.bench = bench

    def add(self, example: ChoiceExample | TextExample) -> None:
        """Score the example under the full model and every point."""
        points = [self.bench.full, *self.bench.points]
        if isinstance(example, TextExample):
            assert isinstance(self.task, TextTask)
            tokens, surveys = self._document(example)
            for point in points:
                nats = sum(self._nats(survey, point, target_T) for survey, target_T in surveys)
                point.tally.scores.append(self.task.score_text(example, nats, tokens))
        else:
            assert isinstance(self.task, ChoiceTask)
            surveys = [self._candidate(example, text) for text in example.candidates]
            for point in points:
                nats_C = [self._nats(survey, point, target_T) for survey, target_T in surveys]
                point.tally.scores.append(self.task.score_choices(example, nats_C))

    def _candidate(self, example: ChoiceExample, candidate: str) -> tuple[TeacherForcedPass, Tensor]:
        prompt_1T = encode(self.bench.tokenizer, example.prompt, chat=False, device=self.bench.device)
        whole_1T = encode(self.bench.tokenizer, example.prompt + candidate, chat=False, device=self.bench.device)
        start = prompt_1T.shape[1]
        if whole_1T.shape[1] <= start or not whole_1T[:, :start].equal(prompt_1T):
            raise UserError(
                f"Example {example.id}: the tokens of the prompt with {candidate!r:.80} are not those of the prompt "
                f"and at least one more, so the candidate has no likelihood of its own. Begin candidates with a space, "
                f"and end the prompt without one."
            )
        return self._survey(whole_1T, start)

    def _document(self, example: TextExample) -> tuple[int, list[tuple[TeacherForcedPass, Tensor]]]:
        assert isinstance(self.task, TextTask)
        text_1T = encode(self.bench.tokenizer, example.text, chat=False, device=self.bench.device)
        first = self.bench.tokenizer.bos_token_id
        first = self.bench.tokenizer.eos_token_id if first is None else first
        if text_1T[0, 0] != first:
            text_1T = torch.cat([text_1T.new_tensor([[first]]), text_1T], 1)
        surveys = [
            self._survey(text_1T[:, window.start : window.stop], window.first - window.start)
            for window in self.task.windows(text_1T.shape[1])
        ]
        return sum(len(target_T) for _, target_T in surveys), surveys

    def _survey(self, text_1T: Tensor, first: int) -> tuple[TeacherForcedPass, Tensor]:
        """TeacherForcedPass a text whose tokens from ``first`` on are to be scored."""
        survey = TeacherForcedPass(self.bench.backbone, self.bench.bank, text_1T[:, :-1], start=first - 1)
        target_T = text_1T[0, first:]
        count_exits(self.bench, survey, survey.logits_TV.argmax(-1))
        return survey, target_T

    def _nats(self, survey: TeacherForcedPass, point: OperatingPoint, target_T: Tensor) -> float:
        played = survey.play(point.policy)
        point.tally.played(played, survey.logits_TV.argmax(-1))
        return _loglikelihood(played.logits_TV, target_T)


def evaluation(task: Task, bench: EvalContext, along: Along) -> Evaluation:
    """The way to put this task's examples to the model."""
    if isinstance(task, GenerationTask):
        return Generation(task, bench, along)
    assert isinstance(task, ChoiceTask | TextTask), f"{type(task).__name__} is of no known kind"
    return Likelihood(task, bench)


def count_exits(bench: EvalContext, survey: TeacherForcedPass, top_T: Tensor) -> None:
    """What each exit said, beside the full model's most likely tokens."""
    for evidence in survey.exits:
        tally = bench.exits[evidence.depth]
        tally.right.append((evidence.token_B == top_T).cpu())
        for name in bench.bank.gates(evidence.depth):
            tally.confidences.setdefault(name, []).append(evidence.confidence(name).float().cpu())


def _loglikelihood(logits_TV: Tensor, target_T: Tensor) -> float:
    return float(logits_TV.log_softmax(-1).gather(1, target_T[:, None]).sum())
