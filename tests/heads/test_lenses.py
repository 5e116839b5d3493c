"""Lenses against their own algebra, by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynamax.heads import BridgeLens, LastBlockLens, LogitLens, LowRankLens, MLPLens, TunedLens, UntiedLens
from dynamax.testing import stir, toy_site

SITE = toy_site()
WIDTH = SITE.spec.width
LENSES = [LogitLens, TunedLens, LowRankLens, LastBlockLens, UntiedLens]


def states(*shape, dtype=torch.float64):
    return torch.randn(*shape, WIDTH, dtype=dtype)


@pytest.mark.parametrize("lens_class", [LogitLens, TunedLens, LowRankLens, MLPLens])
def test_starts_as_the_logit_lens(lens_class):
    h_BTD = states(2, 3, dtype=torch.float32)
    assert torch.equal(lens_class(SITE).translate(h_BTD, SITE), SITE.normalize(h_BTD))


def test_tuned_lens_is_affine_in_the_normed_state():
    lens = TunedLens(SITE).double()
    stir(lens)
    h_BTD = states(2, 3)
    u_BTD = h_BTD / h_BTD.square().mean(-1, keepdim=True).add(torch.finfo(torch.float64).eps).sqrt()
    wanted = u_BTD + torch.einsum("ed,btd->bte", lens.shift.weight, u_BTD) + lens.shift.bias
    torch.testing.assert_close(lens.translate(h_BTD, SITE), wanted, rtol=1e-12, atol=1e-12)


def test_weight_decay_pulls_to_the_logit_lens():
    lens, h_BTD = TunedLens(SITE), states(1, 1, dtype=torch.float32)
    stir(lens)
    decay = torch.optim.AdamW(lens.parameters(), lr=0.1, weight_decay=5.0)
    for parameter in lens.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(40):
        decay.step()
    torch.testing.assert_close(lens.translate(h_BTD, SITE), SITE.normalize(h_BTD))


def test_low_rank_lens_at_full_rank_can_be_any_tuned_lens():
    low, full = LowRankLens(SITE, rank=WIDTH).double(), TunedLens(SITE).double()
    stir(full)
    with torch.no_grad():
        low.down.weight.copy_(torch.eye(WIDTH))
        low.up.load_state_dict(full.shift.state_dict())
    h_BTD = states(2, 3)
    torch.testing.assert_close(low.translate(h_BTD, SITE), full.translate(h_BTD, SITE))


def test_last_block_lens_runs_the_last_block_then_the_norm():
    h_BTD = states(2, 3)
    wanted = SITE.normalize(SITE.last_blocks(h_BTD, 1))
    assert torch.equal(LastBlockLens(SITE).translate(h_BTD, SITE), wanted)
    assert LastBlockLens.writes_last_block
    assert (LastBlockLens.last_blocks, TunedLens.last_blocks) == (1, 0)


def test_a_bridge_maps_the_state_and_runs_the_late_blocks():
    lens = BridgeLens(SITE, blocks=2).double()
    h_BTD = states(2, 3)
    assert torch.equal(lens.translate(h_BTD, SITE), SITE.normalize(SITE.last_blocks(h_BTD, 2)))
    stir(lens)
    u_BTD = h_BTD / h_BTD.square().mean(-1, keepdim=True).add(torch.finfo(torch.float64).eps).sqrt()
    late_BTD = h_BTD + torch.einsum("ed,btd->bte", lens.shift.weight, u_BTD) + lens.shift.bias
    wanted = SITE.normalize(SITE.last_blocks(SITE.last_blocks(late_BTD, 1), 1))
    torch.testing.assert_close(lens.translate(h_BTD, SITE), wanted, rtol=1e-12, atol=1e-12)
    assert (lens.last_blocks, lens.writes_last_block) == (2, False)


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_bridge_to_below_its_own_exit_is_refused(blocks):
    with pytest.raises(ValueError, match=f"at depth 2 was given blocks {blocks}; above it there are 2 of the 4"):
        BridgeLens(SITE, blocks=blocks)


def test_untied_lens_has_a_norm_and_a_matrix_of_its_own():
    lens = UntiedLens(SITE, eps=1e-3).double()
    stir(lens)
    h_BTD, tokens_C = states(2, 3), torch.tensor([5, 2])
    u_BTD = lens.norm.weight * h_BTD / h_BTD.square().mean(-1, keepdim=True).add(1e-3).sqrt()
    wanted = torch.einsum("vd,btd->btv", lens.output.weight, u_BTD)
    found = lens.translate(h_BTD, SITE)
    torch.testing.assert_close(lens.project(found, SITE), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lens.project(found, SITE, tokens_C), wanted[..., tokens_C], rtol=1e-12, atol=1e-12)
    for other in (TunedLens(SITE).double(), LogitLens(SITE)):
        assert torch.equal(other.project(u_BTD, SITE, tokens_C), SITE.project(u_BTD, tokens_C))


@pytest.mark.parametrize(
    ("lens", "parameters"),
    [
        (LogitLens(SITE), 0),
        (TunedLens(SITE), WIDTH**2 + WIDTH),
        (LowRankLens(SITE, rank=5), 2 * WIDTH * 5 + WIDTH),
        (MLPLens(SITE, hidden=7), 2 * WIDTH * 7 + 7 + WIDTH),
        (BridgeLens(SITE, blocks=2), WIDTH**2 + WIDTH),
        (LastBlockLens(SITE), 0),
        (UntiedLens(SITE), WIDTH * SITE.spec.vocab + WIDTH),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_parameters_and_flops_are_as_told(lens, parameters):
    assert sum(parameter.numel() for parameter in lens.parameters()) == parameters
    own = toy_site()
    counter = FlopCounterMode(display=False)
    with counter:
        lens.translate(states(1, 1, dtype=torch.float32), own)
    block = 2 * WIDTH**2 * lens.last_blocks
    assert counter.get_total_flops() == lens.flops() + block


@pytest.mark.parametrize("rank", [0, -1, WIDTH + 1])
def test_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank.* {rank}|{rank}.*rank"):
        LowRankLens(SITE, rank=rank)


def test_logits_stay_float32_in_a_bfloat16_backbone():
    lens, h_BTD = TunedLens(SITE), states(2, 3, dtype=torch.bfloat16)
    stir(lens)
    u_BTD = lens.translate(h_BTD, SITE)
    assert u_BTD.dtype == torch.bfloat16
    assert SITE.project(u_BTD).dtype == torch.float32
