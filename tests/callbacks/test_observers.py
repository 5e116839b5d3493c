"""Every observer on real runs: what they print, what reaches the loggers, whom they refuse."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import ExitAccuracy, ExitDepth, ExitFrontier, ExitLatency
from dynamax.backbones.sources import Folder
from dynamax.modules.results import percentiles
from tests.callbacks.conftest import evaluated, trained


def names_in_csv(folder: Path) -> set[str]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return set(next(csv.reader(file)))


def names_in_tensorboard(folder: Path) -> set[str]:
    (path,) = folder.rglob("events.*")
    events = EventAccumulator(str(path))
    events.Reload()
    return set(events.Tags()["scalars"])


LOGGERS: dict[str, tuple[Callable[[Path], Logger], Callable[[Path], set[str]]]] = {
    "csv": (lambda folder: CSVLogger(folder), names_in_csv),
    "tensorboard": (lambda folder: TensorBoardLogger(folder), names_in_tensorboard),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOGGERS)
def test_a_watched_test_reaches_the_logger_and_the_terminal(
    tiny_source: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make, names = LOGGERS[kind]
    watching = [ExitAccuracy(), ExitDepth(), ExitLatency(warmup=0), ExitFrontier()]
    trainer, module = evaluated(tiny_source, tmp_path, watching, [make(tmp_path)])
    assert {
        "exits/agreement",
        "exits/auroc_MambaGate",
        "depth/MaxProb/share_at_2",
        "depth/Never/blocks_per_token",
        "latency/mark_p50_ms",
        "latency/end_p95_ms",
        "latency/prefill_p50_ms",
        "frontier/MaxProb/agreement",
        "frontier/MaxProb/speed_up",
        "frontier/Never/flops_fraction",
    } <= names(tmp_path)
    shown = capsys.readouterr().out
    for words in ("Share of tokens that leave", "Latency, ms", "each policy beside the full model", "at 0.9", "exit 4"):
        assert words in shown
    assert max(len(line) for line in shown.splitlines() if "Wrote" not in line) <= 80
    assert (Path(trainer.log_dir or "") / "report.json").is_file()


@pytest.mark.slow
def test_latency_is_of_every_policy_and_grows_with_depth(tiny_source: Folder, tmp_path: Path) -> None:
    watch = ExitLatency(warmup=0)
    _, module = evaluated(tiny_source, tmp_path, [watch])
    assert watch._clock is not None
    times = watch._clock.read()
    rows = module.results.frontier[1:]
    steps = sum(len(times["end"].get(depth, [])) for depth in (2, 4, 6))
    assert steps == sum(row.timed_tokens for row in rows)
    assert len(times["mark"][2]) == steps
    assert set(times["prefill"]) == {6}
    assert percentiles(times["mark"][2])[0] < percentiles(times["mark"][4])[0]


@pytest.mark.parametrize("observer", [ExitDepth(), ExitLatency(), ExitFrontier()])
def test_observers_of_decoding_refuse_training(tiny_source: Folder, tmp_path: Path, observer: Callback) -> None:
    _, module = trained(tiny_source, tmp_path, [])
    with pytest.raises(ValueError, match="watches decoding, but the model is HeadsModule"):
        observer.on_test_end(None, module) if not isinstance(observer, ExitLatency) else observer.on_test_start(
            None, module
        )


def test_percentiles_are_numpys() -> None:
    import numpy

    times = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    assert percentiles(times) == pytest.approx(tuple(numpy.percentile(times, [50, 95])))
    assert percentiles([7.0]) == (7.0, 7.0)


def test_a_warmup_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup -1"):
        ExitLatency(warmup=-1)
