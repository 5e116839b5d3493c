"""``test`` and ``predict`` on a tiny random model: every figure against one taken another way."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from dynamax.backbones.skipped_state import Propagate
from dynamax.backbones.sources import Folder
from dynamax.data.tasks import TaskData
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.sampling import Sampled
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.engine import Engine
from dynamax.heads.bank import Exit
from dynamax.heads.gates import LinearGate, MambaGate
from dynamax.modules.decoding import DecodingModule, Sweep, spec_facts
from dynamax.modules.results import DecodingFacts
from dynamax.policies.bounds import Oracle
from dynamax.policies.combine import AnyOf
from dynamax.policies.confidence import GateConfidence, Margin, MaxProb
from dynamax.policies.schedule import AtDepth, Decaying, Never
from dynamax.tasks import Perplexity, Questions
from dynamax.tasks.base import ChoiceTask, GenerationTask
from tests.folders import model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(str(model_folder(tmp_path_factory.mktemp("model"))))


def run(source: Folder, policies: list[Sweep], task: Any = None, **options: Any) -> DecodingModule:  # noqa: ANN401
    exit_ = Exit(gates=[LinearGate, MambaGate])
    task = task or Questions(limit=3, max_new_tokens=12)
    timed = {"timed": 1} if isinstance(task, GenerationTask) else {}
    module = DecodingModule(source, policies, exits={2: exit_, 4: exit_}, **{**timed, **options})
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.test(module, datamodule=TaskData(task), verbose=False)
    return module


@pytest.mark.slow
def test_the_full_model_is_the_first_row_and_the_measure(folder: Folder) -> None:
    rows = run(folder, [Sweep(Never())]).results.frontier
    assert [row.policy for row in rows] == ["Full", "Never"]
    for row in rows:
        assert row.agreement == row.answer_agreement == 1.0
        assert row.blocks_per_token == 6
        assert row.depth_counts == {6: row.tokens}
        assert row.score == rows[0].score
    assert rows[0].speed_up == rows[0].flops_fraction == rows[0].bytes_fraction == 1.0


def test_a_forced_depth_costs_what_its_blocks_cost(folder: Folder) -> None:
    row = run(folder, [Sweep(AtDepth(2))]).results.frontier[1]
    assert row.blocks_per_token == 2
    assert row.depth_counts == {2: row.tokens}
    assert row.flops_fraction < 0.6


@pytest.mark.slow
def test_agreement_is_that_of_forced_decoding(folder: Folder) -> None:
    """Decoded here once more, example by example, without the module."""
    task = Questions(limit=3, max_new_tokens=12)
    module = run(folder, [Sweep(MaxProb(0.5), [0.01, 0.05, 0.9])], task)
    agreed: dict[float, list[bool]] = {0.01: [], 0.05: [], 0.9: []}
    for example in task.examples():
        prompt_1T = torch.tensor([module.engine.tokenizer(example.prompt)["input_ids"]])
        full = [int(s.token_B) for s in Full(module.backbone).decode(prompt_1T, max_new_tokens=12, eos_token_id=[0])]
        text = module.engine.tokenizer.decode(full)
        assert not any(stop in text[:-1] for stop in example.stop_strings), "the reference below would need cutting"
        for threshold, found in agreed.items():
            decoder = EarlyExit(module.backbone, module.bank, MaxProb(threshold))
            steps = decoder.decode(prompt_1T, max_new_tokens=len(full), forced_BT=torch.tensor([full]))
            found += [int(s.token_B) == wanted for s, wanted in zip(steps, full, strict=True)][1:]
    for row in module.results.frontier[1:]:
        assert row.agreement == pytest.approx(sum(agreed[row.threshold]) / len(agreed[row.threshold]))


def test_exits_are_read_and_timed(folder: Folder) -> None:
    module = run(folder, [Sweep(Never())])
    exits = module.results.exits
    assert [exit_.depth for exit_ in exits] == [2, 4]
    for exit_ in exits:
        assert 0 <= exit_.agreement <= 1
        assert set(exit_.gate_auroc) == {"LinearGate", "MambaGate"}
        assert 0 < exit_.latency_ms["p50"] <= exit_.latency_ms["p95"]
        heads, ours = [exit_.lens, *exit_.gates], module.bank.exits[str(exit_.depth)]
        assert [head.name for head in heads] == ["LogitLens", "LinearGate", "MambaGate"]
        assert sum(head.params for head in heads) == sum(p.numel() for p in ours.parameters()) > 0


@pytest.mark.slow
def test_lossless_decoding_says_what_the_full_model_says(folder: Folder) -> None:
    module = run(folder, [Sweep(MaxProb(0.5), [0.0, 1.0])], decoder=partial(SelfSpeculative, draft_limit=3))
    whole, always, never = module.results.frontier
    assert all(row.agreement == row.answer_agreement == 1.0 for row in (whole, always, never))
    assert always.blocks_per_token != 6
    assert whole.drafts_kept is None
    assert never.drafts_kept == 0.0
    assert always.drafts_kept == drafts_kept(module) > 0


def drafts_kept(module: DecodingModule) -> float:
    """Of the first policy, decoded here once more without the module."""
    decoder = SelfSpeculative(module.backbone, module.bank, MaxProb(0.0), draft_limit=3)
    accepted: list[bool] = []
    for example in Questions(limit=3, max_new_tokens=12).examples():
        prompt_1T = torch.tensor([module.engine.tokenizer(example.prompt)["input_ids"]])
        limit = len(list(Full(module.backbone).decode(prompt_1T, max_new_tokens=12, eos_token_id=[0])))
        accepted += [step.accepted for step in decoder.decode(prompt_1T, max_new_tokens=limit)][1:]
    return sum(accepted) / len(accepted)


@pytest.mark.slow
def test_an_oracle_is_a_bound_read_off_the_pass(folder: Folder) -> None:
    full, oracle, first = run(folder, [Sweep(Oracle()), Sweep(AtDepth(2))], timed=1).results.frontier
    assert oracle.agreement == 1.0
    assert oracle.tokens == full.tokens == sum(oracle.depth_counts.values())
    assert oracle.depth_counts.get(2, 0) / oracle.tokens == pytest.approx(first.agreement)
    assert (oracle.score, oracle.ms_per_token, oracle.answer_agreement, oracle.timed_tokens) == (None, None, None, 0)
    with pytest.raises(ValueError, match="Oracle is read off one exact pass, but SelfSpeculative"):
        run(folder, [Sweep(Oracle())], decoder=SelfSpeculative)


@pytest.mark.slow
def test_results_tell_how_decoding_was_done(folder: Folder) -> None:
    task = Questions(limit=1, max_new_tokens=4)
    usual = run(folder, [Sweep(Never())], task).results
    assert usual.decoding == DecodingFacts(
        decoder="EarlyExit",
        lossless=False,
        options={"skipped_state": "Exact"},
        sampler={"name": "Greedy"},
        chat=False,
        heads=None,
    )
    assert usual.frontier[1].drafts_kept is None
    sampler = Sampled(0.5, top_k=3, seed=4)
    drafting = partial(SelfSpeculative, draft_limit=3)
    drafted = run(folder, [Sweep(Never())], task, decoder=drafting, sampler=sampler).results.decoding
    told = {"name": "Sampled", "temperature": 0.5, "top_k": 3, "top_p": 1.0, "seed": 4}
    assert (drafted.decoder, drafted.lossless) == ("SelfSpeculative", True)
    assert (drafted.options, drafted.sampler) == ({"draft_limit": 3}, told)
    propagating = run(folder, [Sweep(Never())], task, decoder=partial(EarlyExit, skipped_state=Propagate())).results
    assert propagating.decoding.options == {"skipped_state": "Propagate"}


def test_a_model_without_a_limit_has_no_context(folder: Folder, tmp_path: Path) -> None:
    recurrent = model_folder(tmp_path / "mamba2", "mamba2")
    config = json.loads((recurrent / "config.json").read_text())
    del config["max_position_embeddings"]  # mamba2's own configuration has none
    (recurrent / "config.json").write_text(json.dumps(config))
    contexts = {source: spec_facts(Engine(source.load()))["context"] for source in (folder, Folder(str(recurrent)))}
    assert list(contexts.values()) == [512, None]


@pytest.mark.slow
def test_sampling_compares_what_is_most_likely(folder: Folder) -> None:
    """Along sampled text too, the reference decodes once more, and compares the argmax of both."""
    task, policies = Questions(limit=3, max_new_tokens=12), [Sweep(Never()), Sweep(MaxProb(0.05))]
    greedy = run(folder, policies, task).results.frontier
    sampled = {timed: run(folder, policies, task, sampler=Sampled(1.0, seed=4), timed=timed) for timed in (0, 3)}
    module = sampled[3]
    agreed: list[bool] = []
    for turn, example in enumerate(task.examples()):
        prompt_1T = torch.tensor([module.engine.tokenizer(example.prompt)["input_ids"]])
        sampler = Sampled(1.0, seed=4)
        sampler.restart(turn)
        full = list(Full(module.backbone, sampler=sampler).decode(prompt_1T, max_new_tokens=12, eos_token_id=[0]))
        target_1T = torch.stack([step.token_B for step in full], 1)
        decoder = EarlyExit(module.backbone, module.bank, MaxProb(0.05))
        steps = list(decoder.decode(prompt_1T, max_new_tokens=len(full), forced_BT=target_1T))
        agreed += [int(s.token_B) == int(f.logits_BV.argmax()) for s, f in zip(steps, full, strict=True)][1:]
    for one in sampled.values():
        whole, never, early = one.results.frontier
        assert whole.agreement == never.agreement == whole.answer_agreement == never.answer_agreement == 1
        assert early.agreement == pytest.approx(sum(agreed) / len(agreed))
        assert early.tokens == whole.tokens == len(agreed)
    assert greedy[2].tokens != len(agreed) or greedy[2].agreement != early.agreement


@pytest.mark.slow
def test_sampled_lossless_text_is_not_compared_token_by_token(folder: Folder) -> None:
    rows = run(folder, [Sweep(MaxProb(0.02))], decoder=SelfSpeculative, sampler=Sampled(1.0)).results.frontier
    assert rows[0].agreement == 1
    assert rows[1].agreement is None


@pytest.mark.slow
def test_the_full_models_tokens_are_counted_once(folder: Folder) -> None:
    whole, *others = run(folder, [Sweep(MaxProb(0.5), [0.01, 0.9]), Sweep(Never())]).results.frontier
    assert {row.tokens for row in others} == {whole.tokens}
    assert whole.timed_tokens == sum(row.timed_tokens for row in others)


@pytest.mark.slow
def test_gates_can_be_named(folder: Folder) -> None:
    rows = run(folder, [Sweep(GateConfidence(0.5, gate="MambaGate"), [0.3, 0.7])]).results.frontier
    assert [(row.policy, row.threshold) for row in rows[1:]] == [
        ("GateConfidence(MambaGate)", 0.3),
        ("GateConfidence(MambaGate)", 0.7),
    ]


class TwoWays(ChoiceTask):
    """One question with two continuations."""

    headline = "first"

    def examples(self) -> list:  # noqa: ANN101
        from dynamax.tasks.base import ChoiceExample

        return [ChoiceExample("a", "Q: one or two?", (" one", " two"), {"mc1": {0: True, 1: False}})]

    def score_choices(self, example: Any, loglikelihoods: Any) -> dict[str, float]:  # noqa: ANN401
        return {"first": loglikelihoods[0], "second": loglikelihoods[1]}


@pytest.mark.parametrize("candidates", [("", " two"), (" one", "")])
def test_a_candidate_without_tokens_of_its_own_is_refused(
    folder: Folder, candidates: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynamax.tasks.base import ChoiceExample

    asked = ChoiceExample("q7", "Q: one or twe", candidates, {"mc1": {0: True, 1: False}})
    monkeypatch.setattr(TwoWays, "examples", lambda self: [asked])
    with pytest.raises(ValueError, match=r"Example q7: '' has no tokens behind the prompt"):
        run(folder, [Sweep(Never())], TwoWays())


def test_a_candidate_longer_than_the_context_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamax.tasks.base import ChoiceExample

    asked = ChoiceExample("q7", "Q:", (" one", " two" * 200), {"mc1": {0: True, 1: False}})
    monkeypatch.setattr(TwoWays, "examples", lambda self: [asked])
    with pytest.raises(ValueError, match="context holds 512"):
        run(folder, [Sweep(Never())], TwoWays())


def test_several_devices_are_refused(folder: Folder) -> None:
    module = DecodingModule(folder, [Sweep(Never())], exits={2: Exit()})
    module.trainer = Trainer(accelerator="cpu", devices=2, logger=False)
    with pytest.raises(ValueError, match="2 devices; it runs on one"):
        module.setup("test")


def test_likelihoods_are_the_models(folder: Folder) -> None:
    module = run(folder, [Sweep(Never()), Sweep(AtDepth(2))], TwoWays())
    full, never, early = module.results.frontier
    model, tokenizer = module.backbone.model, module.engine.tokenizer  # type: ignore[union-attr]
    for name, text in (("first", " one"), ("second", " two")):
        ids = torch.tensor([tokenizer("Q: one or two?" + text)["input_ids"]])
        logp = model(ids).logits[0].log_softmax(-1)
        start = ids.shape[1] - 4
        wanted = sum(float(logp[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
        assert full.scores[name] == pytest.approx(wanted, rel=1e-4)
        assert never.scores[name] == pytest.approx(wanted, rel=1e-4)
        assert early.scores[name] != pytest.approx(wanted, rel=1e-4)


def test_perplexity_is_the_models(folder: Folder, tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 4
    (tmp_path / "text.txt").write_text(text)
    module = run(folder, [Sweep(Never())], Perplexity(str(tmp_path / "text.txt")))
    ids = torch.tensor([[0, *module.engine.tokenizer(text)["input_ids"]]])
    loss = module.backbone.model(ids, labels=ids).loss  # type: ignore[union-attr]
    assert module.results.frontier[0].score == pytest.approx(float(loss.exp()), rel=1e-3)


def test_predict_answers_with_the_first_policy(folder: Folder) -> None:
    module = DecodingModule(folder, [Sweep(AtDepth(2))], exits={2: Exit()})
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    told = trainer.predict(module, datamodule=TaskData(Questions(limit=2, max_new_tokens=5)))
    assert told is not None
    assert all(answer["depths"][1:] == [2] * (len(answer["depths"]) - 1) for answer in told)


def test_policies_made_of_policies_are_told_apart(folder: Folder) -> None:
    sweeps = [
        Sweep(AnyOf([MaxProb(0.5), AtDepth(4)])),
        Sweep(AnyOf([Margin(0.5), AtDepth(4)])),
        Sweep(Decaying(MaxProb(0.5), temperature=1.0, horizon=8)),
        Sweep(MaxProb({2: 0.5, 4: 0.25})),
    ]
    exit_ = Exit()
    module = DecodingModule(folder, sweeps, exits={2: exit_, 4: exit_}, timed=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (told,) = trainer.test(module, datamodule=TaskData(Questions(limit=1, max_new_tokens=4)), verbose=False)
    assert {name.split("/")[1] for name in told} == {
        "Full",
        "AnyOf(MaxProb, AtDepth)@0.5",
        "AnyOf(Margin, AtDepth)@0.5",
        "Decaying(MaxProb)@0.5",
        "MaxProb@2=0.5,4=0.25",
    }


def test_likelihoods_under_an_approximate_rule_are_refused(folder: Folder) -> None:
    with pytest.raises(ValueError, match="Use EarlyExit with Exact state"):
        run(folder, [Sweep(Never())], TwoWays(), decoder=partial(EarlyExit, skipped_state=Propagate()))


def test_a_policy_at_a_depth_without_an_exit_is_refused(folder: Folder) -> None:
    with pytest.raises(ValueError, match="depth 3"):
        run(folder, [Sweep(AtDepth(3))])
