"""``test`` and ``predict``: policies swept over thresholds, beside the full model, on one task."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from dynamax.backbones.hf import UNBOUNDED
from dynamax.backbones.precision import capture_steps, check_precision
from dynamax.backbones.sources import Source
from dynamax.calibration.promise import Promise
from dynamax.calibration.task import options_for
from dynamax.data.tasks import TaskData
from dynamax.decoding.base import DecoderFactory
from dynamax.decoding.cost import CostModel
from dynamax.decoding.probe import Probe
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.engine import Engine, load
from dynamax.errors import UserError, at_least
from dynamax.generation import DAY
from dynamax.heads.bank import Exit
from dynamax.metrics.environment import environment
from dynamax.modules.bars import RunBars
from dynamax.modules.checks import one_device
from dynamax.modules.evaluation import TIMED, Evaluation, Generation, Likelihood, OperatingPoint, check_options
from dynamax.modules.results import DecodingFacts, DecodingResults, PolicyStats, TaskFacts, point_name
from dynamax.modules.rows import reliability_row
from dynamax.paths import InputPath
from dynamax.policies.base import TerminationPolicy
from dynamax.tasks.base import ChoiceTask, Example, GenerationTask, Task, TextTask


@dataclass
class Sweep:
    """A policy and the thresholds to run it at; none means the policy as it is.

    Args:
        policy: The policy.
        thresholds: Of the sweep.
        promise: What ``dynamax calibrate`` promised of the policy as it is.
    """

    policy: TerminationPolicy
    thresholds: list[float] = field(default_factory=list)
    promise: Promise | None = None

    def __post_init__(self) -> None:
        if self.promise is not None and self.thresholds:
            raise UserError(
                f"A policy was given with a promise and with thresholds {self.thresholds}; the promise is about the "
                f"thresholds that were calibrated. Leave thresholds out."
            )

    def points(self) -> list[TerminationPolicy]:
        """The policy at each threshold."""
        return [self.policy.at(threshold) for threshold in self.thresholds] or [self.policy]


class DecodingModule(LightningModule):
    """Decodes a task with exits and measures what that costs and saves.

    Every test run starts from nothing: a second one with the same module finds what the first one found.

    Args:
        backbone: Where the model comes from.
        policies: Policies and their thresholds; ``test`` runs each beside the full model. ``predict`` answers with the
            first one at its first threshold.
        heads: Folder of trained heads, as ``fit`` leaves it.
        exits: Exits in place of trained heads, for heads that need no training such as LogitLens.
        decoder: How tokens are decoded: EarlyExit (by default) takes the exits' tokens; SelfSpeculative verifies every
            draft at the top.
        sampler: How tokens are drawn; left out, by the model's ``generation_config``, which is greedy for most.
        chat: Wrap prompts as a user's turn in the chat template; plain text if left out.
        dtype: Of the backbone, such as float32 or bfloat16.
        precision: How its weights are held: float32, float16, bfloat16, int8 or int4; auto takes the faster of the
            first two here. Left out, transformers' modules run as they are. On a CPU.
        compile: Whether the steps of one sequence are made faster: on a CPU compiled by inductor, which needs a
            precision and a C++ compiler; on a GPU captured in CUDA graphs.
        timed: Examples on which ``test`` takes time and cost, policy by policy, beside the full model; 8 if left out.
            On the others it takes agreement and depth alone. Only for tasks that generate, as ``sampler`` and ``chat``.
            ``predict`` takes no times and does not read it.

    Attributes:
        engine: The model and its exits; there once ``configure_model`` has run.
        probes: Watch every policy's decoding in the next test run; a run takes them out.
        command: The command line that started the run, for the report; None if none did.
        results: What was found; there once testing has ended.
    """

    results: DecodingResults
    engine: Engine

    def __init__(
        self,
        backbone: Source,
        policies: list[Sweep],
        *,
        heads: InputPath | None = None,
        exits: dict[int, Exit] | None = None,
        decoder: DecoderFactory | None = None,
        sampler: Sampler | None = None,
        chat: bool | None = None,
        dtype: str = "float32",
        precision: str | None = None,
        compile: bool = False,
        timed: int | None = None,
    ) -> None:
        super().__init__()
        at_least(self, 0, timed=timed)
        check_precision(precision)
        if (heads is None) == (exits is None):
            raise UserError(
                f"DecodingModule was given heads: {heads} and exits: {exits}; it wants exactly one of the two. "
                f"Name the folder that `dynamax fit` wrote (heads), or untrained exits such as LogitLens (exits), and "
                "set the other to null."
            )
        points = [(policy, sweep.promise) for sweep in policies for policy in sweep.points()]
        self.policies = [policy for policy, _ in points]
        self.promises = [promise for _, promise in points]
        names = [point_name(policy.label, policy.threshold) for policy in self.policies]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"Two policies go by the name {name}, and their figures could not be told apart. Remove one, or "
                    f"run them one after the other."
                )
        self.source, self.exits = backbone, exits
        self.heads = None if heads is None else str(heads)
        self.decoder, self.sampler, self.chat, self.timed = decoder, sampler, chat, timed
        self.dtype_name, self.precision, self.compile_steps = dtype, precision, compile
        self.probes: list[Probe] = []
        self.command: str | None = None
        self._evaluation: Evaluation | None = None

    def setup(self, stage: str) -> None:
        """Forget an earlier run; refuse a trainer or a task that cannot do what was asked, before anything is loaded.

        Raises:
            UserError: If an option of trainer or module would change what is measured without the report showing it, or
                would change nothing.
        """
        self._evaluation = None
        vars(self).pop("results", None)
        check_trainer(self.trainer, self, timed=stage != "predict")
        name = type(self._task).__name__
        if stage != "predict":
            check_options(self._task, sampler=self.sampler, chat=self.chat, timed=self.timed)
            for promise in filter(None, self.promises):
                promise.check_task(self._task, chat=bool(self.chat))
        elif not isinstance(self._task, GenerationTask):
            raise UserError(f"predict answers in words, but {name} asks for likelihoods. Use test.")
        elif not self.policies:
            raise UserError(
                "predict answers with the first of model.policies, but none was given. Give one; Never runs the full "
                "model."
            )

    def configure_model(self) -> None:
        """Load backbone and heads, once; a policy that does not fit them is refused now."""
        if "engine" not in vars(self):
            rank_zero_info(f"Loading {self.source}, and its exits")
            attached = self._trainer is not None  # then it is loaded where it will run: graphs could not move there
            engine = load(
                self.source,
                heads=self.heads,
                exits=self.exits,
                dtype=self.dtype_name,
                precision=self.precision,
                compile=self.compile_steps,
                device=str(self.trainer.strategy.root_device) if attached else "cpu",
            )
            for policy, promise in zip(self.policies, self.promises, strict=True):
                engine.decoder(policy, self.decoder)
                if promise is not None:
                    promise.check_model(engine.backbone.spec.fingerprint)
            self.backbone, self.bank = engine.backbone, engine.exits  # as submodules, so that they move with this one
            self.engine = engine

    def on_test_start(self) -> None:
        """Begin a run over the data module's task.

        Raises:
            UserError: If the task needs exact state and a decoder has none, or the model asks for what is not done.
        """
        self._capture_again()
        task, engine = self._task, self.engine
        probes, self.probes = self.probes, []
        generates = isinstance(task, GenerationTask)
        sampler = engine.options(sampler=self.sampler).sampler if generates else Greedy()
        full = OperatingPoint(engine.decoder(sampler=sampler), engine.costs, PolicyStats("Full", None), None)
        points = []
        for policy, promise in zip(self.policies, self.promises, strict=True):
            decoder = engine.decoder(policy, self.decoder, sampler=sampler)
            if promise is not None:
                promise.check_decoder(decoder)
            stats = PolicyStats(policy.label, policy.threshold, drafts=decoder.drafts, promise=promise)
            points.append(OperatingPoint(decoder, CostModel(engine.backbone, decoder.exits), stats, policy))
        if generates:
            timed = TIMED if self.timed is None else self.timed
            options = {"sampler": sampler, "chat": bool(self.chat), "timed": timed, "probes": probes}
            self._evaluation = Generation(task=task, engine=engine, full=full, points=points, **options)
        else:
            assert isinstance(task, ChoiceTask | TextTask), "setup has refused other tasks"
            self._evaluation = Likelihood(task=task, engine=engine, full=full, points=points)
        bars = self.trainer.progress_bar_callback
        if isinstance(bars, RunBars):
            self._evaluation.tell = bars.say

    def test_step(self, example: Any, index: int) -> None:  # noqa: ANN401 - each task has its own class of example
        """Run one example through the full model and every policy."""
        assert self._evaluation is not None
        self._evaluation.add(example)

    def on_test_epoch_end(self) -> None:
        """Make the rows of the report, and log the frontier."""
        task, run = self._task, self._evaluation
        assert run is not None
        decoder = (run.points or [run.full])[0].decoder
        # A report is passed on: a folder within the current one is written without the rest of its user's paths.
        heads = None if self.heads is None else str(Path(self.heads).absolute()).removeprefix(f"{Path.cwd()}{os.sep}")
        sampler = chat = None
        if isinstance(run, Generation):
            options = {name: value for name, value in vars(run.sampler).items() if not name.startswith("_")}
            plain = {name: value for name, value in options.items() if isinstance(value, int | float | str | None)}
            sampler, chat = {"name": type(run.sampler).__name__, **plain}, run.chat
        self.results = DecodingResults(
            task=TaskFacts(type(task).__name__, task.headline, run.examples),
            backbone=spec_facts(self.engine),
            decoding=DecodingFacts(type(decoder).__name__, decoder.lossless, decoder.options(), sampler, chat, heads),
            environment=environment(
                self.engine.device,
                dtype=str(self.engine.dtype).removeprefix("torch."),
                batch=1,
                precision=self.engine.precision,
            ),
            exits=[stats.row(run.bank.lens(depth), run.bank.gates(depth)) for depth, stats in run.exits.items()],
            frontier=[point.stats.row(task, run.full.stats) for point in (run.full, *run.points)],
            bounds=[stats.row(task, run.full.stats) for _, stats in run.bounds.values()],
            reliability=[
                reliability_row(label, depth, metric)
                for label, scored in run.reliability.items()
                for depth, metric in scored.items()
                if metric.count_K.any()
            ],
            answers=run.answers,
            command=self.command,
        )
        for row in self.results.frontier:
            for name in ("agreement", "blocks_per_token", "flops_fraction", "speed_up", "score"):
                if (value := getattr(row, name)) is not None:
                    self.log(f"test/{row.name}/{name}", float(value))

    def on_predict_start(self) -> None:
        """Make ready what an earlier run took away."""
        self._capture_again()

    def predict_step(self, example: Example, index: int) -> dict[str, Any]:
        """Answer one example with the first policy: text, tokens, and the depth each token left at."""
        options = options_for(self.engine, example, self.sampler)
        options.sampler.restart(index)
        decoder = self.engine.decoder(self.policies[0], self.decoder, sampler=options.sampler)
        answer = self.engine.answer(decoder, self.engine.encode(example.prompt, chat=bool(self.chat), day=DAY), options)
        return {"id": example.id, "text": answer.text, "tokens": answer.tokens, "depths": answer.depths}

    def _capture_again(self) -> None:
        """A trainer that ends takes the model off its GPU, and so its graphs away."""
        engine = self.engine
        if self.compile_steps and engine.device.type == "cuda" and engine.backbone.captured is None:
            depths = () if engine.exits is None else engine.exits.depths
            engine.precision = capture_steps(engine.backbone, depths, engine.precision)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse (UserError): heads come from their folder, which records their backbone."""
        raise UserError("DecodingModule takes no checkpoint of the trainer. Leave out ckpt_path, and give model.heads.")

    @property
    def _task(self) -> Task:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, TaskData):
            raise UserError(
                f"DecodingModule decodes the examples of a task, but the data is {type(data).__name__}. Give it "
                f"TaskData with a task."
            )
        return data.task


def spec_facts(engine: Engine) -> dict[str, Any]:
    """A backbone's spec as JSON values; ``context`` is None where no length is too long."""
    spec = engine.backbone.spec
    return {**dataclasses.asdict(spec), "context": None if spec.context == UNBOUNDED else spec.context}


def check_trainer(trainer: Trainer, module: LightningModule, *, timed: bool) -> None:
    """Refuse a trainer under which a model would not compute as it was loaded, and the report would not show it.

    Raises:
        UserError: For several devices, a precision or a strategy of the trainer's own, and, if the run is ``timed``,
            a device without a clock.
    """
    one_device(trainer, module)
    precision, strategy, name = trainer.precision_plugin, trainer.strategy, type(module).__name__
    if type(precision) is not Precision:
        raise UserError(
            f"trainer.precision {precision.precision} ({type(precision).__name__}) would change what {name} computes "
            f"in. Leave trainer.precision out, and set model.dtype, such as bfloat16."
        )
    if not isinstance(strategy, SingleDeviceStrategy):
        raise UserError(
            f"{name} runs in one process on one device, as it was loaded; the trainer's strategy is "
            f"{type(strategy).__name__}. Leave trainer.strategy out."
        )
    kind = strategy.root_device.type
    if timed and kind not in ("cpu", "cuda"):
        raise UserError(
            f"test takes times, and there is no clock for the device {kind}. Set trainer.accelerator to cpu or cuda."
        )
