"""What each of two processes does in ``test_tuning_processes``: tune a tiny model, and leave what it found."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from dynamax.backbones.sources import Folder
from dynamax.data.generated import SelfGenerated
from dynamax.data.written import WrittenText
from dynamax.modules.adapter import LowRank
from dynamax.modules.tuning import TuningModule
from dynamax.objectives.tuning import ExitTuning
from tests.modules.languages import trainer

STEPS, STOPPED = 6, 4
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(find_unused_parameters=True, process_group_backend="gloo"),
    "fsdp": lambda: ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    ),
}


def text(place: Path) -> WrittenText:
    asked = [SelfGenerated(questions=20, passages=0, documents=16, max_new_tokens=6, batch=8)]
    options = {"folder": str(place / "text"), "rows": 4, "validation": 0.5, "validation_documents": 4}
    return WrittenText(Folder(str(place / "base")), asked, **options)


def tune(place: Path, name: str, *, steps: int = STEPS, ckpt_path: Path | None = None, **options: Any) -> TuningModule:
    """One run; each has a folder of its own, whose ``written`` lists the files that this process put there."""
    seed_everything(0, verbose=False)
    module = TuningModule(
        Folder(str(place / "base")),
        [1, 3],
        LowRank(2, 4.0),
        ExitTuning(dropout=0.3),
        warmup=2,
        learning_rate=1e-2,
        export=str(place / name / "model"),
    )
    saving = ModelCheckpoint(dirpath=place / name / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    fitter = trainer(place / name, saving, steps=steps, val_check_interval=3, **options)
    fitter.fit(module, datamodule=text(place), ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return module


def member(rank: int, port: int, place: Path) -> None:
    """One of two processes: every strategy, and a run of each that goes on where a checkpoint was saved."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    for name, strategy in STRATEGIES.items():
        whole = tune(place, name, strategy=strategy(), devices=2)
        saved = next((place / name / "checkpoints").glob(f"*step={STOPPED}.ckpt"))
        resumed = tune(place, f"{name}-resumed", strategy=strategy(), devices=2, ckpt_path=saved)
        for module, run in ((whole, name), (resumed, f"{name}-resumed")):
            found = {"losses": [float(loss) for loss in module.record.losses], "tokens": module.record.tokens}
            held = sum(each.numel() for each in module.original.model.model.layers.parameters())
            local = [getattr(each, "_local_tensor", each) for each in module.original.model.model.layers.parameters()]
            found |= {"scores": module.record.scores, "share": sum(each.numel() for each in local) / held}
            torch.save(found, place / f"{run}-{rank}.pt")
    torch.distributed.destroy_process_group()


def both(place: Path) -> list[int | None]:
    """Run two processes, and give their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.modules.processes"])  # so that imports are paid once
    members = [context.Process(target=member, args=(rank, port, place)) for rank in range(2)]
    for each in members:
        each.start()
    for each in members:
        each.join(300)
        each.kill()
    return [each.exitcode for each in members]
