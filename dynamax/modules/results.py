"""What a test run found: sums while it runs, and the rows of its report. The schema is in ``docs/report.md``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamax.calibration.promise import Promise, score_loss
from dynamax.calibration.scores import Outcome
from dynamax.decoding.cost import FREE, Cost
from dynamax.decoding.teacher_forced import PolicyPath
from dynamax.heads.base import ExitHead
from dynamax.metrics.exits import AnswerAgreement, BlocksPerToken, ExitAgreement, GateAUROC
from dynamax.modules.rows import AnswersRow, ReliabilityRow, Threshold
from dynamax.tasks.base import Task
from dynamax.types import Evidence, Step

SCHEMA_VERSION = 3
"""Of ``report.json``; raised whenever a field changes its meaning or goes."""


@dataclass(frozen=True)
class PromiseFacts:
    """A promise beside what happened.

    Attributes:
        promise: In words.
        epsilon: The mean loss is to be at most this.
        loss: The mean loss of this run, counted as the promise counts; None where nothing was counted.
        documents: Examples that it is the mean of.
        tokens: Their tokens.
    """

    promise: str
    epsilon: float
    loss: float | None
    documents: int
    tokens: int

    @property
    def text(self) -> str:
        """One line."""
        if self.loss is None:
            return f"Promised: {self.promise}. Nothing was counted here."
        kept = "not more" if self.loss <= self.epsilon else "more"
        return f"Promised: {self.promise}. Here: {self.loss:.1%} on {self.documents} examples, which is {kept}."


@dataclass(frozen=True)
class PolicyRow:
    """One policy at one threshold, or the full model. A quantity that was not measured is None.

    Attributes:
        policy: Its label; ``Full`` for the full model.
        threshold: A number, one for each depth, or None for a policy without.
        agreement: Share of positions at which the most likely token is the full model's.
        drafts_kept: Share of tokens that were drafted at an exit and kept by verification.
        answer_agreement: Share of answers equal to the full model's, case and white space apart.
        blocks_per_token: Block calls a token.
        flops_fraction: FLOPs as a part of full decoding's.
        bytes_fraction: Bytes as a part of full decoding's.
        ms_per_token: Milliseconds a token.
        speed_up: Full decoding's milliseconds over its own, timed in turn.
        score: The task's headline score.
        scores: All scores of the task.
        tokens: Tokens that the row is about.
        timed_tokens: Those of them that were timed and charged.
        depth_counts: How many tokens left at each depth.
        promise: What ``dynamax calibrate`` promised of it, and what happened; None where nothing was promised.
    """

    policy: str
    threshold: Threshold
    agreement: float | None
    drafts_kept: float | None
    answer_agreement: float | None
    blocks_per_token: float | None
    flops_fraction: float | None
    bytes_fraction: float | None
    ms_per_token: float | None
    speed_up: float | None
    score: float | None
    scores: dict[str, float]
    tokens: int
    timed_tokens: int
    depth_counts: dict[int, int]
    promise: PromiseFacts | None = None

    @property
    def name(self) -> str:
        """What logs call it."""
        return point_name(self.policy, self.threshold)


@dataclass(frozen=True)
class HeadRow:
    """One head: its class, parameters, and FLOPs a position."""

    name: str
    params: int
    flops: int


@dataclass(frozen=True)
class ExitRow:
    """One exit, along the full model's own answers. A quantity that was not measured is None.

    Attributes:
        depth: Blocks completed.
        agreement: Share of positions at which the lens' token is the full model's.
        gate_auroc: For each gate, how well its score ranks those positions.
        latency_ms: Median (``p50``) and 95th percentile (``p95``) of a step that leaves here.
        lens: The lens.
        gates: The gates.
    """

    depth: int
    agreement: float | None
    gate_auroc: dict[str, float | None]
    latency_ms: dict[str, float | None]
    lens: HeadRow
    gates: list[HeadRow]


@dataclass(frozen=True)
class TaskFacts:
    """What was asked: class name of the task, its headline score, and how many examples were run."""

    name: str
    headline: str
    examples: int


@dataclass(frozen=True)
class DecodingFacts:
    """How it was answered.

    Attributes:
        decoder: Class name of the decoder of all policies.
        lossless: Whether its tokens are those of full decoding.
        options: The decoder's own options.
        sampler: Class name (``name``) and options of the sampler; None where nothing was generated.
        chat: Whether prompts stood in the chat template; None where nothing was generated.
        heads: Folder of the heads; None for untrained exits.
    """

    decoder: str
    lossless: bool
    options: dict[str, Any]
    sampler: dict[str, Any] | None
    chat: bool | None
    heads: str | None


@dataclass(frozen=True)
class DecodingResults:
    """All that a report needs.

    Attributes:
        task: What was asked.
        backbone: Its spec; ``context`` is None where no length is too long.
        decoding: How it was answered.
        environment: Machine, device, versions.
        exits: One row an exit, shallowest first.
        frontier: The full model first, then one row for each policy at each threshold.
        bounds: The oracle, and leaving always at the same exit; empty where a lens runs the last block.
        reliability: Scores of the policies that have one, by exit.
        answers: Of the first examples; empty where nothing was generated.
        command: The command line of the run; None if it was not started by a command.
        schema_version: Of these fields.
    """

    task: TaskFacts
    backbone: dict[str, Any]
    decoding: DecodingFacts
    environment: dict[str, Any]
    exits: list[ExitRow]
    frontier: list[PolicyRow]
    bounds: list[PolicyRow]
    reliability: list[ReliabilityRow]
    answers: list[AnswersRow]
    command: str | None
    schema_version: int = SCHEMA_VERSION

    def as_json(self) -> dict[str, Any]:
        """The content of ``report.json``: keys are text, and figures that are not finite are None."""
        return _json(asdict(self))


def point_name(policy: str, threshold: Threshold) -> str:
    """What logs call a policy at a threshold.

    >>> point_name("MaxProb", 0.5), point_name("MaxProb", {15: 0.5, 19: 0.75}), point_name("Never", None)
    ('MaxProb@0.5', 'MaxProb@15=0.5,19=0.75', 'Never')
    """
    if threshold is None:
        return policy
    if isinstance(threshold, Mapping):
        return f"{policy}@" + ",".join(f"{depth}={level:g}" for depth, level in sorted(threshold.items()))
    return f"{policy}@{threshold}"


@dataclass
class PolicyStats:
    """Sums over the tokens and answers of one policy at one threshold, in one test run.

    Attributes:
        policy: Its label.
        threshold: None for a policy without.
        drafts: Whether it drafts and verifies, so that kept drafts are counted.
        kept: Tokens that were drafted at an exit and kept by verification.
        timed: Tokens that were timed and charged. The full model's are timed anew beside every policy.
        promise: What was promised of the policy.
        wrong: Of each example, whether each token is another than the full model's, ``T`` bool.
    """

    policy: str
    threshold: Threshold
    drafts: bool = False
    agreement: ExitAgreement = field(default_factory=ExitAgreement)
    answers: AnswerAgreement = field(default_factory=AnswerAgreement)
    blocks: BlocksPerToken = field(default_factory=BlocksPerToken)
    kept: int = 0
    depths: Counter[int] = field(default_factory=Counter)
    ms: float = 0.0
    timed: int = 0
    cost: Cost = FREE
    full_cost: Cost = FREE
    scores: list[Mapping[str, float]] = field(default_factory=list)
    promise: Promise | None = None
    wrong: list[Tensor] = field(default_factory=list)

    def add_steps(self, steps: Sequence[Step], top_T: Tensor | None) -> None:
        """Add decoded steps (no prefill among them).

        Args:
            steps: The steps.
            top_T: The full model's most likely token at each of their positions; None where the text is another one,
                so that nothing can be compared.
        """
        self.kept += sum(step.accepted for step in steps)
        self.depths.update(step.depth for step in steps)
        if steps:
            self.blocks.update(sum(sum(step.work.calls) for step in steps), tokens=len(steps))
        if top_T is not None and steps:
            self._compare(torch.cat([step.logits_BV.argmax(-1) for step in steps]), top_T)

    def add_path(self, path: PolicyPath, top_T: Tensor) -> None:
        """Add what a policy does along a known text; its first position is decided at the top and left out."""
        depths = path.depth_T[1:].tolist()
        self.depths.update(depths)
        if depths:
            self.blocks.update(sum(depths), tokens=len(depths))
            self._compare(path.logits_TV.argmax(-1)[1:], top_T[1:])

    def add_outcome(self, outcome: Outcome) -> None:
        """Add what a policy that knows the full model's tokens does along a text; the first position is left out."""
        wrong_T, depths = torch.from_numpy(outcome.wrong_T), outcome.depth_T.tolist()
        self.depths.update(depths)
        if depths:
            self.blocks.update(sum(depths), tokens=len(depths))
            self.agreement.update(wrong_T, torch.zeros_like(wrong_T))

    def _compare(self, token_T: Tensor, top_T: Tensor) -> None:
        """Add the tokens of one example."""
        self.agreement.update(token_T.cpu(), top_T.cpu())
        self.wrong.append((token_T != top_T).cpu())

    def _kept(self, full: PolicyStats) -> PromiseFacts | None:
        """The promise beside what happened."""
        promise = self.promise
        if promise is None:
            return None
        if promise.task is None:
            losses = [promise.losses(wrong_T.numpy()) for wrong_T in self.wrong]
        else:
            name, pairs = promise.task.score, zip(full.scores, self.scores, strict=True)
            losses = [np.array([score_loss(top[name], own[name])]) for top, own in pairs]
        mean = float(np.concatenate(losses).mean()) if losses else None
        documents = len(self.wrong if promise.task is None else self.scores)
        return PromiseFacts(promise.text, promise.epsilon, mean, documents, sum(map(len, self.wrong)))

    def row(self, task: Task, full: PolicyStats) -> PolicyRow:
        """One line of the frontier."""
        scores = task.aggregate(self.scores) if self.scores else {}
        tokens, ms = sum(self.depths.values()), _ratio(self.ms, self.timed) or None
        full_ms = _ratio(full.ms, full.timed)
        return PolicyRow(
            policy=self.policy,
            threshold=self.threshold,
            agreement=_computed(self.agreement),
            drafts_kept=_ratio(self.kept, tokens) if self.drafts else None,
            answer_agreement=_computed(self.answers),
            blocks_per_token=_computed(self.blocks),
            flops_fraction=_ratio(self.cost.flops, self.full_cost.flops),
            bytes_fraction=_ratio(self.cost.bytes, self.full_cost.bytes),
            ms_per_token=ms,
            speed_up=full_ms / ms if ms and full_ms else None,
            score=scores.get(task.headline),
            scores=scores,
            tokens=tokens,
            timed_tokens=self.timed,
            depth_counts=dict(sorted(self.depths.items())),
            promise=self._kept(full),
        )


@dataclass
class ExitStats:
    """What one exit predicted along the full model's own answers, in one test run."""

    depth: int
    agreement: ExitAgreement = field(default_factory=ExitAgreement)
    gates: dict[str, GateAUROC] = field(default_factory=dict)
    times_ms: list[float] = field(default_factory=list)

    def add(self, evidence: Evidence, gates: Sequence[str], top_T: Tensor) -> None:
        """Add positions of one text, whose most likely tokens at the top are ``top_T``."""
        right_T = evidence.token == top_T
        self.agreement.update(evidence.token.cpu(), top_T.cpu())
        for name in gates:
            self.gates.setdefault(name, GateAUROC()).update(evidence.score(name).float().cpu(), right_T.cpu())

    def row(self, lens: ExitHead, gates: Mapping[str, ExitHead]) -> ExitRow:
        """One line of the exits."""
        p50, p95 = percentiles(self.times_ms) if self.times_ms else (None, None)
        first, *others = [
            HeadRow(type(head).__name__, sum(p.numel() for p in head.parameters()), head.flops())
            for head in (lens, *gates.values())
        ]
        return ExitRow(
            depth=self.depth,
            agreement=_computed(self.agreement),
            gate_auroc={name: _computed(auroc) for name, auroc in self.gates.items()},
            latency_ms={"p50": p50, "p95": p95},
            lens=first,
            gates=others,
        )


def percentiles(times_ms: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile, interpolated linearly.

    >>> percentiles([1.0, 2.0, 3.0])
    (2.0, 2.9)
    """
    levels = torch.tensor([0.5, 0.95], dtype=torch.float64)
    p50, p95 = torch.tensor(times_ms, dtype=torch.float64).quantile(levels).tolist()
    return p50, p95


def _json(value: Any) -> Any:  # noqa: ANN401 - any value of a report
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _computed(metric: ExitAgreement | AnswerAgreement | BlocksPerToken | GateAUROC) -> float | None:
    """The metric's value; None where nothing was counted or it is not defined."""
    if not metric.update_called:
        return None
    value = float(metric.compute())
    return None if value != value else value
