"""Every YAML under ``configs/`` is parsed and what it names is built; the entry points name every class there is."""

from __future__ import annotations

import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from unittest.mock import Mock

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from dynamax.backbones.sources import Source
from dynamax.calibration.task import parted, usable
from dynamax.cli import main
from dynamax.commands import calibrate, generate, runs, serve_cloud, serve_edge
from dynamax.commands.parsing import Parser, prepare
from dynamax.data.answers import Answers
from dynamax.data.language import LanguageData
from dynamax.data.text import TextSource
from dynamax.data.written import WrittenText
from dynamax.heads import Exit, ExitBank
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.modules.distilling import DistillationModule
from dynamax.modules.pretraining import PretrainingModule
from dynamax.modules.tuning import TuningModule
from dynamax.objectives.base import Objective
from dynamax.objectives.early_exit import LayerSkip, NextToken
from dynamax.objectives.tuning import ExitTuning
from dynamax.policies import ScorePolicy
from dynamax.registry import ALL, CALLBACKS, FAMILIES, POLICIES, Registry
from dynamax.tasks.base import Task
from dynamax.testing import toy_site

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PARTS: dict[str, type] = {
    "backbone": Source,
    "exits": Exit,
    "objective": Objective,
    "policy": Sweep,
    "task": Task,
    "text": TextSource,
}
COMMANDS = {"fit": "fit", "test": "test", "evaluate": "test", "generate": "generate"}
SIBLINGS = "siblings"
"""Whole runs of ``train``; those in ``plain`` and ``shallow`` lie over others, ``text.yaml`` is a part of them."""
DISTILL = "distill"
"""Whole runs of ``distill``; ``text.yaml`` is a part of them."""
TUNE = "tune"
"""Whole runs of ``tune``, and of ``fit`` and ``test`` behind it."""
JOINT = "jei-dnn"
"""Runs of ``fit`` and ``test``; other files lie over ``fit.yaml``."""
CALIBRATE = "calibrate"
"""Options of ``calibrate``."""
LAYERSKIP = "layerskip"
"""Runs on checkpoints trained with LayerSkip; ``early-exit.yaml`` lies over ``test.yaml``."""
PUBLISHED = ("mistral-7b", "codestral-7b")
"""DYNAMAX's runs; other files lie over ``test.yaml``."""
SERVE = "serve"
"""Options of ``serve cloud`` and ``serve edge``."""
SWEEP = "sweep"
"""Lie over ``demo/test.yaml``."""
TABLES = (ROOT / "docs/dynamax-tables.md").read_text()
LAYERSKIP_TABLE = (CONFIGS / LAYERSKIP / "generate.yaml").read_text()
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def named(kind: str) -> list[str]:
    return [name for name in FILES if name.startswith(f"{kind}/")]


def test_every_file_is_of_a_known_kind() -> None:
    runs_found = [name for name in FILES if Path(name).stem in COMMANDS]
    assert {Path(name).parts[0] for name in set(FILES) - set(runs_found)} == {
        *PARTS,
        "trainer",
        SIBLINGS,
        DISTILL,
        TUNE,
        JOINT,
        CALIBRATE,
        LAYERSKIP,
        *PUBLISHED,
        SERVE,
        SWEEP,
    }
    assert {"demo/fit.yaml", "demo/test.yaml", "demo/generate.yaml"} <= set(runs_found)


@pytest.mark.parametrize("name", [name for kind in PARTS for name in named(kind)])
def test_a_part_is_built(name: str) -> None:
    prepare()
    kind = PARTS[Path(name).parts[0]]
    parser = Parser()
    parser.add_argument("--part", type=kind, sub_configs=True)
    part = parser.instantiate(parser.read_arguments(["--part", str(CONFIGS / name)])).part
    assert isinstance(part, kind)
    if isinstance(part, Exit):
        assert ExitBank({2: part}, lambda depth: toy_site(depth=depth)).depths == (2,)
    if isinstance(part, Sweep):
        assert part.points()


@pytest.mark.slow
def test_every_policy_has_a_file_and_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's own; the run that sweeps them takes a file of each, and has no two points of one name."""
    ours = {point.name for point in POLICIES.points() if point.value.startswith("dynamax.")}
    prepare()
    parser = Parser()
    parser.add_argument("--part", type=Sweep, sub_configs=True)
    parts = [
        parser.instantiate(parser.read_arguments(["--part", str(CONFIGS / name)])).part for name in named("policy")
    ]
    assert {type(part.policy).__name__ for part in parts} == ours
    run = built(monkeypatch, "test", "-c", str(CONFIGS / "demo/test.yaml"), "-c", str(CONFIGS / "sweep/policies.yaml"))
    assert isinstance(run.model, DecodingModule)
    assert {type(policy).__name__ for policy in run.model.policies} == ours
    for policy in run.model.policies:
        policy.validate([15, 19, 23, 27])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if COMMANDS.get(Path(name).stem) in {"fit", "test"}])
def test_a_run_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[runs.DynamaxCLI] = []
    monkeypatch.setattr(runs.DynamaxCLI, "_run_subcommand", lambda self, _: built.append(self))
    with pytest.raises(SystemExit) as ended:
        main([COMMANDS[Path(name).stem], "-c", str(CONFIGS / name)])
    assert ended.value.code == 0
    assert built[0].model is not None
    assert built[0].datamodule is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in named(JOINT) if Path(name).stem not in COMMANDS])
def test_what_lies_over_a_joint_run_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[runs.DynamaxCLI] = []
    monkeypatch.setattr(runs.DynamaxCLI, "_run_subcommand", lambda self, _: built.append(self))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "-c", str(CONFIGS / JOINT / "fit.yaml"), "-c", str(CONFIGS / name)])
    assert ended.value.code == 0
    assert (len(built[0].model.alternate) > 0) == (Path(name).stem != "separate")


@pytest.mark.parametrize("name", named(CALIBRATE))
def test_a_calibration_is_built(name: str) -> None:
    given = calibrate.options(["calibrate", "runs/demo/heads", "-c", str(CONFIGS / name)])
    assert isinstance(given["policy"], ScorePolicy)
    if given["task"] is None:
        assert isinstance(given["text"], TextSource)
    else:
        assert given["text"] is None
        assert all(parted(usable(given["task"]), given["share"]))
    assert given["out"] == f"runs/demo/calibrated{'' if given['task'] is None else '-task'}.yaml"


def test_a_cloud_and_its_edge_are_built() -> None:
    cloud = serve_cloud.options(["serve", "cloud", "-c", "configs/serve/cloud.yaml"])
    edge = serve_edge.options(["serve", "edge", "-c", "configs/serve/edge.yaml"])
    assert cloud["address"] == edge["edge"].cloud
    assert Path(cloud["part"]).parent == Path(edge["edge"].folder).parent == ROOT / "runs/split"
    assert edge["policy"].threshold == 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in named(SIBLINGS) if Path(name).stem != "text"])
def test_a_sibling_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[runs.DynamaxCLI] = []
    monkeypatch.setattr(runs.DynamaxCLI, "_run_subcommand", lambda self, _: built.append(self))
    folder, file = Path(name).parent, Path(name).name
    overlay = folder.name in ("plain", "shallow")
    files = [folder.parent / file, Path(name)] if overlay else [Path(name)]
    with pytest.raises(SystemExit) as ended:
        main(["train", *(part for each in files for part in ("-c", str(CONFIGS / each)))])
    assert ended.value.code == 0
    model, data = built[0].model, built[0].datamodule
    assert isinstance(model, PretrainingModule)
    assert isinstance(data, LanguageData)
    assert isinstance(model.objective, NextToken if overlay else LayerSkip)
    assert model.export is not None
    written = [portion.corpus.text for portion in data.portions if isinstance(portion.corpus, Answers)]
    assert all(text.identity() for text in written), "their prompts are there"
    (saving,) = [each for each in built[0].trainer.callbacks if isinstance(each, ModelCheckpoint)]
    assert str(saving.dirpath).endswith(str(Path(model.export).parent / "checkpoints")), "siblings do not share theirs"


def built(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> runs.DynamaxCLI:
    """What a command makes of its configuration; nothing is run."""
    made: list[runs.DynamaxCLI] = []
    monkeypatch.setattr(runs.DynamaxCLI, "_run_subcommand", lambda self, _: made.append(self))
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0
    return made[0]


@pytest.mark.parametrize("name", [name for name in named(DISTILL) if Path(name).stem != "text"])
def test_a_distillation_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built(monkeypatch, "distill", "-c", str(CONFIGS / name))
    model, data = made.model, made.datamodule
    assert isinstance(model, DistillationModule)
    assert isinstance(data, LanguageData)
    assert vars(data.tokenizer) == vars(model.teacher), "student and teacher read the same tokens"
    assert type(data.tokenizer) is type(model.teacher)
    written = [portion.corpus for portion in data.portions if isinstance(portion.corpus, Answers)]
    assert all(corpus.text.identity() for corpus in written), "their prompts are there"


@pytest.mark.parametrize("name", [name for name in named(TUNE) if Path(name).stem not in COMMANDS])
def test_a_tuning_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built(monkeypatch, "tune", "-c", str(CONFIGS / name))
    model, data = made.model, made.datamodule
    assert isinstance(model, TuningModule)
    assert isinstance(model.objective, ExitTuning)
    assert isinstance(data, WrittenText)
    assert data.writer.recipe == model.source.recipe, "the model is tuned on what it writes"
    assert len(data.held_out) == len(data.train.texts)
    asked = [{prompt.origin for text in part.texts for prompt in text._prompts} for part in (data.train, data.held_out)]
    assert min(map(len, asked)) > 20
    assert not asked[0] & asked[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_model_of_seven_billion_is_tuned_on_several_devices(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors stand in for eight GPUs."""
    here = ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    if strategy == "fsdp":
        here += ["--trainer.strategy.init_args.data_parallel_size", "2"]
    files = ["-c", str(CONFIGS / "tune/mistral-7b.yaml"), "--trainer", str(CONFIGS / f"trainer/{strategy}.yaml")]
    made = built(monkeypatch, "tune", *files, *here)
    assert (made.trainer.world_size, made.trainer.max_steps) == (2, 2000)
    made.model.check_devices(made.trainer)
    loader = made.datamodule.train_dataloader()
    batches = {min(loader.rows, made.datamodule.train.size(piece) - start) for piece, start in loader.places}
    assert batches == {32}, "eight devices share every batch"


@pytest.mark.slow
@pytest.mark.parametrize("line", re.findall(r"`(dynamax (?:fit|test) -c [^`]+)`", TABLES))
def test_every_row_of_dynamax_tables_has_a_command_that_is_built(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built(monkeypatch, *shlex.split(line)[1:])
    if isinstance(made.model, DecodingModule):
        depths = sorted(made.model.exits or {16: 0, 20: 0, 24: 0, 28: 0, 32: 0, 40: 0, 48: 0, 56: 0})
        for policy in made.model.policies:
            policy.validate(depths)
        name = str(made.trainer.logger.name)
        assert re.fullmatch(r"(triviaqa|coqa|truthfulqa)-(exact|propagate|copytoken|copylayer|skip|pruned)", name)
        task, state = name.split("-")
        assert type(made.datamodule.task).__name__.lower() == task
        rule = "Skip" if state == "pruned" else state
        assert f"{rule.lower()} object" in str(made.model.decoder).lower()


def test_bounds_in_dynamax_tables_follow_from_the_sizes() -> None:
    """Matrices of one block: 4096 wide; 8 of 32 heads of 128 keep keys; d_inner 8192, 8 groups of 128, 128 heads."""
    attention = 2 * 1024 * 4096
    mistral = attention / (attention + 2 * 4096**2 + 3 * 4096 * 14336)
    codestral = (8192 + 2 * 1024 + 128) / (2 * 8192 + 2 * 1024 + 128 + 8192)
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", TABLES, re.M)
    assert [int(row[0]) for row in rows] == [16, 20, 24, 28]
    for row in rows:
        for total, share, depth, bound in (
            (32, 0, row[0], row[1]),
            (32, mistral, row[0], row[2]),
            (64, 0, row[3], row[4]),
            (64, codestral, row[3], row[5]),
        ):
            found = total / (int(depth) + 1 + share * (total - 1 - int(depth)))
            assert float(bound) == pytest.approx(found, abs=0.005)


def test_every_file_of_dynamax_is_in_its_tables() -> None:
    for name in (name for kind in PUBLISHED for name in named(kind)):
        assert f"configs/{name}" in TABLES


@pytest.mark.parametrize("row", re.findall(r"^#   (facebook/\S+) +(\d+) +(\d+) ", LAYERSKIP_TABLE, re.M))
def test_checkpoints_trained_with_layerskip_are_decoded_at_their_exit(row, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, depth = row
    engine, loaded = Mock(), Mock()
    loaded.return_value = engine
    monkeypatch.setattr(generate, "load", loaded)
    monkeypatch.setattr(generate, "show", lambda *_: None)
    other = ["--backbone.name", name, "--exits", f"{{{depth}: {{}}}}", "--policy.depth", depth]
    with pytest.raises(SystemExit) as ended:
        main(["generate", "Who?", "-c", str(CONFIGS / LAYERSKIP / "generate.yaml"), *other])
    assert ended.value.code == 0
    ((source,), options), ((_, policy), decoding) = loaded.call_args, engine.stream.call_args
    assert (source.name, list(options["exits"]), policy.threshold) == (name, [int(depth)], int(depth))
    assert "SelfSpeculative" in str(decoding["decoder"])


def test_checkpoints_trained_with_layerskip_also_say_what_their_exits_say(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [part for name in ("test", "early-exit") for part in ("-c", str(CONFIGS / LAYERSKIP / f"{name}.yaml"))]
    made = built(monkeypatch, "test", *files)
    assert isinstance(made.model, DecodingModule)
    assert {type(policy).__name__ for policy in made.model.policies} == {"MaxProb"}
    assert "EarlyExit" in str(made.model.decoder)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("/generate.yaml") and LAYERSKIP not in name])
def test_options_of_generate_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, loaded = Mock(), Mock()
    loaded.return_value = engine
    monkeypatch.setattr(generate, "RECORD", __file__)  # heads need not be there
    monkeypatch.setattr(generate, "load", loaded)
    monkeypatch.setattr(generate, "show", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "Who?", "-c", str(CONFIGS / name)])
    assert ended.value.code == 0
    ((source,), options), ((prompt, policy), _) = loaded.call_args, engine.stream.call_args
    assert isinstance(source, Source)
    assert Path(options["heads"]) == ROOT / "runs" / Path(name).parent / "heads"
    assert (prompt, policy.label, policy.threshold) == ("Who?", "GateConfidence(MambaGate)", 0.8)


INTERNAL = {"dynamax.data.along", "dynamax.serving.edge"}
"""Modules of classes that nobody chooses by name: the filling of a store decodes with its own, an edge has modes."""


def classes(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        if not inspect.isabstract(child) and child.__module__ not in INTERNAL:
            yield child
        yield from classes(child)


@pytest.mark.parametrize("registry", [each for each in ALL if each is not FAMILIES], ids=lambda each: each.word)
def test_entry_points_name_every_class(registry: Registry) -> None:
    """What is declared, what is installed and what is written are the same."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][registry.group]
    for name in registry.names():
        registry.get(name)
    bases = [EntryPoint("", base, "").load() for base in registry.bases]
    ours = "callbacks." if registry is CALLBACKS else "dynamax."
    found = {child for base in bases for child in classes(base) if child.__module__.startswith(ours)}
    assert declared == {child.__name__: f"{child.__module__}:{child.__name__}" for child in found}
    installed = {point.name: point.value for point in registry.points() if point.value.startswith(ours)}
    assert installed == declared, "the installed package is older than pyproject.toml: run `make setup`"


def test_groups_are_declared_as_the_registries_call_them() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert set(declared) == {registry.group for registry in ALL if registry is not FAMILIES}, "families are in a table"
