"""One test run: example by example, the full model and then every policy at every threshold, side by side.

Agreement, depth, cost and time are taken along the full model's own answer, so that every policy is
asked about the same positions; scores are taken from answers of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynamax.calibration.scores import outcome
from dynamax.calibration.task import options_for
from dynamax.data.text import silent
from dynamax.decoding.base import Decoder
from dynamax.decoding.cost import FREE, CostModel
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.probe import Probe, Together, clock
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.generation import DAY
from dynamax.heads.bank import ExitBank
from dynamax.metrics.reliability import Reliability
from dynamax.modules.results import ExitStats, PolicyStats, point_name
from dynamax.modules.rows import AnswersRow, GivenAnswer
from dynamax.policies.base import ScorePolicy, TerminationPolicy
from dynamax.policies.bounds import Oracle
from dynamax.policies.combine import OnlyAt
from dynamax.policies.schedule import AtDepth
from dynamax.stream import Answer, TextStream
from dynamax.tasks.base import ChoiceExample, ChoiceTask, Example, GenerationTask, TextExample, TextTask
from dynamax.types import Step

TIMED = 8
"""Examples that are timed if no other number is given."""
SHOWN = 3
"""Examples whose answers stand in the report."""


@dataclass
class OperatingPoint:
    """One policy at one threshold, or the full model; and what it has done so far in this run."""

    decoder: Decoder
    costs: CostModel
    stats: PolicyStats
    policy: TerminationPolicy | None


@dataclass(kw_only=True)
class Evaluation(ABC):
    """One test run over one kind of task.

    Attributes:
        engine: The model and its exits.
        full: The full model.
        points: Policies at thresholds.
        bank: The exits' heads.
        exits: What each exit predicted.
        bounds: What the oracle does (by None), and leaving always at one depth (by that depth).
        reliability: Scores against whether the exit was right, by policy and depth.
        answers: Those of the first examples.
        examples: Examples run so far.
        tell: Called with the name of each policy as its turn comes.
    """

    engine: Engine
    full: OperatingPoint
    points: list[OperatingPoint]
    tell: Callable[[str], object] = silent
    bank: ExitBank = field(init=False)
    exits: dict[int, ExitStats] = field(init=False)
    bounds: dict[int | None, tuple[TerminationPolicy, PolicyStats]] = field(init=False)
    reliability: dict[str, dict[int, Reliability]] = field(default_factory=dict, init=False)
    answers: list[AnswersRow] = field(default_factory=list, init=False)
    examples: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        assert self.engine.exits is not None, "policies have exits to leave at"
        self.bank = self.engine.exits
        self.exits = {depth: ExitStats(depth) for depth in self.bank.depths}
        self.bounds = {}
        if not any(self.bank.lens(depth).last_blocks for depth in self.bank.depths):  # else one pass does not tell
            self.bounds[None] = Oracle(), PolicyStats("Oracle", None)
            below = [depth for depth in self.bank.depths if depth < self.engine.backbone.spec.depth]
            self.bounds |= {depth: (AtDepth(depth), PolicyStats("AtDepth", depth)) for depth in below}

    @abstractmethod
    def add(self, example: Any) -> None:  # noqa: ANN401 - each kind has its own class of example
        """Run one example through the full model and every point."""

    def _read(self, tokens_1T: Tensor, start: int, top_T: Tensor | None = None) -> TeacherForcedPass:
        """Read a known text, and compare what each exit predicts with the top's most likely tokens."""
        read = self.engine.read(tokens_1T, start=start)
        top_T = read.logits_TV.argmax(-1) if top_T is None else top_T
        for evidence in read.exits:
            self.exits[evidence.depth].add(evidence, tuple(self.bank.gates(evidence.depth)), top_T)
        scored: dict[str, OperatingPoint] = {}
        for point in self.points:
            scored.setdefault(point.stats.policy, point)  # thresholds change no score
        for label, point in scored.items():
            policy = point.policy.policy if isinstance(point.policy, OnlyAt) else point.policy
            if isinstance(policy, ScorePolicy) and point.policy is not None and point.decoder.teacher_forced:
                for evidence in read.asked(point.policy):
                    metric = self.reliability.setdefault(label, {}).setdefault(evidence.depth, Reliability())
                    metric.update(policy.score(evidence)[1:].cpu(), (evidence.token == top_T)[1:].cpu())
        return read


@dataclass(kw_only=True)
class Generation(Evaluation):
    """Answers in words.

    Attributes:
        task: The task.
        sampler: What all of them draw with; each answer begins it anew, so that all have the same chances.
        chat: Wrap prompts in the chat template.
        timed: Examples on which every policy is timed and charged, decoding along the full model's answer in turn
            with the full model. On the others only agreement and depth are taken: read off one pass where that gives
            the same, else decoded too. A policy that needs a known text
            is read off the pass alone, and has neither times nor scores.
        probes: Watchers of the policies' timed decoding.
    """

    task: GenerationTask
    sampler: Sampler
    chat: bool
    timed: int
    probes: Sequence[Probe]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lenses = CostModel(self.engine.backbone, self.bank.select_gates(()))
        for point in self.points:
            if point.policy is not None and point.policy.known_text and not point.decoder.teacher_forced:
                raise UserError(
                    f"{point.stats.policy} is read off one exact pass, but {type(point.decoder).__name__} with "
                    f"{point.decoder.options()} would do otherwise. Use EarlyExit with Exact state and without lenses "
                    f"that run the last block, or leave the policy out."
                )

    def add(self, example: Example) -> None:
        """Answer in full, follow every point along that answer, and let it answer on its own."""
        prompt_1T = self.engine.encode(example.prompt, chat=self.chat, day=DAY)
        self.tell("full model")
        whole = self._answer(self.full, example, prompt_1T)
        target_1T = torch.stack([step.token_B for step in whole.steps], 1)
        top_T = torch.cat([step.logits_BV.argmax(-1) for step in whole.steps])
        self.full.stats.add_steps(whole.steps[1:], top_T[1:])
        start = prompt_1T.shape[1] - 1
        read = self._read(torch.cat([prompt_1T, target_1T[:, :-1]], 1), start, top_T)
        timed = self.examples < self.timed
        for policy, stats in self.bounds.values():
            found = outcome(read, policy)
            stats.add_outcome(found)
            if timed:
                stats.cost += self._lenses.path(found.depth_T.tolist(), start + 1)
                stats.full_cost += sum(map(self.full.costs.full, range(start + 1, start + len(top_T))), FREE)
        for point in self.points:
            self.tell(point_name(point.stats.policy, point.stats.threshold))
            known_text = point.policy is not None and point.policy.known_text
            if (timed or not point.decoder.teacher_forced) and not known_text:
                if timed:
                    self._along(self.full, prompt_1T, target_1T, timed=True)
                steps = self._along(point, prompt_1T, target_1T, timed=timed)
                # a drafting decoder draws the full model's tokens too, but other ones, and then the texts part
                comparable = not point.decoder.drafts or isinstance(self.sampler, Greedy)
                point.stats.add_steps(steps, top_T[1:] if comparable else None)
            else:
                point.stats.add_path(read.apply_policy(point.policy), top_T)
            if not known_text:
                self._answer(point, example, prompt_1T, whole)
        for depth, stats in self.exits.items() if timed else ():
            self.tell(f"time to depth {depth}")
            watch = clock(self.engine.device)
            decoder = EarlyExit(self.engine.backbone, self.bank, AtDepth(depth))
            list(decoder.decode(prompt_1T, max_new_tokens=target_1T.shape[1], forced_BT=target_1T, probe=watch))
            times = watch.read().get("end", {}).get(depth, [])
            stats.times_ms += times
            if depth in self.bounds:
                bound = self.bounds[depth][1]
                bound.ms, bound.timed = bound.ms + sum(times), bound.timed + len(times)
        self.examples += 1

    def _answer(
        self, point: OperatingPoint, example: Example, prompt_1T: Tensor, whole: Answer | None = None
    ) -> Answer:
        """Answer, and compare with the full model's answer; left out, this is the full model's."""
        self.sampler.restart(self.examples)
        options = options_for(self.engine, example, self.sampler)
        answer = self.engine.answer(point.decoder, prompt_1T, options)
        point.stats.scores.append(self.task.score(example, answer.text))
        point.stats.answers.update([answer.text], [answer.text if whole is None else whole.text])
        if self.examples < SHOWN:
            if whole is None:
                self.answers.append(AnswersRow(example.id, example.prompt, []))
            stream = TextStream(self.engine.tokenizer, options)  # pyright: ignore[reportArgumentType] - it has answered
            pieces = [stream.add(token) for token in answer.tokens]
            pieces[-1] += stream.rest()
            given = GivenAnswer(point.stats.policy, point.stats.threshold, pieces, answer.depths)
            self.answers[-1].given.append(given)
        return answer

    def _along(self, point: OperatingPoint, prompt_1T: Tensor, target_1T: Tensor, *, timed: bool) -> list[Step]:
        """Decode along known tokens; a decoder that drafts decodes as many tokens of its own.

        Args:
            point: The policy, or the full model.
            prompt_1T: The prompt.
            target_1T: The full model's answer.
            timed: Whether to count time and cost, and let the probes watch; they do not watch the full model.
        """
        watch = clock(self.engine.device, warmup=0)
        probes = [watch, *(() if point is self.full else self.probes)]
        forced_BT = None if point.decoder.drafts else target_1T
        self.sampler.restart(self.examples)
        decoded = point.decoder.decode(
            prompt_1T,
            max_new_tokens=target_1T.shape[1],
            forced_BT=forced_BT,
            probe=Together(probes) if timed else None,
        )
        steps = list(decoded)[1:]
        if not timed:
            return steps
        ms = sum(ms for times in watch.read().get("end", {}).values() for ms in times)
        places = range(prompt_1T.shape[1], prompt_1T.shape[1] + len(steps))
        costs = [point.costs.step(step, place) for step, place in zip(steps, places, strict=True)]
        stats = point.stats
        stats.ms += ms
        stats.timed += len(costs)
        stats.cost = sum(costs, stats.cost)
        stats.full_cost = sum((point.costs.full(place) for place in places), stats.full_cost)
        return steps


@dataclass(kw_only=True)
class Likelihood(Evaluation):
    """Likelihoods of given text: read off one pass, which exact state makes right (law 4).

    Attributes:
        task: The task.

    Raises:
        UserError: If one pass does not give what a decoder would do.
    """

    task: ChoiceTask | TextTask

    def __post_init__(self) -> None:
        super().__post_init__()
        for point in self.points:
            if not point.decoder.teacher_forced:
                raise UserError(
                    f"{type(self.task).__name__} scores likelihoods, which are read off one exact pass, but "
                    f"{type(point.decoder).__name__} with {point.decoder.options()} would do otherwise. Use EarlyExit "
                    f"with Exact state, without lenses that run the last block or candidates, or a task that generates."
                )

    def add(self, example: ChoiceExample | TextExample) -> None:
        """Score the example under the full model and every point."""
        texts = [
            (self._read(tokens_1T[:, :-1], first - 1), tokens_1T[0, first:])
            for tokens_1T, first in self._texts(example)
        ]
        for policy, stats in self.bounds.values():
            for read, _ in texts:
                stats.add_outcome(outcome(read, policy))
        for point in [self.full, *self.points]:
            nats = []
            for read, target_T in texts:
                path = read.apply_policy(point.policy)
                point.stats.add_path(path, read.logits_TV.argmax(-1))
                nats.append(float(path.logits_TV.log_softmax(-1).gather(1, target_T[:, None]).sum()))
            if isinstance(example, TextExample):
                assert isinstance(self.task, TextTask)
                tokens = sum(len(target_T) for _, target_T in texts)
                point.stats.scores.append(self.task.score_text(example, sum(nats), tokens))
            else:
                assert isinstance(self.task, ChoiceTask)
                point.stats.scores.append(self.task.score_choices(example, nats))
        self.examples += 1

    def _texts(self, example: ChoiceExample | TextExample) -> Iterator[tuple[Tensor, int]]:
        """Each candidate behind the prompt, or each window of a document; and the first token that is scored."""
        if isinstance(example, TextExample):
            assert isinstance(self.task, TextTask)
            text_1T = self.engine.with_start_token(self.engine.encode(example.text, chat=False))
            for window in self.task.windows(text_1T.shape[1]):
                yield text_1T[:, window.start : window.stop], window.first - window.start
            return
        for candidate in example.candidates:
            try:
                yield self.engine.encode_pair(example.prompt, candidate)
            except UserError as error:
                raise UserError(f"Example {example.id}: {error}") from error


def check_options(task: object, *, sampler: Sampler | None, chat: bool | None, timed: int | None) -> None:
    """Refuse tasks of an unknown kind, and options that would change nothing (UserError); None was not given."""
    if isinstance(task, GenerationTask):
        return
    name = type(task).__name__
    if not isinstance(task, ChoiceTask | TextTask):
        raise UserError(
            f"{name} is neither a GenerationTask nor a ChoiceTask nor a TextTask, so nobody knows what to ask the "
            f"model. Make it a subclass of one of these."
        )
    given = {"chat": chat, "sampler": sampler, "timed": timed}
    idle = [option for option, value in given.items() if value not in (None, False)]
    if idle:
        raise UserError(
            f"{name} scores likelihoods of plain text, so {' and '.join(idle)} would change nothing. "
            f"Leave {'it' if len(idle) == 1 else 'them'} out."
        )
