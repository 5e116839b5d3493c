"""``test`` and ``predict``: policies swept over thresholds, beside the full model, on one task."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import LightningModule

from dynamax.backbones.hf import UNBOUNDED
from dynamax.backbones.skipped_state import Exact, SkippedState
from dynamax.backbones.sources import Source
from dynamax.decoding.base import Decoder, Probe
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.errors import UserError
from dynamax.heads.bank import Exit, ExitBank
from dynamax.metrics.cost import CostModel
from dynamax.metrics.environment import environment
from dynamax.modules.answers import answer, encode, forced, unforced
from dynamax.modules.checks import one_device
from dynamax.modules.evaluation import EvalContext, Evaluation, Generation, OperatingPoint, evaluation
from dynamax.modules.results import DecodingResults, PolicyStats, named
from dynamax.paths import InputPath
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.schedule import Never
from dynamax.tasks.base import Example, GenerationTask
from dynamax.types import Spec


@dataclass
class Sweep:
    """A policy and the thresholds to run it at; none means the policy as it is."""

    policy: TerminationPolicy
    thresholds: list[float] = field(default_factory=list)

    def points(self) -> list[TerminationPolicy]:
        """The policy at each threshold."""
        return [self.policy.at(threshold) for threshold in self.thresholds] or [self.policy]


class DecodingModule(LightningModule):
    """Decodes a task with exits and measures what that costs and saves.

    Args:
        backbone: Where the model comes from.
        policies: Policies and their thresholds; each is run beside the full model.
        heads: Folder of trained heads, as ``fit`` leaves it.
        exits: Exits in place of trained heads, for heads that need no training such as LogitLens.
        rule: What becomes of the state of skipped blocks; Exact by default.
        sampler: How tokens are drawn; Greedy by default.
        mode: ``early-exit`` says what exits say; ``lossless`` verifies every draft at the top.
        draft_limit: Lossless only: most drafted tokens before a verification.
        chat: Wrap prompts as a user's turn in the chat template.
        dtype: Of the backbone, such as float32 or bfloat16.
        timed: Examples on which time and cost are taken, policy by policy, beside the full model; on the
            others agreement and depth are read off one pass. Under an approximate rule, or lossless, all are.

    Attributes:
        results: What was found; there once testing has ended.
    """

    results: DecodingResults

    def __init__(
        self,
        backbone: Source,
        policies: list[Sweep],
        *,
        heads: InputPath | None = None,
        exits: dict[int, Exit] | None = None,
        rule: SkippedState | None = None,
        sampler: Sampler | None = None,
        mode: Literal["early-exit", "lossless"] = "early-exit",
        draft_limit: int = 4,
        chat: bool = False,
        dtype: str = "float32",
        timed: int = 8,
    ) -> None:
        super().__init__()
        if (heads is None) == (exits is None):
            raise UserError(
                f"DecodingModule was given heads: {heads} and exits: {exits}; it wants exactly one of the two. "
                f"Name the folder that `dynamax fit` wrote (heads), or untrained exits such as LogitLens (exits), and "
                "set the other to null."
            )
        if mode == "lossless" and not isinstance(rule or Exact(), Exact):
            raise UserError(f"Lossless decoding was given the rule {type(rule).__name__}; it needs Exact.")
        self.policies = [policy for sweep in policies for policy in sweep.points()]
        check_names(self.policies)
        self.source = backbone
        self.heads = None if heads is None else str(heads)
        self.exits = exits
        self.rule = rule or Exact()
        self.sampler = sampler or Greedy()
        self.mode = mode
        self.draft_limit = draft_limit
        self.chat = chat
        self.dtype_name = dtype
        self.timed = timed
        self.probes: list[Probe] = []
        self._bench: EvalContext | None = None
        self._evaluation: Evaluation | None = None

    def add_probe(self, probe: Probe) -> None:
        """Let a probe watch every policy's decoding. Call before testing starts."""
        self.probes.append(probe)

    def setup(self, stage: str) -> None:
        """Refuse several devices."""
        one_device(self.trainer, self)

    def configure_model(self) -> None:
        """Load backbone and heads, once."""
        if self._bench is not None:
            return
        self.backbone = self.source.load(dtype=self.dtype_name)
        self.bank = self._load_bank()
        full = OperatingPoint(
            Full(self.backbone, self.sampler), CostModel(self.backbone), PolicyStats("Full", None), Never()
        )
        self._bench = EvalContext(
            backbone=self.backbone,
            tokenizer=self.source.tokenizer(),
            bank=self.bank,
            full=full,
            points=[self._point(policy) for policy in self.policies],
            sampler=self.sampler,
            chat=self.chat,
            timed=self.timed if self.teacher_forceable else sys.maxsize,
            probes=self.probes,
        )

    def _point(self, policy: TerminationPolicy) -> OperatingPoint:
        costs = CostModel(self.backbone, self.bank.select_gates(policy.gates))
        tally = PolicyStats(policy.label, policy.threshold, drafts=self.mode == "lossless")
        return OperatingPoint(self.decoder(policy), costs, tally, policy)

    def _load_bank(self) -> ExitBank:
        if self.heads is not None:
            return ExitBank.load(self.heads, self.backbone.site)
        assert self.exits is not None
        return ExitBank(self.exits, self.backbone.site)

    def decoder(self, policy: TerminationPolicy) -> Decoder:
        """A decoder for one policy."""
        if self.mode == "lossless":
            return SelfSpeculative(self.backbone, self.bank, policy, draft_limit=self.draft_limit, sampler=self.sampler)
        return EarlyExit(self.backbone, self.bank, policy, rule=self.rule, sampler=self.sampler)

    @property
    def teacher_forceable(self) -> bool:
        """Whether one pass over a known text tells what decoding along it would do."""
        apart = not any(self.bank.lens(depth).runs_last_block for depth in self.bank.depths)
        return self.rule.exact and self.mode == "early-exit" and apart

    @property
    def bench(self) -> EvalContext:
        """What evaluation works with; there once the model is configured."""
        assert self._bench is not None, "configure_model comes first"
        return self._bench

    def on_test_start(self) -> None:
        """Find out how this task's examples are put to the model.

        Raises:
            UserError: If likelihoods are wanted under an approximate rule.
        """
        task = self._task()
        self._evaluation = evaluation(task, self.bench, unforced if self.mode == "lossless" else forced)
        if not isinstance(self._evaluation, Generation) and not self.teacher_forceable:
            raise UserError(
                f"{type(task).__name__} scores likelihoods, which are read off one exact pass, but the rule is "
                f"{type(self.rule).__name__}, the mode {self.mode}, or a lens runs the last block. Use the rule Exact, "
                f"the mode early-exit and other lenses, or a task that generates."
            )

    def test_step(self, example: Any, index: int) -> None:  # noqa: ANN401 - each task has its own class of example
        """Put one example to the full model and to every policy."""
        assert self._evaluation is not None
        self._evaluation.add(example)

    def on_test_epoch_end(self) -> None:
        """Close the books and log the frontier."""
        task, bench = self._task(), self.bench
        rows = [point.tally.row(task, bench.full.tally) for point in (bench.full, *bench.points)]
        self.results = DecodingResults(
            task={"name": type(task).__name__, "headline": task.headline, "examples": len(bench.full.tally.scores)},
            backbone=facts(self.backbone.spec),
            decoding=self.manner(),
            environment=environment(self.device, dtype=self.dtype_name, batch=1),
            exits=[self._exit(depth) for depth in self.bank.depths],
            rows=rows,
        )
        for row in rows:
            point = named(row["policy"], row["threshold"])
            for name in ("agreement", "blocks_per_token", "flops_fraction", "speed_up", "score"):
                if row[name] is not None:
                    self.log(f"test/{point}/{name}", float(row[name]))

    def manner(self) -> dict[str, Any]:
        """How tokens are decoded, as JSON values; ``draft_limit`` is None where nothing is drafted."""
        options = {name: value for name, value in vars(self.sampler).items() if not name.startswith("_")}
        plain = {name: value for name, value in options.items() if isinstance(value, int | float | str | None)}
        return {
            "mode": self.mode,
            "rule": type(self.rule).__name__,
            "draft_limit": self.draft_limit if self.mode == "lossless" else None,
            "sampler": {"name": type(self.sampler).__name__, **plain},
            "chat": self.chat,
            "heads": self.heads,
        }

    def predict_step(self, example: Example, index: int) -> dict[str, Any]:
        """Answer one example with the first policy: text, tokens, and the depth each token left at."""
        task = self._task()
        if not isinstance(task, GenerationTask):
            raise UserError(f"predict answers in words, but {type(task).__name__} asks for likelihoods. Use test.")
        tokenizer = self.bench.tokenizer
        prompt_1T = encode(tokenizer, example.prompt, chat=self.chat, device=self.device)
        decoder = self.bench.points[0].decoder
        self.sampler.restart(index)
        said = answer(decoder, tokenizer, prompt_1T, limit=example.limit, stop=example.stop)
        return {
            "id": example.id,
            "text": said.text,
            "tokens": said.tokens_1T[0].tolist(),
            "depths": [step.depth for step in said.steps],
        }

    def _task(self) -> Any:  # noqa: ANN401 - the DataModule's
        return self.trainer.datamodule.task  # type: ignore[attr-defined]

    def _exit(self, depth: int) -> dict[str, Any]:
        tally = self.bench.exits[depth]
        heads = {"lens": self.bank.lens(depth), **self.bank.gates(depth)}
        told = {
            name: {
                "class": type(head).__name__,
                "params": sum(p.numel() for p in head.parameters()),
                "flops": head.flops(),
            }
            for name, head in heads.items()
        }
        return {
            "depth": depth,
            "agreement": tally.agreement(),
            "gate_auroc": tally.aurocs(),
            "latency_ms": tally.latency_ms(),
            "params": sum(head["params"] for head in told.values()),
            "flops": sum(head["flops"] for head in told.values()),
            "heads": told,
        }


def facts(spec: Spec) -> dict[str, Any]:
    """A backbone's spec as JSON values; ``context`` is None where no length is too long."""
    return {**dataclasses.asdict(spec), "context": None if spec.context == UNBOUNDED else spec.context}


def check_names(policies: Sequence[TerminationPolicy]) -> None:
    """Refuse policies that logs and tables could not tell apart.

    Raises:
        UserError: Naming one that stands twice.
    """
    seen: set[str] = set()
    for name in (named(policy.label, policy.threshold) for policy in policies):
        if name in seen:
            raise UserError(
                f"Two policies go by the name {name}, and their figures could not be told apart. Remove one, or run "
                f"them one after the other."
            )
        seen.add(name)
