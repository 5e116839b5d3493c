"""What a test run found: one tally for each policy at each threshold, one for each exit. Sums only."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynamax.decoding.teacher_forced import PolicyPath
from dynamax.metrics.cost import Cost
from dynamax.metrics.functional import auroc
from dynamax.tasks.base import Task
from dynamax.types import Step


@dataclass
class PolicyStats:
    """Sums over the tokens and answers of one policy at one threshold.

    Attributes:
        policy: Its label.
        threshold: None for a policy without.
        drafts: Whether it drafts and verifies, so that it can be told how many drafts were kept.
        tokens: Tokens decoded along the full model's answers, or surveyed.
        compared: Those of them at which the most likely token can be compared with the full model's.
        kept: Tokens that were drafted at an exit and stood up to verification.
        timed: Tokens that were timed and charged. The full model's are timed anew beside every policy.
    """

    policy: str
    threshold: float | Mapping[int, float] | None
    drafts: bool = False
    tokens: int = 0
    compared: int = 0
    agreed: int = 0
    kept: int = 0
    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    full_flops: float = 0.0
    full_bytes: float = 0.0
    depths: Counter[int] = field(default_factory=Counter)
    ms: float = 0.0
    timed: int = 0
    scores: list[Mapping[str, float]] = field(default_factory=list)
    same_answers: list[bool] = field(default_factory=list)

    def decoded(self, steps: Sequence[Step], top_T: Tensor | None) -> None:
        """Add decoded steps (no prefill among them).

        Args:
            steps: The steps.
            top_T: The full model's most likely token at each of their positions; None where they stand at positions
                of their own, so that nothing can be compared.
        """
        self.tokens += len(steps)
        self.kept += sum(step.accepted for step in steps)
        self.calls += sum(sum(step.work.calls) for step in steps)
        self.depths.update(step.depth for step in steps)
        if top_T is not None:
            self.compared += len(steps)
            own = [int(step.logits_BV[0].argmax()) for step in steps]
            self.agreed += sum(said == top for said, top in zip(own, top_T.tolist(), strict=True))

    def charged(self, ms: float, costs: Sequence[Cost], full: Sequence[Cost]) -> None:
        """Add time and cost of decoded steps, beside the full model's cost."""
        self.ms += ms
        for cost, whole in zip(costs, full, strict=True):
            self.timed += 1
            self.flops += cost.flops
            self.bytes += cost.bytes
            self.full_flops += whole.flops
            self.full_bytes += whole.bytes

    def played(self, played: PolicyPath, top_T: Tensor) -> None:
        """Add what a survey says of a text; its first position is decided at the top and left out."""
        depths = played.depth_T[1:].tolist()
        self.tokens += len(depths)
        self.compared += len(depths)
        self.agreed += int((played.logits_TV.argmax(-1) == top_T)[1:].sum())
        self.calls += sum(depths)
        self.depths.update(depths)

    def row(self, task: Task, full: PolicyStats) -> dict[str, Any]:
        """One line of the frontier; a quantity that the task does not give is None."""
        scores = task.aggregate(self.scores) if self.scores else {}
        ms = _ratio(self.ms, self.timed) or None
        full_ms = _ratio(full.ms, full.timed)
        return {
            "policy": self.policy,
            "threshold": self.threshold,
            "agreement": _ratio(self.agreed, self.compared),
            "drafts_kept": _ratio(self.kept, self.tokens) if self.drafts else None,
            "answer_agreement": statistics.fmean(self.same_answers) if self.same_answers else None,
            "blocks_per_token": _ratio(self.calls, self.tokens),
            "flops_fraction": _ratio(self.flops, self.full_flops),
            "bytes_fraction": _ratio(self.bytes, self.full_bytes),
            "ms_per_token": ms,
            "speed_up": full_ms / ms if ms and full_ms else None,
            "score": scores.get(task.headline),
            "scores": scores,
            "tokens": self.tokens,
            "timed_tokens": self.timed,
            "depth_counts": dict(sorted(self.depths.items())),
        }


def named(policy: str, threshold: float | Mapping[int, float] | None) -> str:
    """What logs call a policy at a threshold.

    >>> named("MaxProb", 0.5), named("MaxProb", {15: 0.5, 19: 0.75}), named("Never", None)
    ('MaxProb@0.5', 'MaxProb@15=0.5,19=0.75', 'Never')
    """
    if threshold is None:
        return policy
    if isinstance(threshold, Mapping):
        return f"{policy}@" + ",".join(f"{depth}={level:g}" for depth, level in sorted(threshold.items()))
    return f"{policy}@{threshold}"


@dataclass
class ExitStats:
    """What one exit said along the full model's own answers."""

    depth: int
    right: list[Tensor] = field(default_factory=list)
    confidences: dict[str, list[Tensor]] = field(default_factory=dict)
    times_ms: list[float] = field(default_factory=list)

    def agreement(self) -> float | None:
        """Share of positions at which the lens' token is the full model's."""
        return float(torch.cat(self.right).float().mean()) if self.right else None

    def aurocs(self) -> dict[str, float | None]:
        """For each gate, how well its confidence ranks the positions where the lens is right; None if all are alike."""
        right_N = torch.cat(self.right) if self.right else torch.empty(0)
        return {name: _number(auroc(torch.cat(parts), right_N)) for name, parts in self.confidences.items()}

    def latency_ms(self) -> dict[str, float | None]:
        """Milliseconds of a step that leaves here: median and 95th percentile."""
        if not self.times_ms:
            return {"p50": None, "p95": None}
        p50, p95 = torch.tensor(self.times_ms).quantile(torch.tensor([0.5, 0.95])).tolist()
        return {"p50": p50, "p95": p95}


@dataclass(frozen=True)
class DecodingResults:
    """All that a report needs.

    Attributes:
        task: Class name of the task, its headline score and how many examples were run.
        backbone: Its spec; ``context`` is None where no length is too long.
        decoding: The mode, the rule for skipped state, the most drafts before a verification (None where nothing is
            drafted), the sampler, whether prompts stood in the chat template, and the folder of the heads (None for
            untrained exits).
        environment: Machine, device, versions.
        exits: One mapping an exit, shallowest first.
        rows: The full model first, then one mapping for each policy at each threshold.
    """

    task: dict[str, Any]
    backbone: dict[str, Any]
    decoding: dict[str, Any]
    environment: dict[str, Any]
    exits: list[dict[str, Any]]
    rows: list[dict[str, Any]]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)
