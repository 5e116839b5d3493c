"""Search and test of thresholds on a small model that was trained with exits."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import dynamax
from dynamax.calibration.calibrate import calibrate
from dynamax.calibration.scores import outcome, scored, split, texts
from dynamax.calibration.search import CONTEXT, Calibration, Searched, found, judged, price, thresholds
from dynamax.data.generated import SelfGenerated
from dynamax.data.text import Document
from dynamax.decoding.cost import CostModel
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.heads import BridgeLens, Exit, LastBlockLens, LinearGate, LogitLens, PastExits
from dynamax.policies import CandidateProb, GateConfidence, JEIGate, MaxProb, Never, OnlyAt, Saturation, ScorePolicy
from dynamax.testing import stir


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.manual_seed(0)
    given = Exit(LogitLens, [LinearGate])
    engine = dynamax.load("assets/llama", exits={2: given, 4: given, 6: given}, device="cpu")
    stir(engine.exits)
    return engine


@pytest.fixture(scope="module")
def documents(engine: Engine) -> list[Document]:
    source = SelfGenerated(documents=60, max_new_tokens=24, chat=False, batch=30)
    return [document for group in source.groups(engine) for document in group]


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [MaxProb(0.4), GateConfidence(0.5), JEIGate(0.5), Saturation(0.9), CandidateProb(0.5)],
    ids=lambda policy: policy.label,
)
def test_scores_say_what_the_policy_does(engine: Engine, documents: list[Document], policy: ScorePolicy) -> None:
    seen = 0
    for text in texts(engine, documents[:8]):
        scores, exits = scored(text, policy), [0, 1, 2]
        done = outcome(text, policy)
        path = text.apply_policy(policy)
        assert done.depth_T.tolist() == path.depth_T[1:].tolist()
        assert done.wrong_T.tolist() == (path.logits_TV.argmax(-1) != text.logits_TV.argmax(-1))[1:].tolist()
        levels = dict.fromkeys((2, 4, 6), policy.threshold)
        cost_E = np.array([2.0, 4.0, 6.0, 8.0])  # so that the cost is the depth
        loss, depth = judged(Searched.of([scores]), (2, 4, 6), exits, levels, cost_E, "document")
        assert loss == pytest.approx(done.wrong_T.mean())
        assert depth == pytest.approx(done.depth_T.mean())
        seen += sum(done.depth_T < 8)
    assert seen, "the case never leaves"


@pytest.mark.slow
def test_prices_are_those_of_decoding(engine: Engine, documents: list[Document]) -> None:
    policy = OnlyAt(MaxProb(0.3), [2, 6])
    (text,) = texts(engine, documents[:1])
    cost_E = price(engine, MaxProb(0.3), scored(text, MaxProb(0.3)).reads, [0, 2])
    decoder = engine.decoder(policy)
    model = CostModel(engine.backbone, decoder.exits)
    prompt_1T = torch.tensor([documents[0].tokens[: documents[0].prompt]])
    seen = set()
    for step in decoder.decode(prompt_1T, max_new_tokens=40):
        place = [2, 6, 8].index(step.depth)
        if not step.prefill and sum(step.work.rows) == step.depth:  # no debt rides along
            assert model.step(step, CONTEXT).bytes == pytest.approx(cost_E[place])
            seen.add(place)
    assert len(seen) > 1


@pytest.mark.slow
@pytest.mark.parametrize("policy", [MaxProb(0.5), JEIGate(0.5), Saturation(0.9)], ids=lambda policy: policy.label)
def test_the_search_judges_what_the_policy_does(engine: Engine, documents: list[Document], policy: ScorePolicy) -> None:
    """Also where a score depends on which other exits are asked."""
    read = list(texts(engine, documents[:12]))
    searched = Searched.of([scored(text, policy) for text in read])
    ways = [found(engine, policy, searched, epsilon, "document") for epsilon in (0.05, 0.1, 0.2, 0.3, 0.5, 0.9)]
    candidates = [candidate for way in ways for candidate in way[:: max(1, len(way) // 4)]]
    assert candidates, "the case finds nothing"
    for candidate in candidates:
        assert isinstance(candidate, OnlyAt)
        asked = sorted(candidate.depths or ())
        levels = {depth: candidate.policy.level(depth) for depth in asked}
        places, cost_E = [(2, 4, 6).index(depth) for depth in asked], np.array([*asked, 8.0])
        done = [outcome(text, candidate) for text in read]
        loss, depth = judged(searched, (2, 4, 6), places, levels, cost_E, "document")
        assert loss == pytest.approx(np.mean([each.wrong_T.mean() for each in done]))
        assert depth == pytest.approx(np.concatenate([each.depth_T for each in done]).mean())


def test_one_sureness_gives_each_exit_its_threshold() -> None:
    rng = np.random.default_rng(0)
    score_N = rng.random(4000)
    maps = [Calibration(score_N, rng.random(4000) < chance) for chance in (score_N, score_N**2)]
    path = thresholds(maps, (2, 4), (0, 1))
    assert all(0.05 < abs(levels[2] - levels[4] ** 2) + 0.05 < 0.2 for levels in path[5:50] if len(levels) == 2)
    for before, after in zip(path, path[1:], strict=False):  # from the surest down
        assert all(after[depth] <= level for depth, level in before.items())


@pytest.mark.slow
def test_a_promise_on_texts_that_the_search_did_not_see(engine: Engine, documents: list[Document]) -> None:
    found = calibrate(engine, MaxProb(0.5), documents, epsilon=0.3, delta=0.2)
    assert isinstance(found.policy, OnlyAt)
    first, second = split(documents, [each.origin for each in documents], 0.5)
    assert found.promise.documents == len(list(texts(engine, second)))
    assert len(found.search) == len(list(texts(engine, first)))
    assert len(found.test) == found.promise.documents
    assert sum(each.score_ET.shape[1] for each in found.test) == found.promise.tokens
    assert not {each.origin for each in first} & {each.origin for each in second}
    again = [outcome(text, found.policy) for text in texts(engine, second)]
    assert found.promise.loss == pytest.approx(np.mean([each.wrong_T.mean() for each in again]))
    assert found.promise.blocks == pytest.approx(np.concatenate([each.depth_T for each in again]).mean())
    assert found.promise.loss < 0.3
    assert found.promise.blocks < 8


@pytest.mark.slow
def test_what_cannot_be_promised_is_said_and_never_leaves(engine: Engine, documents: list[Document]) -> None:
    found = calibrate(engine, MaxProb(0.5), documents, epsilon=0.1, delta=0.001)
    assert isinstance(found.policy, Never)
    assert found.promise.blocks == 8
    assert found.promise.loss == 0
    assert found.promise.reason is not None
    assert "too few to promise it" in found.promise.reason
    assert "would be needed" in found.promise.reason


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        (Exit(LogitLens, [partial(LinearGate, inputs=[PastExits()])]), GateConfidence(0.5)),
        (Exit(LogitLens), CandidateProb(0.5)),
        (Exit(LastBlockLens), MaxProb(0.5)),
        (Exit(partial(BridgeLens, blocks=2)), MaxProb(0.5)),
    ],
    ids=["gate", "policy", "last block", "bridge"],
)
def test_what_one_pass_does_not_tell_is_refused(given: Exit, policy: ScorePolicy, documents: list[Document]) -> None:
    """Its promise would be about other readings than those of decoding."""
    engine = dynamax.load("assets/llama", exits={2: given, 4: given}, device="cpu")
    with pytest.raises(UserError, match=r"decides here depends on where earlier tokens left"):
        calibrate(engine, policy, documents[:4], epsilon=0.1, delta=0.1)


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": 0.1, "delta": 1.0}, {"epsilon": 0.1, "share": 0}])
def test_options_out_of_range_are_refused(engine: Engine, documents: list[Document], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it must lie between 0 and 1"):
        calibrate(engine, MaxProb(0.5), documents, **options)


def test_no_exits_and_no_documents_are_refused(engine: Engine, documents: list[Document]) -> None:
    plain = Engine(engine.backbone, engine.tokenizer)
    with pytest.raises(ValueError, match="a model without exits"):
        calibrate(plain, MaxProb(0.5), documents, epsilon=0.1)
    with pytest.raises(ValueError, match="calibrate was given 0 documents"):
        calibrate(engine, MaxProb(0.5), [], epsilon=0.1)
