"""A real signal to a real process: the exit code is the signal's, and what is kept is told."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks import HeadsCheckpoint
from dynamax.commands.runs import DynamaxCLI

ROOT = Path(__file__).parents[2]
WAIT = 120
SLOW = """
import time
from lightning.pytorch import Callback


class Slow(Callback):
    \"\"\"Lets a run last, and says where it is.\"\"\"

    def on_validation_end(self, trainer, pl_module):
        print("validated", flush=True)

    def on_train_batch_end(self, trainer, pl_module, *rest):
        print("trained", flush=True)
        time.sleep(0.2)

    def on_test_batch_end(self, trainer, pl_module, *rest):
        print("tested", flush=True)
        time.sleep(60)

    def setup(self, trainer, pl_module, stage):
        print("set up", flush=True)
"""


@contextmanager
def started(place: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    (place / "slow.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{place}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dynamax", *arguments, "--trainer.callbacks+=slow.Slow"]
    with subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def heed_interrupts() -> None:
    """A shell starts what it runs in the background with Ctrl-C ignored, and a child would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped(process: subprocess.Popen, when: str, how: signal.Signals) -> tuple[int, str]:
    """Send a signal once the process says a word; its exit code and what it says of being stopped."""
    assert process.stdout is not None
    seen, end = b"", time.monotonic() + WAIT
    while when.encode() not in seen:
        assert time.monotonic() < end, seen
        if select.select([process.stdout], [], [], 1)[0]:
            seen += (more := os.read(process.stdout.fileno(), 4096))
            assert more, process.stderr.read().decode() if process.stderr else ""
    process.send_signal(how)
    errors = process.communicate(timeout=WAIT)[1].decode()
    assert "Traceback" not in errors
    return process.returncode, " ".join(line for line in errors.splitlines() if line.startswith("dynamax: "))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fit_that_is_stopped_tells_of_heads_and_store(place: Path, how: signal.Signals, code: int) -> None:
    with started(
        place, "fit", "-c", "fit.yaml", "--trainer.num_sanity_val_steps=0", "--trainer.max_epochs=99"
    ) as process:
        found, told = stopped(process, "validated", how)
    assert found == code
    assert f"stopped by {'SIGTERM' if code == 143 else 'Ctrl-C'}" in told
    assert "What is whole in store is kept" in told
    assert "the newest in heads/last" in told
    assert (place / "heads" / "last" / "heads.json").is_file()


@pytest.mark.slow
def test_fit_that_is_stopped_early_has_no_heads_and_says_so(place: Path) -> None:
    with started(place, "fit", "-c", "fit.yaml", "--trainer.num_sanity_val_steps=0") as process:
        found, told = stopped(process, "set up", signal.SIGTERM)
    assert found == 143
    assert "No heads had been saved to heads yet" in told
    assert "begins anew" in told


@pytest.mark.slow
def test_train_that_is_stopped_tells_of_its_checkpoint(place: Path) -> None:
    (place / "train.yaml").write_text(
        "model: {class_path: PretrainingModule, init_args: {config: {model_type: llama, num_hidden_layers: 2, "
        "hidden_size: 32, intermediate_size: 32, num_attention_heads: 2, num_key_value_heads: 2, "
        "max_position_embeddings: 64}, exits: [1], objective: NextToken}}\ndata: {init_args: {vocab: 300}}\n"
    )
    with started(place, "train", "-c", "training.yaml", "-c", "train.yaml", "--trainer.max_steps=400") as process:
        found, told = stopped(process, "validated", signal.SIGTERM)
    assert found == 143
    assert "--ckpt_path " in told
    assert Path(told.split("--ckpt_path ")[1].split()[0]).is_file()


@pytest.mark.slow
def test_a_test_that_is_stopped_has_no_report(place: Path) -> None:
    more = ["--model.heads=null", "--model.exits={2: {}}", "--model.policies=[{policy: Never, thresholds: []}]"]
    with started(place, "test", "-c", "test.yaml", *more) as process:
        found, told = stopped(process, "tested", signal.SIGTERM)
    assert found == 143
    assert "there is none of this run" in told
    assert not (place / "report" / "report.json").exists()


def test_heads_of_an_earlier_run_are_told_from_those_of_this(tmp_path: Path) -> None:
    checkpoint = HeadsCheckpoint(folder=str(tmp_path / "heads"))
    stopped_run: Any = SimpleNamespace(
        subcommand="fit", datamodule=None, trainer=SimpleNamespace(callbacks=[checkpoint])
    )
    assert DynamaxCLI._kept(stopped_run, time.time())[0] == f"No heads had been saved to {tmp_path / 'heads'} yet."
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "heads.json").write_text("{}")
    (told, _) = DynamaxCLI._kept(stopped_run, time.time() + 60)
    assert told == f"This run has saved no heads yet; those of an earlier run in {tmp_path / 'heads'} are as they were."
    (told, _) = DynamaxCLI._kept(stopped_run, time.time() - 60)
    assert told.startswith("Saved were the best heads so far")
    os.utime(tmp_path / "heads" / "heads.json", (0, 0))
    (tmp_path / "heads" / "last").mkdir()
    (tmp_path / "heads" / "last" / "heads.json").write_text("{}")
    (told, before, _) = DynamaxCLI._kept(stopped_run, time.time() - 60)
    assert told == f"Saved were the newest in {tmp_path / 'heads' / 'last'}."
    assert before == f"Those in {tmp_path / 'heads'} itself are of an earlier run."
