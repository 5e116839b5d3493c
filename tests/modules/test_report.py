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

from callbacks import ExitFrontier
from dynamax.backbones.sources import Folder
from dynamax.decoding.sampling import Sampled
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.engine import Engine
from dynamax.modules import results, rows
from dynamax.modules.decoding import Sweep
from dynamax.policies.confidence import MaxProb
from dynamax.policies.schedule import Never
from dynamax.tasks import Perplexity, Questions
from dynamax.tasks.base import Task
from dynamax.types import Spec
from tests.folders import model_folder
from tests.modules.decoded import TwoWays, module, questions, ran

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
    for folder, wanted in (("file/out", "cannot make the folder"), ("out", "report.json, but that is a folder")):
        with pytest.raises(ValueError, match=wanted):
            ran(module(Folder("not looked at")), questions(), ExitFrontier(str(tmp_path / folder)))


def test_the_engine_is_the_one_that_was_measured(source: Folder) -> None:
    built = ran(module(source), questions())
    assert isinstance(built.engine, Engine)
    assert built.results.backbone["fingerprint"] == built.engine.backbone.spec.fingerprint
