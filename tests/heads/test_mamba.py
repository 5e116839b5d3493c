"""The Mamba block against a loop over tokens in float64."""

import pytest
import torch
from torch.nn import functional as F

from dynamax.heads.blocks import MambaBlock
from dynamax.types import Memory

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def block(**options):
    torch.manual_seed(0)
    return MambaBlock(12, **{"d_state": 5, "d_conv": 4, "expand": 2, "headdim": 6, **options}).double()


def looped_block(m, x_TD):
    """One row through the block, a token at a time, written from the equations."""
    window = torch.zeros(m.conv.kernel_size[0], m.channels, dtype=torch.float64)
    state = torch.zeros(m.heads, m.d_inner // m.heads, m.d_state, dtype=torch.float64)
    out = []
    for x in x_TD:
        z, xbc, dt = (m.in_proj.weight @ x).split([m.d_inner, m.channels, m.heads])
        window = torch.cat([window[1:], xbc[None]])
        mixed = F.silu((window * m.conv.weight[:, 0].T).sum(0) + m.conv.bias)
        u, b, c = mixed.split([m.d_inner, m.d_state, m.d_state])
        u, dt = u.view(m.heads, -1), torch.log1p(torch.exp(dt + m.dt_bias))
        state = state * torch.exp(-dt * m.A_log.exp())[:, None, None] + torch.einsum("h,hp,n->hpn", dt, u, b)
        y = ((state @ c + m.D[:, None] * u).flatten() * F.silu(z)).detach()
        out.append(y / (y.square().mean() + 1e-6).sqrt())
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"d_conv": 1}, {"d_conv": 2, "headdim": 24}, {"expand": 1, "d_state": 1}])
def test_block_is_a_loop_over_tokens(options):
    m, x_BTD = block(**options), torch.randn(2, 40, 12, dtype=torch.float64)
    wanted = torch.stack([looped_block(m, x_TD) for x_TD in x_BTD])
    torch.testing.assert_close(m(x_BTD), wanted, **EXACT)


def continued(m, x_BTD, cuts, memory):
    parts = []
    for chunk_BTD in x_BTD.split(cuts, 1):
        parts.append(m(chunk_BTD, memory))
        memory.read += chunk_BTD.shape[1]
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "cuts", [[70], [1] * 70, [33, 37], [1, 2, 3, 64], [69, 1]], ids=lambda cuts: f"{len(cuts)}-from-{cuts[0]}"
)
def test_any_cut_of_a_sequence_gives_one_pass(cuts):
    m, x_BTD = block(), torch.randn(2, 70, 12, dtype=torch.float64)
    memory = Memory()
    torch.testing.assert_close(continued(m, x_BTD, cuts, memory), m(x_BTD), **EXACT)
    whole = Memory()
    m(x_BTD, whole)
    for name, tensor in whole.values.items():
        torch.testing.assert_close(memory.values[name], tensor, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [3, 9], [5, 1, 6]], ids=lambda cuts: f"{len(cuts)}-from-{cuts[0]}")
def test_rows_padded_at_the_left_are_the_rows_themselves(cuts):
    m, lengths = block(), [12, 7, 1]
    x_BTD = torch.randn(3, 12, 12, dtype=torch.float64)
    x_BTD[1, :5] = torch.nan  # what stands on padding must not matter, whatever it is
    memory = Memory(pad_B=torch.tensor([12 - length for length in lengths]))
    y_BTD = continued(m, x_BTD, cuts, memory)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(y_BTD[row, 12 - length :], m(x_BTD[row : row + 1, 12 - length :])[0], **EXACT)


@torch.no_grad()
def test_a_snapshot_is_not_changed_by_reading_on():
    m, x_BTD = block(), torch.randn(1, 9, 12, dtype=torch.float64)
    memory = Memory()
    continued(m, x_BTD[:, :4], [4], memory)
    snapshot = memory.copy()
    before = {name: tensor.clone() for name, tensor in snapshot.values.items()}
    continued(m, x_BTD[:, 4:], [1] * 5, memory)
    for name, tensor in before.items():
        assert torch.equal(snapshot.values[name], tensor)


def test_initial_decays_and_steps_are_in_their_ranges():
    m = MambaBlock(64, d_state=4, d_conv=4, expand=2, headdim=1)
    rates, steps = m.A_log.exp(), F.softplus(m.dt_bias)
    assert rates.min() >= 1 - 1e-4
    assert rates.max() <= 16 + 1e-4
    assert steps.min() >= 1e-3 - 1e-5
    assert steps.max() <= 0.1 + 1e-4
    assert steps.median() < 0.03  # log-uniform: half of them below 0.01


def test_under_autocast_gradients_are_finite():
    m = block().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = m(torch.randn(2, 40, 12))
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in m.parameters())
