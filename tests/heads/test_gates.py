"""Gates against plain formulas; the Mamba block has a file of its own."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dynamax.heads import AttentionGate, FFNGate, LinearGate, MambaGate, MLPGate, UncertaintyGate
from dynamax.heads.blocks import CausalAttention, rotate, swiglu_width
from dynamax.testing import stir, toy_evidence, toy_site
from dynamax.types import Evidence, Memory

SITE = toy_site()
D = SITE.spec.width
GATES = [LinearGate, MLPGate, FFNGate, MambaGate, AttentionGate]


def states(*shape, dtype=torch.float64):
    return torch.randn(*shape, D, dtype=dtype)


def normed(x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("gate_class", GATES)
def test_starts_undecided(gate_class):
    assert torch.equal(
        gate_class(SITE).score(toy_evidence(states(2, 3, dtype=torch.float32))).sigmoid(), torch.full((2, 3), 0.5)
    )


@pytest.mark.parametrize("gate_class", GATES)
def test_does_not_depend_on_the_scale_of_the_residual_stream(gate_class):
    gate, h_BTD = gate_class(SITE).double(), states(1, 4)
    stir(gate)
    torch.testing.assert_close(
        gate.score(toy_evidence(1000 * h_BTD)), gate.score(toy_evidence(h_BTD)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("gate_class", GATES)
def test_learns_a_rule(gate_class):
    torch.manual_seed(0)
    gate, h_BTD = gate_class(SITE), states(32, 8, dtype=torch.float32)
    label_BT = (h_BTD[..., 0] + h_BTD[..., 1] > 0).float()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(gate.score(toy_evidence(h_BTD)), label_BT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.45  # zero_init is 0.69


def test_linear_gate_is_a_two_class_softmax():
    gate, h_BTD = LinearGate(SITE).double(), states(2, 3)
    two_DC, bias_C = torch.randn(D, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    with torch.no_grad():
        gate.out.weight.copy_((two_DC[:, 1] - two_DC[:, 0])[None])
        gate.out.bias.copy_((bias_C[1] - bias_C[0])[None])
    wanted = (normed(h_BTD) @ two_DC + bias_C).softmax(-1)[..., 1]
    torch.testing.assert_close(gate.score(toy_evidence(h_BTD)).sigmoid(), wanted)


def test_mlp_gate_is_its_formula():
    gate, h_BTD = MLPGate(SITE, hidden=7).double(), states(2, 3)
    stir(gate)
    hidden = F.silu(normed(h_BTD) @ gate.enter.weight.T + gate.enter.bias)
    torch.testing.assert_close(gate.score(toy_evidence(h_BTD)), hidden @ gate.out.weight[0] + gate.out.bias)


def test_ffn_gate_is_its_formula():
    gate, h_BTD = FFNGate(SITE, hidden=7).double(), states(2, 3)
    stir(gate)
    u = normed(h_BTD)
    hidden = F.silu(u @ gate.inner.gate.weight.T) * (u @ gate.inner.up.weight.T)
    torch.testing.assert_close(gate.score(toy_evidence(h_BTD)), hidden @ gate.out.weight[0] + gate.out.bias)


@pytest.mark.parametrize(("width", "hidden"), [(576, 1536), (128, 384), (64, 192), (4096, 10944)])
def test_swiglu_width(width, hidden):
    assert swiglu_width(width) == hidden


def test_attention_is_softmax_over_the_past():
    attention, x = CausalAttention(8, 2).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    q, k, v = (attention.qkv(x)[..., i * 8 : (i + 1) * 8].unflatten(-1, (2, 4)).transpose(1, 2) for i in range(3))
    scores = rotate(q, 0) @ rotate(k, 0).transpose(-1, -2) / 2
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    wanted = attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(attention(x), wanted)


def test_rotation_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = [(rotate(q, first + 3) * rotate(k, first)).sum() for first in (0, 1, 500)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-11, atol=1e-11)
    assert not torch.isclose(scores[0], (rotate(q, 4) * rotate(k, 0)).sum())


@pytest.mark.parametrize(
    ("gate", "parameters"),
    [
        (LinearGate(SITE), D + 1),
        (MLPGate(SITE, hidden=16), D * 16 + 2 * 16 + 1),
        (FFNGate(SITE, hidden=16), 2 * D * 16 + 16 + 1),
        (
            MambaGate(SITE, width=32, d_state=8, expand=2, d_conv=3, headdim=16),
            D * 32 + 32 * (2 * 64 + 2 * 8 + 4) + 4 * (64 + 2 * 8) + 3 * 4 + 64 + 1,
        ),
        (
            MambaGate(SITE, width=None, d_state=8, headdim=16),
            D * (4 * D + 2 * 8 + 8) + 5 * (2 * D + 2 * 8) + 3 * 8 + 2 * D + 1,
        ),
        (AttentionGate(SITE, width=32), D * 32 + 4 * 32**2 + 3 * 32 * 128 + 32 + 1),
        (AttentionGate(SITE, width=None), 4 * D**2 + 3 * D * 192 + D + 1),
    ],
    ids=["linear", "mlp", "ffn", "mamba", "mamba-full", "attention", "attention-full"],
)
def test_parameters_and_flops_are_as_told(gate, parameters):
    assert sum(parameter.numel() for parameter in gate.parameters()) == parameters
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        gate.score(toy_evidence(states(1, 1, dtype=torch.float32)), Memory())
    assert counter.get_total_flops() + elementwise(gate) == gate.flops()


def elementwise(gate):
    """FLOPs of one position that torch's counter does not see: a Mamba block's taps, and what goes into its state."""
    if not isinstance(gate, MambaGate):
        return 0
    block = gate.block
    return 2 * (block.conv.weight.numel() + block.d_inner * block.d_state)


@pytest.mark.parametrize(
    ("gate_class", "options", "message"),
    [
        (MLPGate, {"hidden": 0}, "hidden was given as 0"),
        (FFNGate, {"hidden": -3}, "hidden was given as -3"),
        (MambaGate, {"d_state": 0}, "d_state was given as 0"),
        (MambaGate, {"d_conv": 0}, "d_conv was given as 0"),
        (MambaGate, {"expand": 0}, "expand was given as 0"),
        (MambaGate, {"width": 0}, "width was given as 0"),
        (MambaGate, {"width": 20, "headdim": 32}, "headdim 32, which does not divide"),
        (AttentionGate, {"heads": 0}, "heads was given as 0"),
        (AttentionGate, {"width": 30, "heads": 4}, "width 30 was given 4 heads"),
        (AttentionGate, {"width": 12, "heads": 4}, "even number"),
    ],
)
def test_options_out_of_range_are_refused(gate_class, options, message):
    with pytest.raises(ValueError, match=message):
        gate_class(SITE, **options)


def test_uncertainty_gate_by_hand():
    gate, h_BTD = UncertaintyGate(SITE).double(), states(2, 3)
    stir(gate)
    evidence = toy_evidence(h_BTD)
    wanted = []
    for p in evidence.logits.softmax(-1).flatten(0, 1):
        first, second = p.sort(descending=True).values[:2]
        q = p**2 / (p**2).sum()
        entropies = [float(-(x * x.log()).sum() / torch.tensor(97.0, dtype=torch.float64).log()) for x in (p, q)]
        four = torch.tensor([first, entropies[0], first - second, entropies[1]], dtype=torch.float64)
        wanted.append(gate.out.weight[0] @ four + gate.out.bias[0])
    torch.testing.assert_close(gate.score(evidence), torch.stack(wanted).view(2, 3))
    assert gate.flops() == 18 * 97 + 12


def test_uncertainty_gate_of_a_certain_lens_is_finite():
    logits_BV = torch.tensor([[0.0] * 96 + [1e4], [0.0] * 97])
    gate = UncertaintyGate(SITE)
    stir(gate)
    score_B = gate.score(Evidence(2, 4, 0, torch.zeros(2, D), logits=lambda: logits_BV))
    one, even = gate.out.weight[0] @ torch.tensor([[1.0, 1 / 97], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(score_B, torch.stack([one, even]) + gate.out.bias)
