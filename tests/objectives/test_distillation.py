"""Distances between student and teacher, held against sums by hand."""

from __future__ import annotations

import pytest
import torch

from dynamax.backbones.hf import HFBackbone
from dynamax.objectives.distillation import LogitDistillation, distance, divergence
from dynamax.types import Span
from tests.tiny import tiny

DEPTH = 3


def pair() -> tuple[HFBackbone, HFBackbone]:
    student, teacher = (HFBackbone(tiny("llama", depth=DEPTH, seed=seed)) for seed in (0, 1))
    return student.requires_grad_(True), teacher


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("rows", "length"), [(2, 7), (1, 2)])
def test_parts_are_those_by_hand(temperature: float, rows: int, length: int) -> None:
    (student, teacher), tokens_BT = pair(), tokens(rows, length)
    loss, seen = LogitDistillation(temperature=temperature, divergence=0.7, cross_entropy=0.2, hidden=0.1).loss(
        student, teacher, tokens_BT
    )
    mine, theirs = student.reference(tokens_BT), teacher.reference(tokens_BT)
    p, q = (theirs / temperature).softmax(-1), (mine / temperature).softmax(-1)
    kl = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    text = student.model(tokens_BT, labels=tokens_BT).loss
    apart = []
    for block in range(DEPTH):
        h, wanted = (each.run(each.embed(tokens_BT), Span(0, block + 1)) for each in (student, teacher))
        apart += [((h - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()]
    hidden = torch.stack(apart).mean()
    torch.testing.assert_close(seen["divergence"], kl.detach())
    torch.testing.assert_close(seen["cross_entropy/top"], text.detach(), check_dtype=False)
    torch.testing.assert_close(seen["hidden"], hidden.detach())
    torch.testing.assert_close(loss, 0.7 * kl + 0.2 * text + 0.1 * hidden, check_dtype=False)


def test_gradients_reach_every_weight_of_the_student_and_none_of_the_teachers() -> None:
    student, teacher = pair()
    loss, seen = LogitDistillation().loss(student, teacher, tokens())
    loss.backward()
    assert set(seen) == {"cross_entropy/top", "divergence"}
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    _, teacher = pair()
    _, seen = LogitDistillation(hidden=1.0).loss(teacher, teacher, tokens())
    assert seen["divergence"].abs() < 1e-12
    assert seen["hidden"] == 0


def test_few_long_positions_are_not_all_of_the_distance() -> None:
    wanted = torch.ones(1, 2, 4)
    wanted[0, 0] *= 1000
    assert distance(torch.zeros(1, 2, 4), wanted).item() == 1.0


def test_the_temperature_leaves_the_size_of_gradients() -> None:
    logits = torch.randn(1, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = []
    for temperature in (10.0, 100.0):
        given = torch.zeros_like(logits, requires_grad=True)
        divergence(given, logits, temperature).backward()
        sizes.append(given.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)


NOT_FINITE = [
    {name: value}
    for name in ("temperature", "divergence", "cross_entropy", "hidden")
    for value in (float("nan"), float("inf"))
]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"hidden": -1.0}, {"divergence": 0.0}, *NOT_FINITE])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        LogitDistillation(**options)
