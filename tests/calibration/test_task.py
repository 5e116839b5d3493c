"""A promise about a task's score: against answers that are asked for and scored by hand, and against ``test``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dynamax
from dynamax.backbones.skipped_state import Skip
from dynamax.backbones.sources import Folder
from dynamax.calibration.calibrate import Calibrated
from dynamax.calibration.promise import Promise, TaskScore, score_loss
from dynamax.calibration.scores import decided, scored, split, texts
from dynamax.calibration.search import CANDIDATES, LEAST, Searched, Way, frontier, price
from dynamax.calibration.task import calibrate_task, parted, usable
from dynamax.data.generated import questions
from dynamax.data.text import Document
from dynamax.decoding.cost import CostModel
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.sampling import Greedy, Sampled
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.heads import Exit
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.policies import BetaMixture, MaxProb, Never, OnlyAt, ScorePolicy
from dynamax.tasks import Passages, Perplexity, Questions, TruthfulQA, TruthfulQAMC
from dynamax.tasks.base import Example, GenerationTask, Task
from tests.modules.decoded import ran

LLAMA = Path("assets/llama").resolve()
LENGTH = 12
STOP = " question"


class Letters(GenerationTask):
    """The share of the answer's letters that stand in the first half of the alphabet; answers end at a question."""

    headline = "early"
    headline_scale = "fraction"

    def __init__(self, prompts: Iterable[str]) -> None:
        self.prompts = list(prompts)

    def examples(self) -> list[Example]:
        return [Example(each, each, (), (), (STOP,), LENGTH) for each in self.prompts]

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"early": share(answer), "length": float(len(answer))}


class Half(Letters):
    """Whether at least half of them do; another scale, or a wrong one, in single tests."""

    headline_scale = "binary"

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"early": float(share(answer) >= 0.5)}


def share(answer: str) -> float:
    letters = [letter for letter in answer.lower() if letter.isalpha()]
    return sum(letter <= "m" for letter in letters) / max(1, len(letters))


PROMPTS = [f"Question: {each.question}\nAnswer:" for each in questions()[:40]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return dynamax.load(LLAMA, exits=[2, 4, 6], device="cpu")


def says(engine: Engine, prompt: str, policy: Any = None) -> tuple[float, list[int]]:
    """The score of a greedy answer, by the engine alone; and the depths of its tokens behind the first."""
    given = {"chat": False, "do_sample": False, "max_new_tokens": LENGTH, "stop_strings": [STOP]}
    answer = engine.generate(prompt, policy, **given)
    return share(answer.text), answer.depths[1:]


@pytest.fixture(scope="module")
def by_hand(engine: Engine) -> tuple[list[Any], list[list[float]], list[float]]:
    """Candidates, the loss of every test example under each, and blocks a token."""
    first, second = split(PROMPTS, PROMPTS, 0.5)
    known = []
    for prompt in first:
        given = {"chat": False, "do_sample": False, "max_new_tokens": LENGTH, "stop_strings": [STOP]}
        tokens, start = engine.generate(prompt, **given).tokens, engine.encode(prompt, chat=False)[0].tolist()
        known.append(Document(start + tokens, len(start)))
    searched = Searched.of([scored(text, MaxProb(0.5)) for text in texts(engine, known)])
    candidates = frontier(engine, MaxProb(0.5), searched)
    full = [says(engine, prompt)[0] for prompt in second]
    early = [[says(engine, prompt, candidate) for prompt in second] for candidate in candidates]
    losses = [[max(0.0, top - own) for top, (own, _) in zip(full, said, strict=True)] for said in early]
    blocks = [float(np.mean([depth for _, depths in said for depth in depths])) for said in early]
    return candidates, losses, blocks


@pytest.fixture(scope="module")
def found(engine: Engine, by_hand: tuple[list[Any], list[list[float]], list[float]]) -> tuple[Calibrated, list[str]]:
    """What is promised where some candidates lose more than the bound; and what was gone through."""
    _, losses, _ = by_hand
    means = [float(np.mean(each)) for each in losses]
    labels: list[str] = []

    def told(parts: Iterable[Any], label: str) -> Iterable[Any]:
        labels.append(label)
        return parts

    epsilon = (means[0] + max(means)) / 2
    given = {"epsilon": epsilon, "method": "naive", "progress": told}
    return calibrate_task(engine, MaxProb(0.5), Letters(PROMPTS), **given), labels  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_losses_are_those_of_answers_scored_by_hand(
    by_hand: tuple[list[Any], list[list[float]], list[float]], found: tuple[Calibrated, list[str]]
) -> None:
    candidates, losses, blocks = by_hand
    (calibrated, labels), means = found, [float(np.mean(each)) for each in losses]
    promise = calibrated.promise
    place = next(i for i, mean in enumerate(means) if mean > promise.epsilon) - 1
    assert place >= 0
    assert means[place] > 0
    assert 1 < len(candidates) <= CANDIDATES
    assert promise.loss == pytest.approx(means[place])
    assert promise.blocks == pytest.approx(blocks[place])
    assert promise.documents == len(losses[0])
    policy = calibrated.policy
    assert isinstance(policy, OnlyAt)
    assert (policy.threshold, policy.depths) == (candidates[place].threshold, candidates[place].depths)
    assert promise.text.startswith("early of Letters below the full model's, mean over examples, 0 where it is above")
    tests = [label for label in labels if label.startswith("test ")]
    assert tests == [f"test {number} of {len(candidates)}" for number in range(1, place + 3)], "and one that failed"


@pytest.mark.slow
def test_what_test_finds_is_what_was_promised(found: tuple[Calibrated, list[str]]) -> None:
    calibrated, _ = found
    _, second = split(PROMPTS, PROMPTS, 0.5)
    run = ran(module(calibrated), Letters(second))
    full, row = run.results.frontier
    assert row.promise is not None
    assert row.promise.loss == pytest.approx(calibrated.promise.loss)
    assert row.promise.documents == calibrated.promise.documents == len(second)
    assert row.promise.tokens == calibrated.promise.tokens
    assert "which is not more" in row.promise.text
    assert full.score is not None
    assert row.score is not None
    assert full.score - row.score <= row.promise.loss, "gains are not set against losses"


def module(calibrated: Calibrated, **options: Any) -> DecodingModule:
    sweep, source = Sweep(calibrated.policy, promise=calibrated.promise), Folder(str(LLAMA))
    exits = dict.fromkeys((2, 4, 6), Exit())
    return DecodingModule(source, [sweep], exits=exits, timed=1, **{"sampler": Greedy(), **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "task", "message"),
    [
        ({}, Questions(limit=1), r"about TaskScore\(task='Letters'.* would measure TaskScore\(task='Questions'"),
        ({"chat": True}, Letters(PROMPTS[:1]), r"chat=False\), but this run would measure .*chat=True"),
        ({"sampler": Sampled(1.0)}, Letters(PROMPTS[:1]), "decoded greedily, but this run has EarlyExit .* Sampled"),
        ({"decoder": SelfSpeculative}, Letters(PROMPTS[:1]), "but this run has SelfSpeculative"),
        ({"decoder": partial(EarlyExit, skipped_state=Skip())}, Letters(PROMPTS[:1]), "'skipped_state': 'Skip'"),
    ],
    ids=["task", "chat", "sampler", "decoder", "state"],
)
def test_another_run_than_the_promise_is_about_is_refused(
    found: tuple[Calibrated, list[str]], options: dict[str, Any], task: Task, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ran(module(found[0], **options), task)


@pytest.mark.slow
def test_the_frontier_runs_from_sure_to_cheap(engine: Engine) -> None:
    """By what the policies themselves decide."""
    documents = []
    for prompt in PROMPTS[:12]:
        start = engine.encode(prompt, chat=False)[0].tolist()
        documents.append(Document(start + engine.generate(prompt, chat=False, max_new_tokens=16).tokens, len(start)))
    read = list(texts(engine, documents))
    scores = [scored(text, MaxProb(0.5)) for text in read]
    candidates = frontier(engine, MaxProb(0.5), Searched.of(scores))
    full = CostModel(engine.backbone).full(128).bytes
    points = []
    for candidate in candidates:
        asked = sorted(candidate.depths or ())
        cost_E = price(engine, MaxProb(0.5), scores[0].reads, [(2, 4, 6).index(depth) for depth in asked]) / full
        paths = [text.apply_policy(candidate) for text in read]
        wrong = [
            float((path.logits_TV.argmax(-1) != text.logits_TV.argmax(-1))[1:].double().mean())
            for path, text in zip(paths, read, strict=True)
        ]
        places = [[*asked, 8].index(depth) for path in paths for depth in path.depth_T[1:].tolist()]
        points.append((float(np.mean(wrong)), float(np.mean(cost_E[places]))))
    assert 2 < len(points) <= CANDIDATES
    assert points == sorted(points), "the surest first"
    assert [cost for _, cost in points] == sorted((cost for _, cost in points), reverse=True)
    assert all(cost < 1 for _, cost in points)
    assert points[0][0] < points[-1][0] / 2
    assert points[0][0] <= LEAST or len(points) < CANDIDATES


def test_the_frontier_is_the_cheapest_at_each_share(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares double from one bound to the next here: 0.5 %, 1 %, 2 % and so on up to 64 %."""
    losses = {0.001: 0.99, 0.004: 0.95, 0.0045: 0.97, 0.03: 0.9, 0.035: 0.8, 0.3: 0.85, 0.6: 0.5, 0.64: 0.6, 0.9: 1.2}
    paths = [[Way((0,), {2: loss}, loss, cost)] for loss, cost in losses.items()]
    monkeypatch.setattr("dynamax.calibration.search.ways", lambda *_, **__: iter(paths))
    searched = Searched(np.zeros((3, 1)), np.zeros((3, 1), dtype=bool), np.zeros(1), ())
    chosen = frontier(engine, MaxProb(0.5), searched)
    assert [policy.threshold for policy in chosen] == [{2: 0.004}, {2: 0.035}, {2: 0.6}]


def test_no_frontier_where_nothing_costs_less(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamax.calibration.search.ways", lambda *_, **__: iter([[Way((0,), {2: 0.5}, 0.0, 1.0)]]))
    found = calibrate_task(engine, MaxProb(0.5), Letters(PROMPTS[:8]), epsilon=0.5)
    assert isinstance(found.policy, Never)
    assert found.promise.reason == "no threshold at any exit costs less than full decoding on the search documents"
    assert (found.promise.loss, found.promise.blocks) == (0.0, 8.0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "binary"), [(Letters, False), (Half, True)])
def test_scores_of_0_or_1_are_tested_as_such(
    engine: Engine, kind: type[Letters], binary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[np.ndarray, bool]] = []

    def spied(losses_DC: np.ndarray, *_: Any, binary: bool) -> int:
        seen.append((losses_DC, binary))
        return losses_DC.shape[1] - 1

    monkeypatch.setattr("dynamax.calibration.task.promised", spied)
    monkeypatch.setattr("dynamax.calibration.calibrate.promised", spied)
    calibrate_task(engine, MaxProb(0.5), kind(PROMPTS[:12]), epsilon=0.3)
    assert {told for _, told in seen} == {binary}
    lost_DC = seen[-1][0]
    assert lost_DC.any(), "the case loses nothing"
    assert set(np.unique(lost_DC)) <= {0.0, 1.0} or not binary


@pytest.mark.slow
def test_where_nothing_holds_the_full_model_answers(engine: Engine) -> None:
    found = calibrate_task(engine, MaxProb(0.5), Letters(PROMPTS[:12]), epsilon=0.01, delta=0.01)
    assert isinstance(found.policy, Never)
    assert (found.promise.loss, found.promise.blocks) == (0.0, 8.0)
    assert found.promise.reason is not None
    assert "test documents" in found.promise.reason


@pytest.mark.slow
def test_a_policy_is_fitted_to_the_answers_that_are_searched(engine: Engine) -> None:
    policy = BetaMixture(0.5, policy=MaxProb(0.5))
    found = calibrate_task(engine, policy, Letters(PROMPTS), epsilon=0.5, method="naive")
    assert isinstance(found.policy, OnlyAt)
    inner = found.policy.policy
    assert isinstance(inner, BetaMixture)
    assert inner.mixtures is not None
    assert sorted(inner.mixtures) == [2, 4, 6]
    plain = calibrate_task(engine, MaxProb(0.5), Letters(PROMPTS), epsilon=0.5, method="naive")
    score_EN = np.concatenate([each.score_ET for each in plain.search], 1)
    right_EN = np.concatenate([each.right_ET for each in plain.search], 1)
    for pair, score_N, right_N in zip(inner.mixtures.values(), score_EN, right_EN, strict=True):
        assert pair.prior == pytest.approx(right_N.mean())
        for (a, b), seen in ((pair.right, score_N[right_N]), (pair.wrong, score_N[~right_N])):
            drawn = torch.distributions.Beta(torch.tensor(a).double(), torch.tensor(b).double())
            assert float(drawn.mean) == pytest.approx(seen.mean(), rel=1e-6)
            assert float(drawn.variance) == pytest.approx(seen.var(), rel=1e-4)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Perplexity(path="x.txt"), "Perplexity, which asks for likelihoods; wanted: one whose answers are decoded"),
        (TruthfulQAMC(path="x.csv"), "TruthfulQAMC, which asks for likelihoods"),
        (TruthfulQA(path="x.csv"), "bleu_max may be any number, and greater is better; wanted: a score"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_tasks_whose_score_cannot_be_promised_are_refused(engine: Engine, task: Task, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate_task(engine, MaxProb(0.5), task, epsilon=0.1)


def test_a_score_of_which_less_is_better_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "higher_is_better", False)
    with pytest.raises(UserError, match="from 0 to 1, and smaller is better"):
        usable(Letters(PROMPTS))


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), 0.5])
def test_a_score_off_its_scale_is_refused(engine: Engine, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Half, "score", lambda *_: {"early": value})
    with pytest.raises(UserError, match="its headline early was to be 0 or 1"):
        calibrate_task(engine, MaxProb(0.5), Half(PROMPTS[:8]), epsilon=0.1)


def test_a_headline_that_no_example_has_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "headline", "late")
    with pytest.raises(UserError, match="its headline late was to be from 0 to 1"):
        calibrate_task(engine, MaxProb(0.5), Letters(PROMPTS[:8]), epsilon=0.1)


def test_examples_of_one_passage_are_on_one_side() -> None:
    first, second = parted(Passages(), 0.5)
    origins = [{example.origin for example in part} for part in (first, second)]
    assert all(len(part) > 10 for part in origins)
    assert not origins[0] & origins[1]
    assert all(example.prompt.startswith(str(example.origin)) for example in (*first, *second))
    assert len(first) > len(origins[0])


def test_too_few_examples_are_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match=r"Letters has 2 examples that go back to 1 origins: . to search and . to test"):
        calibrate_task(engine, MaxProb(0.5), Letters(PROMPTS[:1] * 2), epsilon=0.1)


def test_a_promise_names_a_task_where_it_is_about_one() -> None:
    known: dict[str, Any] = {"epsilon": 0.1, "delta": 0.1, "method": "ltt", "documents": 9, "tokens": 90}
    known |= {"loss": 0.01, "blocks": 7.0, "data": "a", "model": "b"}
    about = Promise(level="score", task=TaskScore("Questions", "accuracy"), **known)
    assert about.text.endswith("at most 10.0% with probability 90% (ltt, 9 examples)")
    for level, task in (("score", None), ("document", TaskScore("Questions", "accuracy"))):
        with pytest.raises(UserError, match="a task is named where the level is score, and there alone"):
            Promise(level=level, task=task, **known)  # pyright: ignore[reportArgumentType]


def test_a_gain_is_no_loss() -> None:
    assert [score_loss(*pair) for pair in ((0.5, 0.75), (0.75, 0.5), (1.0, 0.0))] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(("length", "prompt", "counts"), [(3, 2, False), (4, 2, True), (2, 0, False), (3, 0, True)])
def test_a_document_is_decided_behind_the_token_of_the_prompt(length: int, prompt: int, counts: bool) -> None:
    assert decided(Document(list(range(length)), prompt)) is counts


def test_other_policies_are_not_fitted() -> None:
    def never(_: ScorePolicy) -> Any:  # noqa: ANN401
        raise AssertionError("nothing is to be scored")

    policy = MaxProb(0.5)
    assert policy.fitted(never) is policy
    assert policy.fitted_options == {}
