"""``test`` on a GPU: the demo's kind of run on a tiny model, latencies by CUDA events."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks.observers import ExitLatency
from dynamax.backbones.sources import Folder
from dynamax.data.tasks import TaskData
from dynamax.decoding.probe import CudaEvents, WallClock
from dynamax.heads.bank import Exit
from dynamax.heads.gates import LinearGate, MambaGate
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.policies.confidence import GateConfidence
from dynamax.policies.schedule import AtDepth, Never
from dynamax.tasks import Questions
from tests.devices import ACCELERATOR, DEVICE, missing
from tests.folders import model_folder

pytestmark = [pytest.mark.gpu, missing]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sweep_runs_and_is_timed_by_cuda_events(tmp_path: Path, dtype: str) -> None:
    exit_ = Exit(gates=[LinearGate, MambaGate])
    policies = [Sweep(Never()), Sweep(AtDepth(2)), Sweep(GateConfidence(0.5, gate="MambaGate"))]
    source = Folder(str(model_folder(tmp_path / "model")))
    on_gpu = DEVICE == "cuda"
    module = DecodingModule(source, policies, exits={2: exit_, 4: exit_}, dtype=dtype, compile=on_gpu)
    latency = ExitLatency(warmup=0)
    trainer = Trainer(
        accelerator=ACCELERATOR, devices=1, logger=False, enable_checkpointing=False, callbacks=[latency], max_epochs=1
    )
    for _ in range(2):  # a trainer that ends takes the model off its GPU
        trainer.test(module, datamodule=TaskData(Questions(limit=2, max_new_tokens=8)), verbose=False)
        assert module.results.environment["graphs"] == (3 * 4 if on_gpu else None)
        assert module.engine.backbone.captured is None
    full, never, early, _ = module.results.frontier
    assert type(latency._clock) is (CudaEvents if on_gpu else WallClock)
    assert never.agreement == 1.0
    assert early.blocks_per_token == 2
    assert full.ms_per_token > 0
    assert module.results.environment["cuda"] == (torch.version.cuda if on_gpu else None)
    assert all(exit_.latency_ms["p50"] > 0 for exit_ in module.results.exits)
