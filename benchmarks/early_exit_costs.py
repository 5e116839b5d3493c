"""What asking an exit costs, what leaving there saves, and which policies are best by that."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.engine import Engine
from dynamax.policies import AllOf, CandidateProb, Cascade, GateConfidence, MaxProb, Never, OnlyAt, TerminationPolicy
from dynamax.types import Evidence

GATES = ("LinearGate", "MambaGate")
SHARES = [index / 50 for index in range(1, 46)]
"""Shares of positions that a first gate lets through, and of those, shares that leave."""


class Answer(NamedTuple):
    """A prompt ``tokens_1T``, and what the full model says, ``tokens_1T``."""

    prompt_1T: Tensor
    said_1T: Tensor


class EverySecond(TerminationPolicy):
    """Leaves at every second step."""

    gates = ()

    def __call__(self, evidence: Evidence) -> Tensor:
        """All rows at odd steps, none at even ones."""
        return evidence.hidden.new_full((len(evidence.hidden),), bool(evidence.step % 2), dtype=torch.bool)


def in_turn(decoders: dict[str, Decoder], answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Decode along each answer, all decoders a step each in turn, in random order.

    Returns:
        For each answer and decoder, milliseconds of its steps after the first, and whether tokens are the answer's.
    """
    order, rows = random.Random(0), []
    for prompt_1T, said_1T in answers:
        given = {"max_new_tokens": said_1T.shape[1], "forced_BT": said_1T}
        running = {name: decoder.decode(prompt_1T, **given) for name, decoder in decoders.items()}
        row = {name: ([], [], []) for name in running}
        for place, token in enumerate(said_1T[0].tolist()):
            for name in order.sample(list(running), len(running)):
                begin = time.perf_counter()
                step = next(running[name])
                spent = 1000 * (time.perf_counter() - begin)
                if place:
                    for known, value in zip(row[name], (spent, int(step.token_B) == token, step.depth), strict=True):
                        known.append(value)
        rows.append(row)
        for steps in running.values():
            steps.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    return rows


def extra(rows: list[dict[str, Any]], name: str, base: str) -> float:
    """Microseconds a step that one decoder takes more than another: the median of pairs of steps, over all answers."""
    pairs = [(a, b) for row in rows for a, b in zip(row[name][0], row[base][0], strict=True)]
    return 1000 * statistics.median(a - b for a, b in pairs)


def costs(engine: Engine, answers: list[Answer], frequent: int = 2048) -> dict[str, Any]:
    """Microseconds, by depth: of passing an exit, of each reading, and what leaving saves."""
    bank = engine.exits
    assert bank is not None, "heads were given"
    never, second = Never(), EverySecond()
    few = CandidateProb(0.0, frequent=frequent)
    tried: dict[str, TerminationPolicy] = {"pass": never, "CandidateProb": AllOf([few, never])}
    tried["MaxProb"] = AllOf([MaxProb(0.0), never])
    tried["leave with MaxProb"] = AllOf([second, MaxProb(0.0)])
    tried["leave with CandidateProb"] = AllOf([second, few])
    found: dict[str, Any] = {}
    for depth in bank.depths:
        mine = tried | {name: AllOf([GateConfidence(0.0, gate=name), never]) for name in bank.gates(depth)}
        decoders = {name: engine.decoder(OnlyAt(policy, [depth]), EarlyExit) for name, policy in mine.items()}
        decoders["full"] = engine.decoder(None, Full)
        in_turn(decoders, answers[:1])  # steps of each kind are recorded
        rows = in_turn(decoders, answers)
        row = {name: extra(rows, name, "pass") for name in mine if name != "pass" and not name.startswith("leave")}
        row["pass"] = extra(rows, "pass", "full")
        for kind in ("MaxProb", "CandidateProb"):
            spent = [means(each[f"leave with {kind}"][0]) - means(each["pass"][0]) for each in rows]
            row[f"saved with {kind}"] = -2000 * statistics.median(spent)  # every second step leaves
        row["full"] = 1000 * statistics.median(ms for each in rows for ms in each["full"][0])
        found[str(depth)] = row
    return found


def means(times: list[float]) -> float:
    """The mean of both medians: of the even steps and of the odd ones, which pay the debt or leave."""
    return (statistics.median(times[::2]) + statistics.median(times[1::2])) / 2


def readings(engine: Engine, answers: list[Answer]) -> dict[int, dict[str, Tensor]]:
    """What each exit says at all positions after the first of each answer, by depth and score."""
    found: dict[int, dict[str, list[Tensor]]] = {}
    for prompt_1T, said_1T in answers:
        text = engine.read(torch.cat([prompt_1T, said_1T[:, :-1]], 1), start=prompt_1T.shape[1] - 1)
        top_T = said_1T[0]
        few = [(CandidateProb(0.0).score(evidence), evidence.answer.argmax(-1) == top_T) for evidence in text.exits]
        for evidence, (prob_T, right_T) in zip(text.exits, few, strict=True):  # before one of them is read in full
            row = {"CandidateProb": prob_T, "CandidateProb right": right_T, "MaxProb": MaxProb(0.0).score(evidence)}
            row |= {name: evidence.confidence(name) for name in GATES} | {"MaxProb right": evidence.token == top_T}
            for name, said_T in row.items():
                found.setdefault(evidence.depth, {}).setdefault(name, []).append(said_T[1:].float())
    return {depth: {name: torch.cat(parts) for name, parts in row.items()} for depth, row in found.items()}


class Choice(NamedTuple):
    """A policy, the microseconds a token that it would save, and its share of positions that leave."""

    saves: float
    policy: TerminationPolicy
    leaves: float


def choose(said: dict[int, dict[str, Tensor]], cost: dict[str, Any], wanted: float) -> dict[str, Choice]:
    """For each kind of policy that asks one exit, the one that would save most at the wanted share of same tokens."""
    best: dict[str, Choice] = {}
    for depth, row in said.items():
        price = cost[str(depth)]
        for first in GATES:
            score_N, size = row[first], len(row[first])
            gate = price["pass"] + price[first]
            for share in SHARES:
                low = quantile(score_N, share)
                past_N = score_N >= low
                wrong = (past_N & (row["MaxProb right"] == 0)).sum().item() / size
                leaves = past_N.float().mean().item()
                if 1 - wrong >= wanted:
                    policy = OnlyAt(GateConfidence(low, gate=first), [depth])
                    keep(best, first, Choice(leaves * price["saved with MaxProb"] - gate, policy, leaves))
                seconds = (("MaxProb", MaxProb), ("CandidateProb", CandidateProb))
                for kind, second in seconds if first == "LinearGate" else ():
                    for inner in SHARES:
                        high = quantile(row[kind][past_N], inner)
                        left_N = past_N & (row[kind] >= high)
                        wrong = (left_N & (row[f"{kind} right"] == 0)).sum().item() / size
                        if 1 - wrong < wanted:
                            continue
                        left = left_N.float().mean().item()
                        saves = left * price[f"saved with {kind}"] - (leaves - left) * price[kind] - gate
                        policy = OnlyAt(Cascade([GateConfidence(low, gate=first), second(high)]), [depth])
                        keep(best, f"{first}, {kind}", Choice(saves, policy, left))
    return best


def keep(best: dict[str, Choice], name: str, choice: Choice) -> None:
    """Keep the better one."""
    if name not in best or choice.saves > best[name].saves:
        best[name] = choice


def quantile(score_N: Tensor, share: float) -> float:
    """A threshold that a share of the scores reaches, rounded down to what a configuration would say."""
    return int(1000 * torch.quantile(score_N, 1 - share).item()) / 1000


def everywhere(said: dict[int, dict[str, Tensor]], wanted: float) -> dict[str, TerminationPolicy]:
    """Policies that ask all exits with one threshold: the lowest that keeps the wanted share of same tokens."""
    found: dict[str, TerminationPolicy] = {}
    makers: dict[str, Callable[[float], TerminationPolicy]] = {"MaxProb": MaxProb}
    makers |= {name: lambda level, name=name: GateConfidence(level, gate=name) for name in GATES}
    for name, make in makers.items():
        for level in (index / 200 for index in range(80, 201)):
            stays_N, wrong = torch.ones(len(said[min(said)][name]), dtype=torch.bool), 0
            for row in said.values():
                leaves_N = stays_N & (row[name] >= level)
                wrong += (leaves_N & (row["MaxProb right"] == 0)).sum().item()
                stays_N &= ~leaves_N
            if 1 - wrong / len(stays_N) >= wanted:
                found[f"{name}, all exits"] = make(level)
                break
    return found


def perfect(said: dict[int, dict[str, Tensor]], cost: dict[str, Any]) -> dict[str, float]:
    """Microseconds a token that a gate would save that knows which exits are right and costs nothing."""
    bound = {}
    stays_N, saved = torch.ones(len(said[min(said)]["MaxProb right"]), dtype=torch.bool), 0.0
    for depth, row in said.items():
        right_N, price = row["MaxProb right"] > 0, cost[str(depth)]
        bound[str(depth)] = right_N.float().mean().item() * price["saved with MaxProb"] - price["pass"]
        saved += (stays_N & right_N).float().mean().item() * price["saved with MaxProb"]
        saved -= stays_N.float().mean().item() * price["pass"]
        stays_N &= ~right_N
    return bound | {"all exits": saved}
