"""The benchmark of early exits, on a tiny model and on scores by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks import early_exit
from benchmarks.early_exit_costs import Answer, EverySecond, choose, costs, everywhere, in_turn, perfect, readings
from dynamax.backbones.hf import HFBackbone
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.engine import Engine
from dynamax.heads import LinearGate, MambaGate, TunedLens
from dynamax.heads.bank import Exit, ExitBank
from dynamax.policies import OnlyAt
from dynamax.testing import stir
from tests.tiny import tiny

PRICE = {"pass": 100.0, "LinearGate": 50.0, "MambaGate": 300.0, "MaxProb": 1000.0, "CandidateProb": 400.0}
PRICE |= {"saved with MaxProb": 2000.0, "saved with CandidateProb": 3000.0}


@pytest.fixture
def engine() -> Engine:
    backbone = HFBackbone(tiny("llama", dtype=torch.float32))
    bank = ExitBank({depth: Exit(TunedLens, [LinearGate, MambaGate]) for depth in (2, 4)}, backbone.site)
    stir(bank)
    return Engine(backbone, None, bank)


def answers(engine: Engine, count: int = 2) -> list[Answer]:
    prompts = [torch.randint(60, (1, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    return [Answer(prompt_1T, early_exit.says(engine.decoder(None, Full), prompt_1T, 9, ())) for prompt_1T in prompts]


def test_decoders_in_turn_are_the_decoders_alone(engine: Engine) -> None:
    decoders = {"full": engine.decoder(None, Full), "second": engine.decoder(OnlyAt(EverySecond(), [4]), EarlyExit)}
    for row, (prompt_1T, said_1T) in zip(in_turn(decoders, answers(engine)), answers(engine), strict=True):
        for name, decoder in decoders.items():
            alone = list(decoder.decode(prompt_1T, max_new_tokens=9, forced_BT=said_1T))[1:]
            times, same, depths = row[name]
            assert depths == [step.depth for step in alone]
            assert same == [int(step.token_B) == t for step, t in zip(alone, said_1T[0, 1:].tolist(), strict=True)]
            assert min(times) > 0
        assert row["second"][2] == [4, 6] * 4


@pytest.mark.slow
def test_every_part_is_measured_and_printed(engine: Engine) -> None:
    texts = answers(engine)
    with torch.inference_mode():
        cost, said = costs(engine, texts), readings(engine, texts)
        assert set(cost) == {"2", "4"}
        assert all(set(row) == {*PRICE, "full"} for row in cost.values())
        assert {len(scores) for row in said.values() for scores in row.values()} == {2 * 8}
        policies = everywhere(said, 0.0) | {name: each.policy for name, each in choose(said, cost, 0.0).items()}
        decoders = {name: engine.decoder(policy, EarlyExit) for name, policy in policies.items()}
        found = early_exit.speeds(engine, engine.backbone.model, decoders, texts, 1)
    assert set(found) == {"full", "full again", *policies}
    assert (found["full"]["same tokens"], found["full"]["depth"], found["full"]["total"]) == (1, 6, 1)
    chosen = {name: {"policy": early_exit.said_of(policy), "saves": None} for name, policy in policies.items()}
    report = {"costs": cost, "right": {"2": 0.5, "4": 0.5}, "perfect": perfect(said, cost)}
    assert "break-even" in early_exit.exits_table(report)
    assert "LinearGate, CandidateProb" in early_exit.speeds_table({"speeds": found, "chosen": chosen})


def scores(right: list[int], gate: list[float]) -> dict[str, torch.Tensor]:
    row = {"LinearGate": gate, "MambaGate": gate, "MaxProb": gate, "CandidateProb": [0.5] * len(gate)}
    return {name: torch.tensor(each) for name, each in row.items()} | {
        "MaxProb right": torch.tensor(right).float(),
        "CandidateProb right": torch.zeros(len(right)),
    }


@pytest.mark.slow
def test_the_choice_is_what_saves_most_without_more_errors_than_are_wanted() -> None:
    gate = [index / 10 for index in range(10)]
    said = {8: scores([0, 0, 0, 0, 0, 0, 0, 1, 0, 1], gate), 9: scores([0, 0, 0, 0, 0, 0, 1, 1, 0, 1], gate)}
    cost = {"8": PRICE, "9": PRICE}
    best = choose(said, cost, 1.0)["LinearGate"]  # only the surest is right without an error before it
    assert best.leaves == pytest.approx(0.1)
    assert best.saves == pytest.approx(0.1 * 2000 - 150)
    best = choose(said, cost, 0.9)["LinearGate"]  # one error: at exit 9 four may leave, at exit 8 three
    assert (best.policy.depths, best.leaves) == ((9,), pytest.approx(0.4))
    assert choose(said, cost, 0.9)["MambaGate"].saves == pytest.approx(best.saves - 250)
    assert "LinearGate, CandidateProb" not in choose(said, cost, 1.0)  # its tokens are never right
    level = everywhere(said, 0.9)["LinearGate, all exits"].threshold  # exit 8 is asked first
    assert level == pytest.approx(0.605, abs=0.01)


def test_a_perfect_gate_leaves_where_exits_are_right() -> None:
    said = {8: scores([1, 0, 0, 0], [0.0] * 4), 9: scores([1, 1, 0, 0], [0.0] * 4)}
    bound = perfect(said, {"8": PRICE, "9": PRICE | {"saved with MaxProb": 1000.0}})
    assert bound["8"] == pytest.approx(0.25 * 2000 - 100)
    assert bound["9"] == pytest.approx(0.5 * 1000 - 100)
    assert bound["all exits"] == pytest.approx(0.25 * 2000 - 100 + 0.25 * 1000 - 0.75 * 100)
