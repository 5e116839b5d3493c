"""What every termination policy must do, as a check that a plug-in's author can run. Needs no backbone and no head.

The policy climbs made-up exits. In the *worlds* it climbs, hidden states, gates and lenses are random; lenses are
of every sharpness, from nearly uniform to certain, and in part of the worlds the exits say the same token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynamax.errors import UserError
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Evidence

WORLDS = 6
ROWS, WIDTH, VOCAB = 7, 8, 11


@dataclass(frozen=True)
class World:
    """What there is to see at the exits of one step, by exit."""

    hidden_EBD: Tensor
    logits_EBV: Tensor
    score_EB: Tensor

    def rows(self, index_B: Tensor) -> World:
        """Some of the rows, in this order."""
        return World(self.hidden_EBD[:, index_B], self.logits_EBV[:, index_B], self.score_EB[:, index_B])


def made(depths: Sequence[int], seed: int) -> World:
    """A random world; in those of odd seed the exits agree on the token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    exits = len(depths)
    hidden_EBD = normal(1, ROWS, WIDTH) + normal(exits, ROWS, 1).abs() * normal(exits, ROWS, WIDTH)
    logits_EBV = normal(1 if seed % 2 else exits, ROWS, VOCAB).expand(exits, -1, -1)
    logits_EBV = logits_EBV * normal(exits, ROWS, 1).mul(2).exp()
    return World(hidden_EBD, logits_EBV, normal(exits, ROWS).mul(3))


def climb(world: World, depths: Sequence[int], gate: str) -> Iterator[Evidence]:
    """Evidence of the exits, shallowest first, each with the earlier ones in its trail."""
    seen: list[Evidence] = []
    for hidden_BD, logits_BV, s_B, depth in zip(
        world.hidden_EBD, world.logits_EBV, world.score_EB, depths, strict=True
    ):
        logits: Callable[[], Tensor] = lambda logits_BV=logits_BV: logits_BV  # noqa: E731 - bound now
        gates: dict[str, Callable[[Evidence], Tensor]] = {gate: lambda _, s_B=s_B: s_B}
        seen.append(Evidence(depth, depths[-1] + 1, 3, hidden_BD, logits=logits, gates=gates, trail=seen))
        yield seen[-1]


def check_policy(
    policy: TerminationPolicy,
    *,
    thresholds: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    depths: Sequence[int] = (2, 4, 6),
    gate: str = "LinearGate",
) -> None:
    """Check a policy against the contract.

    It answers one bool a row; asked again it answers the same; rows do not mix; a greater threshold leaves
    nowhere that a smaller one would not, and ``at`` changes no policy but the new one; it asks no gate that its
    ``gates`` do not name; logits are read only by a policy whose answers depend on them.

    Args:
        policy: The policy, at a threshold at which it sometimes leaves and sometimes stays.
        thresholds: Thresholds to sweep it over, ascending; not used where the policy has none.
        depths: Depths of the made-up exits.
        gate: Class name of their gate.

    Raises:
        UserError: Naming the first thing that is wrong.

    Example:
        >>> from dynamax.policies import MaxProb
        >>> check_policy(MaxProb(0.5))
    """
    worlds = [made(depths, seed) for seed in range(WORLDS)]
    policy.validate(depths)
    for world in worlds:
        check_answer(policy, world, depths, gate)
        if policy.threshold is not None:
            check_sweep(policy, world, depths, gate, thresholds)
    check_logits(policy, worlds, depths, gate)


def demand(policy: TerminationPolicy, holds: bool, message: str) -> None:
    """Raise unless it holds.

    Raises:
        UserError: With the message, behind the name of the class.
    """
    if not holds:
        raise UserError(f"{type(policy).__name__} {message}.")


def answers(policy: TerminationPolicy, world: World, depths: Sequence[int], gate: str) -> Tensor:
    """What the policy says at each exit, ``leave_EB``."""
    return torch.stack([policy(evidence) for evidence in climb(world, depths, gate)])


def check_answer(policy: TerminationPolicy, world: World, depths: Sequence[int], gate: str) -> None:
    """One bool a row, the same when asked again and whatever rows are beside it; no gate but those named."""
    for evidence in climb(world, depths, gate):
        leave_B = policy(evidence)
        given = (tuple(leave_B.shape), leave_B.dtype)
        demand(policy, given == ((ROWS,), torch.bool), f"answered {given} for {ROWS} rows; wanted one bool a row")
        kept_B = leave_B.clone()
        again_B = policy(evidence)
        demand(policy, torch.equal(again_B, kept_B), "answers otherwise when asked again; keep nothing between calls")
        named = policy.gates is None or set(evidence.gates_read) <= set(policy.gates)
        demand(
            policy, named, f"asks {evidence.gates_read}, which its gates {policy.gates} do not name; name them there"
        )
        demand(policy, torch.equal(leave_B, kept_B), "wrote into an answer it had given; make a new tensor instead")
    whole_EB = answers(policy, world, depths, gate)
    for index in range(ROWS):
        alone_E1 = answers(policy, world.rows(torch.tensor([index])), depths, gate)
        same = torch.equal(alone_E1[:, 0], whole_EB[:, index])
        demand(policy, same, "answers otherwise for a row that stands alone; rows must not mix")


def check_sweep(
    policy: TerminationPolicy, world: World, depths: Sequence[int], gate: str, thresholds: Sequence[float]
) -> None:
    """A greater threshold leaves at fewer places, and the policy itself stays as it was."""
    before_EB = answers(policy, world, depths, gate)
    swept = [answers(policy.at(threshold), world, depths, gate) for threshold in thresholds]
    for index in range(1, len(swept)):
        lower, upper = thresholds[index - 1], thresholds[index]
        nested = not (swept[index] & ~swept[index - 1]).any()
        demand(policy, nested, f"leaves at threshold {upper} where it stays at {lower}; greater must mean surer")
    same = torch.equal(answers(policy, world, depths, gate), before_EB)
    demand(policy, same, "was changed by at(); it must return a copy")


def check_logits(policy: TerminationPolicy, worlds: Sequence[World], depths: Sequence[int], gate: str) -> None:
    """Logits cost the output matrix: who reads them must need them."""

    def reads(world: World) -> bool:
        seen = list(climb(world, depths, gate))
        for evidence in seen:
            policy(evidence)
        return any(evidence.logits_read for evidence in seen)

    def depends(world: World, other: World) -> bool:
        mixed = replace(world, logits_EBV=other.logits_EBV)
        return not torch.equal(answers(policy, world, depths, gate), answers(policy, mixed, depths, gate))

    needed = any(depends(world, other) for world in worlds for other in worlds)
    demand(
        policy,
        needed or not any(map(reads, worlds)),
        "reads logits, which cost the output matrix, but its answers never depend on them; do not touch them",
    )
