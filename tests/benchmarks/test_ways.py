"""What a way of leaving keeps and saves, against a position-by-position simulation."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ways_to_leave import LEVELS, Choice, Scores, chosen, departures, oracle, table, ways

DEPTHS = [2, 4, 6, 8]
NAMES = ("LinearGate", "MambaGate", "UncertaintyGate", "MaxProb", "CandidateProb")
PRICES = {
    str(depth): {
        "pass": 3.0,
        "LinearGate": 5.0,
        "MambaGate": 9.0,
        "UncertaintyGate": 50.0,
        "MaxProb": 40.0,
        "CandidateProb": 12.0,
        "saved with MaxProb": 100.0 * (8 - depth),
        "saved with CandidateProb": 100.0 * (8 - depth) + 30,
        "full": 900.0,
    }
    for depth in DEPTHS[:-1]
}


@pytest.fixture(scope="module")
def scores() -> Scores:
    dice = torch.Generator().manual_seed(0)
    found = {name: torch.rand(3, 400, generator=dice, dtype=torch.float64) for name in NAMES}
    for name in ("right", "CandidateProb right"):  # right as often as the scores say
        found[name] = (torch.rand(3, 400, generator=dice, dtype=torch.float64) < found["MaxProb"]).double()
    return found


def simulated(kind: str, scores: Scores, choice: Choice) -> tuple[float, float, float]:
    """One position after the other, by the words of the module."""
    same = blocks = saved = 0.0
    count = scores["right"].shape[1]
    gate, _, second = kind.partition(", then ")
    for n in range(count):
        left = None
        for place in choice.exits:
            price, limit = PRICES[str(DEPTHS[place])], choice.levels.get(DEPTHS[place], 2.0)
            saved -= price["pass"] + (price[gate] if gate.endswith("Gate") else 0.0)
            if second and scores[gate][place, n] < choice.low:
                continue
            asked = second or gate
            leaves = bool(scores[asked][place, n] >= limit)
            if not asked.endswith("Gate") and not leaves:
                saved -= price[asked]
            if leaves:
                end = asked if not asked.endswith("Gate") else "MaxProb"
                saved += price[f"saved with {end}"] + (price["MaxProb"] if gate == "UncertaintyGate" else 0.0)
                left = place
                break
        word = "CandidateProb right" if (second or gate) == "CandidateProb" else "right"
        same += 1.0 if left is None else float(scores[word][left, n])
        blocks += 8 if left is None else DEPTHS[left]
    return same / count, blocks / count, saved / count


def test_every_way_is_there(scores: Scores) -> None:
    assert set(ways(scores, 16)) == {
        *("MaxProb", "CandidateProb", "LinearGate", "MambaGate", "UncertaintyGate", "JEI-DNN"),
        *(f"{gate}, then {end}" for gate in ("LinearGate", "MambaGate") for end in ("MaxProb", "CandidateProb")),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "MaxProb",
        "CandidateProb",
        "LinearGate",
        "UncertaintyGate",
        "LinearGate, then MaxProb",
        "MambaGate, then CandidateProb",
    ],
)
def test_departures_are_those_of_a_simulation(kind: str, scores: Scores) -> None:
    for exits in ((0, 1, 2), (0, 2), (1,)):
        choice = Choice(0.0, exits, {DEPTHS[place]: 0.6 + 0.1 * place for place in exits}, low=0.4)
        found = departures(ways(scores, 16)[kind], scores, choice, DEPTHS, PRICES)
        assert found == pytest.approx(simulated(kind, scores, choice))


def test_the_choice_keeps_what_was_wanted_and_saves_most(scores: Scores) -> None:
    way = ways(scores, 16)["MaxProb"]
    best = chosen(way, scores, DEPTHS, PRICES)
    for wanted in LEVELS:
        same, _, saves = departures(way, scores, best[wanted], DEPTHS, PRICES)
        assert same >= wanted
        assert saves == pytest.approx(best[wanted].saves)
        for level in (0.9, 0.95, 0.99):  # one threshold for all exits is among what could be chosen, nearly
            other = Choice(0.0, (0, 1, 2), dict.fromkeys((2, 4, 6), level))
            if (figures := departures(way, scores, other, DEPTHS, PRICES))[0] >= wanted:
                assert figures[2] <= best[wanted].saves * 1.1 + 5
    assert best[0.99].saves <= best[0.98].saves <= best[0.95].saves <= best[0.90].saves


def test_nothing_is_chosen_where_nothing_is_saved(scores: Scores) -> None:
    dear = {depth: {**row, "MaxProb": 1e6} for depth, row in PRICES.items()}
    assert all(not choice.exits for choice in chosen(ways(scores, 16)["MaxProb"], scores, DEPTHS, dear).values())


def test_no_way_keeps_all_and_saves_more_than_the_oracle(scores: Scores) -> None:
    best = oracle(scores, DEPTHS, PRICES)
    assert best["same"] == 1.0
    first_N = torch.cat([scores["right"] > 0, torch.ones(1, 400, dtype=torch.bool)]).int().argmax(0)
    assert best["blocks"] == pytest.approx(torch.tensor(DEPTHS)[first_N].double().mean().item())
    saved = sum(100.0 * (8 - DEPTHS[place]) for place in first_N.tolist()) / 400
    assert best["time"] == pytest.approx(1 - saved / 900)


def test_the_table_says_full_decoding_where_nothing_was_chosen() -> None:
    timed = {"same": 0.98, "blocks": 7.0, "exits": [2], "speed-up": 1.1, "free bytes": 0.9}
    timed |= {"free same answers": 0.5, "free speed-up": 1.05}
    rows = {"MaxProb": {"0.99": {"same": 1.0, "blocks": 8.0}, "0.98": timed}}
    best = {"same": 1.0, "blocks": 5.0, "time": 0.5}
    model = {"depths": DEPTHS, "right": [0.5, 0.6, 0.7], "oracle": best, "rows": rows}
    text = table({"models": {"small": model}})
    assert "full decoding" in text
    assert "0.980 /  7.0 / 1.10; 0.90, 50%, 1.05" in text
