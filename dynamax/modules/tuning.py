"""``tune``: a pretrained model learns to be right earlier; its top is held to what it was. Knows lenses, no gates."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast, final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.sources import Folder, Source
from dynamax.backbones.tuned import TUNED, Tuned
from dynamax.data.batch import AnswerBatch
from dynamax.data.written import WrittenText
from dynamax.errors import UserError, at_least
from dynamax.heads.bank import Exit, ExitBank, same_head
from dynamax.heads.base import Lens
from dynamax.heads.saved import WEIGHTS
from dynamax.metrics.environment import environment
from dynamax.metrics.language import DepthScores
from dynamax.modules.adapter import LowRank, blocks_of
from dynamax.modules.export import in_float16, put
from dynamax.modules.language import LanguageModule, described
from dynamax.modules.pretraining import check_exits
from dynamax.modules.schedule import Optimiser
from dynamax.objectives.tuning import TuningLoss, counted_logits
from dynamax.paths import InputPath
from dynamax.types import Span


@final
class TuningModule(LanguageModule):
    """Tunes a pretrained model so that its exits say what its top says.

    Exits are read by the logit lens, or through lenses that were trained for the model as it was and train along: they
    begin where ``fit`` ended, and the model need not learn what an affine map can do.

    Checkpoints hold what is trained and its optimiser; ``ckpt_path`` resumes an interrupted run, with the text that
    comes next. Needs ``WrittenText`` by the same model. Validation reads every exit and the top beside the original,
    and then the model as it is goes to ``export``.

    Several devices share each batch: ``ddp_find_unused_parameters_true`` keeps the model on each of them,
    ``ModelParallelStrategy`` its blocks in shards (FSDP2), for an adapter. Losses are means over the whole batch, so a
    run has the same losses on any number of devices.

    Args:
        backbone: Where the model comes from.
        exits: Depths that are tuned and read beside the top: blocks completed.
        adapter: What is trained: a low-rank adapter, of which the export holds nothing but the adapter; null for every
            weight, and a whole model.
        loss: What is trained towards.
        heads: Folder of heads of the model; their lenses read the exits and train along, and are written with the tuned
            model, to the folder ``heads`` in it. Left out, exits are read by the logit lens.
        seed: Of the adapter's first weights.
        learning_rate: Peak.
        warmup: Steps over which the learning rate rises.
        flat: Part of all steps, in [0, 1], after which it falls in a straight line to 0.
        weight_decay: Of AdamW, on matrices; vectors have none.
        export: Folder to write the tuned model to; none is written if left out.

    Attributes:
        backbone: The model in training; there once ``configure_model`` has run.

    Raises:
        UserError: If an option is out of range; when fitting, if the model has not what is asked of it, the text is
            another model's, or PEFT is not installed.
    """

    notes: ClassVar[str] = "tuning"
    report: ClassVar[str] = TUNED

    def __init__(
        self,
        backbone: Source,
        exits: list[int],
        adapter: LowRank | None,
        loss: TuningLoss,
        *,
        heads: InputPath | None = None,
        seed: int = 0,
        learning_rate: float = 5e-4,
        warmup: int = 50,
        flat: float = 0.5,
        weight_decay: float = 0.0,
        export: str | None = None,
    ) -> None:
        optimiser = Optimiser(learning_rate, warmup, flat, weight_decay)
        super().__init__(sorted(exits), optimiser, compile=False, export=export, prompts=None)
        if adapter is not None:
            at_least(adapter, 1, rank=adapter.rank)
            if not 0 < adapter.alpha < float("inf"):
                raise UserError(f"The adapter was given alpha {adapter.alpha}; it must be positive and finite.")
        self.heads = None if heads is None else str(heads)
        self.lenses = nn.ModuleDict()
        self.source, self.adapter, self.objective, self.seed = backbone, adapter, loss, seed
        self.strict_loading = False  # what is not trained is in no checkpoint
        self._loaded: tuple[HFBackbone, ...] = ()  # in a tuple, so that it is no submodule

    # -- the model before and in training -----------------------------------------------------------------

    @property
    def original(self) -> HFBackbone:
        """The model as it was, frozen; with an adapter, its tensors are those of the model in training."""
        return self._loaded[0]

    def check(self, trainer: Trainer) -> None:
        """Load the model too, so that mistakes in what is asked of it show before text is written.

        Raises:
            UserError: If training could not end well, or the model has not what is asked of it.
        """
        super().check(trainer)
        self.processes = trainer.world_size
        self._load(trainer)

    def check_devices(self, trainer: Trainer) -> None:
        """Raise a UserError for a strategy under which processes would not train one model towards one loss."""
        strategy, found, remedy = trainer.strategy, "", ""
        if isinstance(strategy, ModelParallelStrategy):
            if self.adapter is None or self.heads is not None:
                found = "shards blocks, and what is trained outside of them would differ from process to process"
                remedy = "Give an adapter and no heads, or use ddp_find_unused_parameters_true"
            elif strategy._tensor_parallel_size != 1 or strategy._save_distributed_checkpoint:
                found = "is to share out the rows of a batch, and to write checkpoints that one process can read"
                remedy = "Use configs/trainer/fsdp.yaml"
        elif trainer.world_size > 1:
            unused = isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("find_unused_parameters")
            if not unused:
                found = "does not suit: each step leaves out blocks and exits"
                remedy = "Set trainer.strategy to ddp_find_unused_parameters_true, or use configs/trainer/fsdp.yaml"
        if found:
            raise UserError(
                f"TuningModule was given {trainer.world_size} devices and the strategy {type(strategy).__name__}, "
                f"which {found}. {remedy}."
            )

    def check_data(self, data: object) -> None:
        """Raise a UserError for data of another class, for text that another model wrote or processes cannot share."""
        if not isinstance(data, WrittenText):
            raise UserError(f"TuningModule was given data of {type(data).__name__}; give it WrittenText.")
        writer = data.train.identities[0]["writer"]
        if writer != self.original.spec.fingerprint:
            raise UserError(
                f"The text is written by a model with fingerprint {writer}, and the model to tune has "
                f"{self.original.spec.fingerprint}. Set data.writer to what model.backbone is."
            )
        if self.processes > 1:
            data.check_processes(self.processes)

    def _load(self, trainer: Trainer) -> None:
        if self._loaded:
            return
        loaded = self.source.load(device=str(trainer.strategy.root_device))
        if not isinstance(loaded, HFBackbone):
            raise UserError(f"The model is a {type(loaded).__name__}; a model of transformers is wanted. Name one.")
        self.exits = check_exits(self.exits, loaded.spec.depth)
        self._loaded, self.context = (loaded,), loaded.spec.context
        if self.adapter is not None:
            self.adapter.config(loaded)
        if self.heads is not None:
            bank = ExitBank.load(self.heads, loaded.site).to(loaded.output_matrix.device)
            missing = sorted(set(self.exits) - set(bank.depths))
            if missing:
                raise UserError(
                    f"Exits at {self.exits} are to be tuned, but the heads in {self.heads} stand at "
                    f"{list(bank.depths)}. Train heads at {missing}, or leave these exits out."
                )
            self.lenses.update({str(depth): bank.lens(depth) for depth in self.exits})

    def build(self) -> HFBackbone:
        """The model with an adapter that changes nothing yet; or a copy of it, if every weight is trained."""
        self._load(self.trainer)
        if self.adapter is not None:
            tuned = self.adapter.around(self.original, self.seed)
            if self._sharded:
                mesh = cast(ModelParallelStrategy, self.trainer.strategy).device_mesh["data_parallel"]
                for block in (*blocks_of(tuned), *blocks_of(self.original)):  # no block is a part of another's call
                    fully_shard(block, mesh=mesh, reshard_after_forward=True)
            return tuned
        model, fingerprint = copy.deepcopy(self.original.model), self.original.spec.fingerprint
        return HFBackbone(model, fingerprint=fingerprint).requires_grad_(True)

    @property
    def _sharded(self) -> bool:
        """Whether each process holds a part of every block."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    @property
    def _lenses(self) -> dict[int, Lens]:
        """What exits are read through, by depth."""
        return {int(depth): cast(Lens, lens) for depth, lens in self.lenses.items()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See ``Optimiser``; lenses train along."""
        steps = int(self.trainer.estimated_stepping_batches)
        return self.optimiser.over([*self.backbone.parameters(), *self.lenses.parameters()], steps)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in this module."""
        return {name: each for name, each in self.named_parameters() if each.requires_grad}

    # -- steps --------------------------------------------------------------------------------------------

    def batch_loss(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this process's rows beside the original, scaled so that the processes' mean is the batch's."""
        rank, processes = self.global_rank, self.trainer.world_size
        mine = AnswerBatch(*(each[rank::processes] for each in batch))
        loss, seen = self.objective.loss(self.backbone, self.original, mine, self.exits, self.global_step, self._lenses)
        share = processes * mine.counted_BT.sum() / batch.counted_BT.sum()  # losses are means over counted positions
        means = self.trainer.strategy.reduce(torch.stack([*seen.values()]) * share, reduce_op="mean")
        return loss * share, dict(zip(seen, cast(Tensor, means), strict=True))

    def size(self, batch: AnswerBatch) -> tuple[int, int]:
        """Documents, and tokens of their answers."""
        return len(batch.tokens_BT), int(batch.counted_BT.sum())

    def count(self, scores: DepthScores, backbone: HFBackbone, batch: AnswerBatch) -> None:
        """Read every depth at the counted positions, and compare with the original's top."""
        states = backbone.walk(backbone.embed(batch.tokens_BT), scores.depths)
        lenses, at = self._lenses, batch.counted_BT
        logits = [counted_logits(backbone, h_BTD, at, lenses.get(depth)) for depth, h_BTD in states]
        scores.predicted(logits, batch.next_N)
        whole = Span(0, self.original.spec.depth)
        h_BTD = self.original.run(self.original.embed(batch.tokens_BT), whole)
        scores.compared(logits, counted_logits(self.original, h_BTD, batch.counted_BT))

    @torch.no_grad()
    def measure(self, backbone: HFBackbone) -> dict[int, dict[str, float]]:
        """Scores of a backbone on the held-out text, by depth; see ``DepthScores``."""
        scores = DepthScores([*self.exits, backbone.spec.depth])
        for batch in self.data.val_dataloader():
            self.count(scores, backbone, AnswerBatch(*(each.to(self.device) for each in batch)))
        return scores.compute()

    def on_train_start(self) -> None:
        """Measure the model before its first step."""
        if not self.record.scores:
            self.record.scores[0] = found = self.measure(self.backbone)
            shown = ", ".join(f"{score['agreement']:.3f} at {depth}" for depth, score in found.items())
            self.print(f"Before tuning, agreement with the top on held-out answers: {shown}")
        super().on_train_start()

    def on_validation_epoch_end(self) -> None:
        """Also write the model as it is."""
        super().on_validation_epoch_end()
        fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if fitting and self.export is not None and not cast(Any, self.trainer).fast_dev_run:
            self._put(self.export, self.facts())

    # -- checkpoints --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained alone."""
        super().on_save_checkpoint(checkpoint)
        if self.adapter is not None:
            names = self.trained()
            checkpoint["state_dict"] = {n: each for n, each in checkpoint["state_dict"].items() if n in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuse a checkpoint that lacks something of what is trained."""
        super().on_load_checkpoint(checkpoint)
        if self._sharded:
            return  # the strategy has loaded the weights, and taken them out
        if set(self.trained()) - set(checkpoint["state_dict"]):
            raise UserError("The checkpoint lacks weights that are trained here: it is damaged. Give an earlier one.")

    def identity(self) -> dict[str, Any]:
        """Model, adapter and loss."""
        return {
            "model": self.original.spec.fingerprint,
            "adapter": None if self.adapter is None else asdict(self.adapter),
            "objective": described(self.objective),
            "lenses": None if self.heads is None else self.heads_digest(),
            "seed": self.seed,
            "sharded": self._sharded or None,  # its optimiser's state is numbered otherwise
        }

    def heads_digest(self) -> str:
        """Hash of the heads that were given."""
        return hashlib.sha256((Path(str(self.heads)) / WEIGHTS).read_bytes()).hexdigest()[:16]

    def text_identity(self) -> dict[str, Any]:
        """Writer, prompts and sampling."""
        return self.data.order

    # -- what is written ----------------------------------------------------------------------------------

    def origin(self) -> dict[str, Any]:
        """Base, adapter and loss."""
        spec = self.original.spec
        return {
            "base": self.source.recipe,
            "base_fingerprint": spec.fingerprint,
            "family": spec.family,
            **self.identity(),
        }

    def write(self, folder: str, facts: dict[str, Any]) -> None:
        """Write the model, load it again, and measure these very files; every process measures, one writes."""
        self._put(folder, facts)
        self.trainer.strategy.barrier()
        source = Folder(folder) if self.adapter is None else Tuned(folder, self.source)
        written = source.load(device=str(self.device))
        after = self.measure(written)
        report = self._put(folder, facts, after, written.spec.fingerprint)
        if not self.trainer.is_global_zero:
            return
        if self.lenses:
            exits = {depth: Exit(partial(same_head, copy.deepcopy(lens))) for depth, lens in self._lenses.items()}
            ExitBank(exits, written.site).save(Path(folder) / "heads", written.spec, source.recipe)
            print(f"Wrote the lenses to {Path(folder) / 'heads'}")
        print(f"Wrote the model to {folder}. On held-out answers, before and after:")
        for depth, scores in after.items():
            before = report["before"][str(depth)]
            agreement = f"agrees with its own top {before['agreement']:.3f} -> {scores['agreement']:.3f}"
            original = f"with the original's {before['fidelity']:.3f} -> {scores['fidelity']:.3f}"
            loss = f"loss {before['loss']:.4f} -> {report['after'][str(depth)]['loss']:.4f}"
            print(f"  {depth:>3}: {agreement}, {original}; {loss}")
        print(f"Next: dynamax fit -c configs/demo/fit.yaml --model.backbone {type(source).__name__} ...")

    @torch.no_grad()
    def _put(
        self,
        target: str,
        facts: dict[str, Any],
        after: Mapping[int, dict[str, float]] | None = None,
        fingerprint: str | None = None,
    ) -> dict[str, Any]:
        """Put model and report in their place, whole or not at all; shards are gathered from every process.

        Args:
            target: The folder; an earlier export there is replaced, and what else lies there stays.
            facts: How it was trained.
            after: Scores of the files themselves; left out, those of the newest validation.
            fingerprint: Of the model that the files are.

        Returns:
            The report; empty in a process that is not the first, which writes.
        """
        self._check_finite()
        tensors = {} if self.adapter is None else self.adapter.tensors(self.backbone)
        if not self.trainer.is_global_zero:
            return {}
        folder = Path(target)
        folder.parent.mkdir(parents=True, exist_ok=True)
        newest = self.record.scores[max(self.record.scores)]
        report: dict[str, Any] = {
            **facts,
            "fingerprint": fingerprint,
            "text": self.text_identity(),
            "environment": environment(self.device.type, dtype="float32", batch=self.data.rows),
            "before": with_loss(self.record.scores[0]),
            "after": with_loss(newest if after is None else after),
            "measured": "in training" if after is None else "these files",
        }
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            if self.adapter is None:
                half = in_float16(self.backbone)
                half.generation_config = self.original.model.generation_config
                half.save_pretrained(fresh)
                self.source.tokenizer().save_pretrained(fresh)
            else:
                report["adapter_sha256"] = self.adapter.write(fresh, tensors, self.original, self.source.recipe)
            report["files"] = sorted([*(path.name for path in fresh.iterdir()), TUNED])
            (fresh / TUNED).write_text(json.dumps(report, indent=1), "utf-8")
            put(fresh, folder, Path(scratch) / "before", TUNED)
        return json.loads(json.dumps(report))


def with_loss(scores: Mapping[int, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Scores by depth with the mean cross-entropy in nats, as a report has them."""
    found = {
        depth: torch.tensor(score["perplexity"], dtype=torch.float64).log().item() for depth, score in scores.items()
    }
    return {str(depth): {"loss": found[depth], **score} for depth, score in scores.items()}
