"""Packed experts give what transformers' own code for experts gives, in every layout that its interface knows."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

from dynamax import UserError
from dynamax.backbones.experts import matrices_of, multiply_routed, pack_experts, unknown_experts
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.packed import pack
from dynamax.backbones.precision import linear_weights, set_precision
from dynamax.kernels.products import Columns, Float16, Product, Rows
from dynamax.testing import check_backbone
from tests.tiny import tiny

MIXTURES = ["mixtral", "jamba", "granitemoehybrid", "nemotron_h"]
ROUNDED = {"float32": 0.0, "float16": 5e-4, "bfloat16": 4e-3, "int8": 1e-2}
"""How far a matrix may be from its own, as a share of its norm."""

EXPERTS, WIDTH, INNER = 5, 8, 12

X86 = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is on x86 alone")


class Wrapper(nn.Module):
    """What ``pack_experts`` needs of a model."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def set_experts_implementation(self, name: str) -> None:
        self.experts.config._experts_implementation = name


def layout(*, transposed: bool, bias: bool, gate: bool, interleaved: bool, norm: bool) -> nn.Module:
    """Random experts in float64, in one of the layouts of the interface."""

    class Layout(nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)

            def drawn(*shape: int) -> nn.Parameter:
                return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64), requires_grad=False)

            self.num_experts, self.act_fn, self.post_expert_norm = EXPERTS, nn.SiLU(), nn.LayerNorm(WIDTH).double()
            shapes = {"gate_up_proj" if gate else "up_proj": ((1 + gate) * INNER, WIDTH), "down_proj": (WIDTH, INNER)}
            for name, (rows, columns) in shapes.items():
                setattr(self, name, drawn(EXPERTS, *((columns, rows) if transposed else (rows, columns))))
                if bias:
                    setattr(self, f"{name}_bias", drawn(EXPERTS, rows))

        if interleaved:

            def _apply_gate(self, gate_up: Tensor) -> Tensor:
                return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2].clamp(max=1.0)

        def forward(self, *_: Tensor) -> Tensor:
            raise AssertionError("its own loop over experts is not called")

    decorated = use_experts_implementation(
        Layout,
        is_concatenated=not interleaved,
        is_transposed=transposed,
        has_bias=bias,
        has_gate=gate,
        has_post_expert_norm=norm,
    )
    return decorated(SimpleNamespace(_experts_implementation="eager"))


def routing(positions: int, taken: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and different experts for each position with their factors."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(positions, WIDTH, generator=generator, dtype=torch.float64)
    scores = torch.rand(positions, EXPERTS, generator=generator, dtype=torch.float64)
    factors, index = scores.topk(taken, -1)
    return hidden, index, factors


@pytest.mark.parametrize("kind", [Rows, Columns])
@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("gate", "interleaved", "norm"), [(True, False, False), (True, True, False), (False, False, True)]
)
def test_every_layout(
    transposed: bool, bias: bool, gate: bool, interleaved: bool, norm: bool, positions: int, kind: type[Product]
) -> None:
    """Against transformers' ``batched_mm`` over the tensors of all experts."""
    experts = layout(transposed=transposed, bias=bias, gate=gate, interleaved=interleaved, norm=norm)
    given = routing(positions)
    wanted = batched_mm_experts_forward(experts, *given)
    pack_experts(Wrapper(experts), kind)  # type: ignore[arg-type]
    torch.testing.assert_close(experts(*given), wanted, rtol=0, atol=1e-12)
    assert sum(isinstance(module, kind) for module in experts.modules()) == 2 * EXPERTS
    own = set(dict(experts.named_parameters(recurse=False)))
    assert own == set(), "matrices and biases are the products'"
    assert not matrices_of(experts), "what is packed is not packed again"


def test_factors_in_another_dtype() -> None:
    """Nemotron-H's router answers in float32, whatever the model computes in."""
    experts = layout(transposed=False, bias=False, gate=True, interleaved=False, norm=False)
    hidden, index, factors = routing(3)
    wanted = batched_mm_experts_forward(experts, hidden, index, factors.float())
    pack_experts(Wrapper(experts), Rows)  # type: ignore[arg-type]
    found = experts(hidden, index, factors.float())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [[[3, 1]], [[3, 1], [1, 3], [3, 0]], [[4, 2]] * 4])
def test_only_experts_that_are_taken_are_multiplied(rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, with the rows of all positions that take it."""
    experts = layout(transposed=False, bias=False, gate=True, interleaved=False, norm=False)
    pack_experts(Wrapper(experts), Rows)  # type: ignore[arg-type]
    calls: list[tuple[Product, int]] = []
    multiply = Rows.multiply
    monkeypatch.setattr(Rows, "multiply", lambda self, x, b: calls.append((self, len(x))) or multiply(self, x, b))
    index = torch.tensor(rows)
    multiply_routed(experts, torch.ones(len(rows), WIDTH, dtype=torch.float64), index, torch.ones(index.shape))
    flat = index.flatten().tolist()
    wanted = {
        (id(products[expert]), flat.count(expert))
        for products in (experts.gate_up_proj, experts.down_proj)
        for expert in set(flat)
    }
    assert len(calls) == len(wanted)
    assert {(id(product), count) for product, count in calls} == wanted


@X86
@pytest.mark.parametrize("name", MIXTURES)
def test_nothing_of_the_tensor_of_all_experts_is_left(name: str) -> None:
    """Its memory is free: no view and no other holder keeps it."""
    backbone = HFBackbone(tiny(name, dtype=torch.float32))
    tensors = [weight for module in backbone.modules() for weight in matrices_of(module).values()]
    held = [StorageWeakRef(weight.untyped_storage()) for weight in tensors]
    del tensors
    assert held
    assert not any(each.expired() for each in held)
    set_precision(backbone, "float16")
    assert all(each.expired() for each in held)
    assert all(weight.ndim < 3 or "conv" in path for path, weight in backbone.named_parameters())


@pytest.mark.parametrize("name", MIXTURES)
def test_costs_are_those_of_the_experts_that_are_taken(name: str) -> None:
    """Counted on the unpacked tensors; a format's bytes hold for experts too."""
    plain = HFBackbone(tiny(name, dtype=torch.float32))
    packed = {kind: copy.deepcopy(plain) for kind in (Rows, Float16) if kind.refusal(torch.ones(2, 2)) is None}
    config, mixtures = plain.model.config, 0
    for kind, backbone in packed.items():
        pack(backbone, kind)
        assert backbone.weight_bytes == (kind.bytes or 4.0)
        for index in range(6):
            cost = backbone.block_cost(index)
            assert cost == plain.block_cost(index)
            held = [p for path, p in plain._blocks[index].named_parameters() if p.ndim == 3 and "conv" not in path]
            idle = sum(p.numel() * (1 - config.num_experts_per_tok / len(p)) for p in held)
            assert cost.weights - cost.active == idle
            mixtures += bool(held)
    assert mixtures


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    "precision", ["float32", pytest.param("float16", marks=X86), "bfloat16", pytest.param("int8", marks=X86)]
)
def test_every_precision(name: str, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """Every matrix of every expert is held in the format, as exactly as that allows."""
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path))
    wide = {"mamba_dt_rank": 16} if name == "jamba" else {}  # 3 is too few for int8
    plain = HFBackbone(tiny(name, dtype=torch.float32, **wide))
    backbone = copy.deepcopy(plain)
    choice = set_precision(backbone, precision)
    assert choice is not None
    assert choice.precision == precision
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    held = [product for each in lists for product in each if isinstance(product, Product)]
    exact = [weight_OI for m in plain.modules() for weight_EOI in matrices_of(m).values() for weight_OI in weight_EOI]
    assert exact
    for product, weight_OI in zip(held, exact, strict=True):
        assert type(product).__name__ == choice.format
        assert (product.dense() - weight_OI).norm() <= ROUNDED[precision] * weight_OI.norm()


@pytest.mark.slow
@X86
@pytest.mark.parametrize("name", MIXTURES)
def test_float16_weights(name: str) -> None:
    """Against transformers' own forward with the same weights rounded, so that nothing but sums may differ."""
    plain = HFBackbone(tiny(name, dtype=torch.float32))
    backbone = copy.deepcopy(plain)
    set_precision(backbone, "float16")
    with torch.no_grad():
        for weight in linear_weights(plain.model):
            weight.copy_(weight.half().float())
    check_backbone(backbone, plain.reference, tolerance=1e-4)
    assert backbone.recordings is not None
    assert not backbone.recordings.given_up


@X86
def test_auto_may_take_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamax.backbones import precision as precisions

    times = {"Rows": 2.0, "Columns": 2.0, "Float16": 1.0}
    monkeypatch.setattr(precisions, "measured", lambda kinds, weights: {k.__name__: times[k.__name__] for k in kinds})
    choice = set_precision(HFBackbone(tiny("mixtral", dtype=torch.float32)), "auto")
    assert choice is not None
    assert (choice.precision, choice.format) == ("float16", "Float16")


@X86
def test_a_matrix_of_an_expert_that_does_not_fit_is_named() -> None:
    backbone = HFBackbone(tiny("mixtral", dtype=torch.float32))
    with torch.no_grad():
        backbone._blocks[5].mlp.experts.down_proj[3, 0, 0] = 1e6
    with pytest.raises(UserError, match="the largest weight is 1e"):
        set_precision(backbone, "float16")
    assert not any(isinstance(module, Product) for module in backbone.modules())


class Strange(nn.Module):
    """Holds the matrices of two experts as no interface says."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.w1 = inner, nn.Parameter(torch.zeros(2, 8, 8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_experts_that_are_held_otherwise_are_refused_by_name() -> None:
    """Their bytes would be counted wrongly; float32 and ``auto`` leave them as they are."""
    for precision in ("bfloat16", "float32", "auto"):
        backbone = HFBackbone(tiny("llama", dtype=torch.float32))
        backbone._blocks[2].mlp = Strange(backbone._blocks[2].mlp)
        if precision == "bfloat16":
            with pytest.raises(UserError, match=r"model.layers.2.mlp.w1 of Strange would stay as it is.*interface"):
                set_precision(backbone, precision)
            assert not any(isinstance(module, Product) for module in backbone.modules())
            continue
        choice = set_precision(backbone, precision)
        assert choice is not None
        assert choice.precision == "float32"
        assert backbone.weight_bytes == 4.0
        assert backbone._blocks[2].mlp.w1.shape == (2, 8, 8)


def test_experts_that_several_machines_share_are_refused_by_name() -> None:
    """transformers marks slots of other machines' experts by a number beyond the last."""
    backbone = HFBackbone(tiny("mixtral", dtype=torch.float32))
    assert unknown_experts(backbone.model) is None
    backbone._blocks[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(UserError, match=r"layers.0.mlp.experts.gate_up_proj of MixtralExperts .* on one machine"):
        set_precision(backbone, "bfloat16")


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_h1", "lfm2"])
def test_taps_of_a_convolution_are_no_experts(name: str) -> None:
    assert unknown_experts(tiny(name)) is None
    assert set_precision(HFBackbone(tiny(name, dtype=torch.float32)), "bfloat16") is not None
