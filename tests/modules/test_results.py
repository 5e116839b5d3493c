"""Measurements belong to one test run; options of module and trainer are used or refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from transformers import GenerationConfig

from callbacks import ExitLatency
from dynamax.backbones.skipped_state import Propagate
from dynamax.backbones.sources import Folder
from dynamax.data.tasks import TaskData
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.sampling import Greedy, Sampled
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.modules import results
from dynamax.modules.decoding import Sweep
from dynamax.policies.confidence import MaxProb
from dynamax.tasks import Perplexity
from dynamax.tasks.base import Task
from tests.folders import model_folder
from tests.modules.decoded import QUIET, TwoWays, module, questions, ran


class Riddle(Task):
    """Of no known kind."""

    headline = "none"

    def examples(self) -> list[str]:
        return ["?"]

    def aggregate(self, scores: Any) -> dict[str, float]:  # noqa: ANN401
        return {"none": 0.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(str(model_folder(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def text(tmp_path: Path) -> Perplexity:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    return Perplexity(str(tmp_path / "text.txt"))


# -- one run --------------------------------------------------------------------------------------------


def untimed(found: results.DecodingResults) -> dict[str, Any]:
    """All that is the same whenever it is measured."""
    whole = found.as_json()
    for row in (*whole["frontier"], *whole["bounds"]):
        assert (row.pop("ms_per_token") is None) == (row.pop("speed_up") is None)
    for row in whole["exits"]:
        del row["latency_ms"]
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [None, Sampled(1.0, seed=4)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("decoder", [EarlyExit, partial(SelfSpeculative, draft_limit=3)], ids=["early", "drafted"])
def test_a_second_run_finds_what_the_first_one_found(source: Folder, decoder: Any, sampler: Any) -> None:  # noqa: ANN401
    watch = ExitLatency(warmup=0)
    built = module(source, decoder=decoder, sampler=sampler, timed=2)
    clocks, found = [], []
    for _ in range(2):
        ran(built, questions(), watch)
        assert watch._clock is not None
        times = watch._clock.read()
        clocks.append({kind: {d: len(ms) for d, ms in by_depth.items()} for kind, by_depth in times.items()})
        found.append(untimed(built.results))
    assert found[0] == found[1]
    assert clocks[0] == clocks[1]
    rows = found[0]["frontier"]
    ends, tokens = sum(clocks[0]["end"].values()), sum(row["timed_tokens"] for row in rows[1:])
    assert ends == tokens > 0 if decoder is EarlyExit else ends > tokens > 0, "rejected drafts end too"
    assert rows[0]["timed_tokens"] == sum(row["timed_tokens"] for row in rows[1:])


@pytest.mark.slow
def test_another_task_leaves_nothing_of_the_first(source: Folder, text: Perplexity) -> None:
    built = module(source)
    ran(built, questions())
    again = untimed(ran(built, text).results)
    assert again == untimed(ran(module(source), text).results)


@pytest.mark.slow
def test_a_run_without_examples_has_no_results(source: Folder) -> None:
    built = ran(module(source), questions())
    assert built.results.task.examples == 3
    ran(built, questions(), limit_test_batches=0)
    assert "results" not in vars(built), "those of the run before are of another run"


@pytest.mark.slow
def test_the_examples_that_ran_are_counted(source: Folder) -> None:
    assert ran(module(source), questions(), limit_test_batches=2).results.task.examples == 2


# -- options are used or refused -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [None, SelfSpeculative, partial(EarlyExit, skipped_state=Propagate())])
def test_so_many_examples_are_timed(source: Folder, decoder: Any) -> None:  # noqa: ANN401
    found = {
        timed: ran(module(source, Sweep(MaxProb(0.02)), decoder=decoder, timed=timed), questions()).results.frontier[1]
        for timed in (0, 1, 3)
    }
    assert (found[0].timed_tokens, found[0].ms_per_token, found[0].flops_fraction) == (0, None, None)
    assert 0 < found[1].timed_tokens < found[3].timed_tokens == found[3].tokens
    for row in found.values():
        same = replace(found[3], **{name: getattr(row, name) for name in TIMED})
        assert replace(same, blocks_per_token=None) == replace(row, blocks_per_token=None)
        assert row.blocks_per_token is not None


TIMED = ("timed_tokens", "ms_per_token", "speed_up", "flops_fraction", "bytes_fraction")


@pytest.mark.slow
def test_drafts_are_the_same_whatever_is_timed(source: Folder) -> None:
    """A sampler begins anew for each decoding, not where the one before has left it."""
    options = {"decoder": partial(SelfSpeculative, draft_limit=3), "sampler": Sampled(1.0, seed=4)}
    rows = [
        ran(module(source, Sweep(MaxProb(0.02)), timed=timed, **options), questions()).results.frontier[1]
        for timed in (0, 3)
    ]
    assert rows[0].drafts_kept == rows[1].drafts_kept
    assert rows[0].drafts_kept is not None
    assert rows[0].depth_counts == rows[1].depth_counts


@pytest.mark.slow
def test_the_chat_template_is_used(source: Folder) -> None:
    plain, asked = (ran(module(source, chat=chat), questions()).results for chat in (None, True))
    assert (plain.decoding.chat, asked.decoding.chat) == (False, True)
    assert [row.agreement for row in plain.exits] != [row.agreement for row in asked.exits]


@pytest.mark.slow
def test_the_sampler_is_used(source: Folder) -> None:
    greedy = ran(module(source), questions()).results
    sampled = ran(module(source, sampler=Sampled(1.0, seed=4)), questions()).results
    assert sampled.decoding.sampler == {"name": "Sampled", "temperature": 1.0, "top_k": None, "top_p": 1.0, "seed": 4}
    assert greedy.frontier[0].depth_counts != sampled.frontier[0].depth_counts


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chat": True}, "chat would"),
        ({"sampler": Greedy()}, "sampler would"),
        ({"timed": 2}, "timed would"),
        ({"chat": True, "timed": 2}, "chat and timed would"),
    ],
)
@pytest.mark.parametrize("kind", ["choices", "text"])
def test_what_likelihoods_cannot_use_is_refused(kind: str, text: Perplexity, options: dict, named: str) -> None:
    task = TwoWays() if kind == "choices" else text
    with pytest.raises(ValueError, match=f"scores likelihoods of plain text, so {named} change nothing"):
        ran(module(Folder("not looked at"), **options), task)


def test_a_models_rules_of_generation_are_for_tasks_that_generate(tmp_path: Path, text: Perplexity) -> None:
    folder = model_folder(tmp_path / "model")
    GenerationConfig(repetition_penalty=1.3, eos_token_id=0).save_pretrained(folder)
    built = module(Folder(str(folder)))
    assert ran(built, text).results.frontier[0].score is not None
    with pytest.raises(ValueError, match="repetition_penalty=1.3 stands in the model's generation_config"):
        ran(built, questions())


def test_a_task_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="Riddle is neither a GenerationTask nor a ChoiceTask nor a TextTask"):
        ran(module(Folder("not looked at")), Riddle())


def test_data_without_a_task_is_refused() -> None:
    built = module(Folder("not looked at"))
    built.trainer = Trainer(**QUIET)
    built.trainer.datamodule = LightningDataModule()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="the data is LightningDataModule.*TaskData"):
        built.setup("test")


def test_predict_refuses_likelihoods_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="TwoWays asks for likelihoods. Use test"):
        Trainer(**QUIET).predict(module(Folder("not looked at")), datamodule=TaskData(TwoWays()))


# -- a trainer that would change what is measured ------------------------------------------------------------


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"precision": "bf16-mixed"}, "precision bf16-mixed.*model.dtype"),
        ({"precision": "bf16-true"}, "precision bf16-true.*model.dtype"),
        ({"precision": "64-true"}, "precision 64-true.*model.dtype"),
        ({"plugins": [DoublePrecision()]}, "DoublePrecision.*model.dtype"),
        ({"strategy": "ddp", "devices": 1}, "DDPStrategy. Leave trainer.strategy out"),
    ],
)
def test_it_is_refused_before_anything_is_loaded(stage: str, options: dict, wanted: str) -> None:
    built = module(Folder("not looked at"))
    built.trainer = Trainer(**{**QUIET, **options})
    built.trainer.datamodule = TaskData(questions())  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=wanted):
        built.setup(stage)


def test_a_device_without_a_clock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    built = module(Folder("not looked at"))
    built.trainer = Trainer(**QUIET)
    built.trainer.datamodule = TaskData(questions())  # type: ignore[attr-defined]
    monkeypatch.setattr(type(built.trainer.strategy), "root_device", torch.device("mps"))
    with pytest.raises(ValueError, match="no clock for the device mps. Set trainer.accelerator to cpu or cuda"):
        built.setup("test")
    built.setup("predict")


@pytest.mark.slow
def test_what_the_model_computes_in_is_reported(source: Folder) -> None:
    found = ran(module(source, dtype="bfloat16"), questions()).results
    assert found.environment["dtype"] == "bfloat16"
    assert ran(module(source), questions(), deterministic=True).results.environment["deterministic"] is True
    torch.use_deterministic_algorithms(False)


def test_a_checkpoint_of_the_trainer_is_refused(source: Folder, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.4", "loops": {}}, tmp_path / "some.ckpt")
    trainer = Trainer(**QUIET)
    with pytest.raises(ValueError, match="no checkpoint of the trainer. Leave out ckpt_path"):
        trainer.test(module(source), datamodule=TaskData(questions()), ckpt_path=tmp_path / "some.ckpt")
