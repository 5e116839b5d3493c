"""The report of every kind of run keeps to its schema; schema, classes and documentation name the same fields."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from lightning.pytorch import Trainer

from callbacks import ExitFrontier
from dynamax.backbones.sources import Folder
from dynamax.data.tasks import TaskData
from dynamax.decoding.sampling import Sampled
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.engine import Engine
from dynamax.heads.bank import Exit
from dynamax.heads.lenses import LastBlockLens
from dynamax.modules import results, rows
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.policies.bounds import Oracle
from dynamax.policies.combine import OnlyAt
from dynamax.policies.confidence import GateConfidence, MaxProb
from dynamax.policies.schedule import AtDepth, Never
from dynamax.tasks import Perplexity, Questions
from dynamax.tasks.base import Task
from dynamax.types import Spec
from tests.folders import model_folder
from tests.modules.decoded import QUIET, TwoWays, module, questions, ran

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "report.schema.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(str(model_folder(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def text(tmp_path: Path) -> Perplexity:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    return Perplexity(str(tmp_path / "text.txt"))


def runs(text: Perplexity) -> dict[str, tuple[Task, dict[str, Any]]]:
    drafting = {"decoder": partial(SelfSpeculative, draft_limit=3)}
    return {
        "early exit": (questions(), {}),
        "lossless": (questions(), drafting),
        "sampled": (questions(), {"sampler": Sampled(0.7, top_k=5)}),
        "sampled and lossless": (questions(), {**drafting, "sampler": Sampled(0.7)}),
        "nothing timed": (questions(), {"timed": 0}),
        "one token each": (Questions(limit=2, max_new_tokens=1), {}),
        "choices": (TwoWays(), {}),
        "perplexity": (text, {}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", runs(Perplexity("nowhere")))
def test_the_report_of_a_run_keeps_to_its_schema(source: Folder, tmp_path: Path, text: Perplexity, kind: str) -> None:
    task, options = runs(text)[kind]
    sweeps = [Sweep(MaxProb(0.5), [0.01, 0.9]), Sweep(MaxProb({2: 0.5, 4: 0.25})), Sweep(Never())]
    ran(module(source, *sweeps, **options), task, ExitFrontier(str(tmp_path / "out")))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    jsonschema.validate(report, SCHEMA, jsonschema.Draft202012Validator)
    generated, drafted = kind not in ("choices", "perplexity"), "lossless" in kind
    for row in report["frontier"][1:]:
        assert (row["answer_agreement"] is not None) == generated
        assert (row["drafts_kept"] is not None) == (drafted and row["tokens"] > 0)
        assert (row["ms_per_token"] is not None) == (row["speed_up"] is not None) == (row["timed_tokens"] > 0)
        assert (row["timed_tokens"] > 0) == (generated and kind not in ("nothing timed", "one token each"))
        assert (row["agreement"] is None) == (kind in ("sampled and lossless", "one token each"))
    assert (report["decoding"]["sampler"] is not None) == (report["decoding"]["chat"] is not None) == generated


@pytest.mark.slow
def test_a_report_that_breaks_the_schema_is_found(source: Folder) -> None:
    report = json.loads(json.dumps(ran(module(source), questions()).results.as_json()))
    broken = [
        {**report, "schema_version": 4},
        {**report, "rows": []},
        {**report, "frontier": [{**report["frontier"][0], "agreement": 1.5}]},
        {**report, "frontier": [{k: v for k, v in report["frontier"][0].items() if k != "tokens"}]},
    ]
    for one in broken:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(one, SCHEMA, jsonschema.Draft202012Validator)


PLACES: dict[type, Mapping[str, Any]] = {
    results.DecodingResults: SCHEMA,
    results.TaskFacts: SCHEMA["properties"]["task"],
    results.DecodingFacts: SCHEMA["properties"]["decoding"],
    results.ExitRow: SCHEMA["properties"]["exits"]["items"],
    results.PolicyRow: SCHEMA["$defs"]["row"],
    results.HeadRow: SCHEMA["$defs"]["head"],
    rows.ReliabilityRow: SCHEMA["properties"]["reliability"]["items"],
    rows.Bin: SCHEMA["properties"]["reliability"]["items"]["properties"]["bins"]["items"],
    rows.AnswersRow: SCHEMA["properties"]["answers"]["items"],
    rows.GivenAnswer: SCHEMA["properties"]["answers"]["items"]["properties"]["given"]["items"],
    Spec: SCHEMA["properties"]["backbone"],
}


@pytest.mark.parametrize("kind", PLACES, ids=lambda kind: kind.__name__)
def test_schema_and_classes_name_the_same_fields(kind: type) -> None:
    names = {field.name for field in fields(kind)}
    assert set(PLACES[kind]["properties"]) == set(PLACES[kind]["required"]) == names
    assert SCHEMA["properties"]["schema_version"] == {"const": results.SCHEMA_VERSION}


def test_every_field_is_described() -> None:
    described = (DOCS / "report.md").read_text()
    for place in (*PLACES.values(), SCHEMA["properties"]["environment"]):
        for name in place["properties"]:
            assert f"`{name}`" in described, name
    assert f"`schema_version` is {results.SCHEMA_VERSION}" in described


def test_infinite_scores_are_none() -> None:
    row = results.PolicyStats("MaxProb", 0.5, scores=[{"loglikelihood": -1e6, "tokens": 1.0, "bytes": 4.0}])
    found = row.row(Perplexity(), row)
    assert found.scores["perplexity"] == found.score == math.inf
    made = results.DecodingResults(results.TaskFacts("a", "b", 1), {}, None, {}, [], [found], [], [], [], None)  # type: ignore[arg-type]
    assert made.as_json()["frontier"][0]["score"] is None


def test_a_folder_that_cannot_be_made_is_told_before_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / "report.json").mkdir(parents=True)
    for folder, wanted in (
        ("file/out", "no folder. Change its option folder"),
        ("out", "report.json, but that is a folder"),
    ):
        with pytest.raises(ValueError, match=wanted):
            ran(module(Folder("not looked at")), questions(), ExitFrontier(str(tmp_path / folder)))


@pytest.mark.slow
def test_the_engine_is_the_one_that_was_measured(source: Folder) -> None:
    built = ran(module(source), questions())
    assert isinstance(built.engine, Engine)
    assert built.results.backbone["fingerprint"] == built.engine.backbone.spec.fingerprint


# -- bounds, scores, answers ---------------------------------------------------------------------------


@pytest.mark.slow
def test_leaving_always_at_one_depth_is_what_decoding_so_gives(source: Folder) -> None:
    found = ran(module(source, Sweep(AtDepth(2), [2, 4]), Sweep(Oracle()), timed=3), questions()).results
    oracle, *fixed = found.bounds
    assert [(row.policy, row.threshold) for row in found.bounds] == [("Oracle", None), ("AtDepth", 2), ("AtDepth", 4)]
    for bound, decoded in zip(fixed, found.frontier[1:3], strict=True):
        for name in ("policy", "threshold", "agreement", "blocks_per_token", "tokens", "depth_counts"):
            assert getattr(bound, name) == getattr(decoded, name), name
        for name in ("flops_fraction", "bytes_fraction"):
            assert getattr(bound, name) == pytest.approx(getattr(decoded, name)), name
        assert bound.ms_per_token is not None
        assert (bound.score, bound.answer_agreement, bound.scores) == (None, None, {})
    followed = found.frontier[3]
    assert (oracle.agreement, oracle.depth_counts) == (1.0, followed.depth_counts)
    assert oracle.blocks_per_token == followed.blocks_per_token
    assert (oracle.ms_per_token, oracle.timed_tokens) == (None, 0)
    assert oracle.flops_fraction is not None


@pytest.mark.parametrize("timed", [0, 1])
def test_bounds_are_charged_where_policies_are(source: Folder, timed: int) -> None:
    bounds = ran(module(source, timed=timed), questions()).results.bounds
    assert all((row.flops_fraction is not None) == (row.bytes_fraction is not None) == bool(timed) for row in bounds)


def test_there_are_no_bounds_where_one_pass_does_not_tell(source: Folder) -> None:
    exits = {2: Exit(LastBlockLens), 4: Exit()}
    built = DecodingModule(source, [Sweep(MaxProb(0.5))], exits=exits, timed=0)
    found = ran(built, questions()).results
    assert (found.bounds, found.reliability) == ([], [])


@pytest.mark.slow
def test_reliability_is_that_of_the_score_at_each_exit(source: Folder) -> None:
    sweeps = [
        Sweep(MaxProb(0.5), [0.01, 0.9]),
        Sweep(OnlyAt(GateConfidence(0.5, gate="LinearGate"), [4])),
        Sweep(Never()),
    ]
    built = ran(module(source, *sweeps), questions())
    rows_ = built.results.reliability
    assert [(row.policy, row.depth) for row in rows_] == [
        ("MaxProb", 2),
        ("MaxProb", 4),
        ("OnlyAt(GateConfidence(LinearGate), 4)", 4),
    ]
    score, right = [], []
    for example in questions().examples():
        prompt_1T = built.engine.encode(example.prompt, chat=False)
        steps = list(built.engine.decoder().decode(prompt_1T, max_new_tokens=12, eos_token_id=(0,)))
        said_1T = torch.stack([step.token_B for step in steps], 1)
        read = built.engine.read(torch.cat([prompt_1T, said_1T[:, :-1]], 1), start=prompt_1T.shape[1] - 1)
        gate = read.exits[1].confidence("LinearGate")[1:]
        score += gate.tolist()
        right += (read.exits[1].token == said_1T[0])[1:].tolist()
    row = rows_[2]
    assert row.tokens == len(score) == built.results.frontier[0].tokens
    assert row.brier == pytest.approx(sum((s - r) ** 2 for s, r in zip(score, right, strict=True)) / len(score))
    assert [each.tokens for each in row.bins] == [sum(int(10 * s) == index for s in score) for index in range(10)]


@pytest.mark.slow
def test_answers_are_those_of_predict(source: Folder) -> None:
    task = Questions(limit=4, max_new_tokens=12)
    built = ran(module(source, Sweep(MaxProb(0.02), [0.02, 0.5])), task)
    shown = built.results.answers
    assert [row.id for row in shown] == [example.id for example in list(task.examples())[:3]]
    assert [[(each.policy, each.threshold) for each in row.given] for row in shown] == [
        [("Full", None), ("MaxProb", 0.02), ("MaxProb", 0.5)]
    ] * 3
    trainer = Trainer(**QUIET)
    predicted = trainer.predict(built, datamodule=TaskData(task))
    assert predicted is not None
    for row, wanted in zip(shown, predicted, strict=False):
        given = row.given[1]
        assert "".join(given.tokens) == wanted["text"]
        assert given.depths == wanted["depths"]
        assert len(given.tokens) == len(wanted["tokens"])
    assert {depth for row in shown for depth in row.given[0].depths} == {6}


@pytest.mark.slow
def test_the_command_is_that_of_the_command_line(source: Folder) -> None:
    assert ran(module(source), questions()).results.command is None
    built = module(source)
    built.command = "dynamax test -c mine.yaml"
    assert ran(built, questions()).results.as_json()["command"] == "dynamax test -c mine.yaml"
