"""Products in every format against float64: whole, in part, by rows; what cannot be held is refused with the reason."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from dynamax.errors import UserError
from dynamax.kernels import products
from dynamax.kernels.products import FLOAT16_MAX, BFloat16, Columns, Float16, Int4, Int8, Product, Rows

ERRORS = {Rows: 1e-6, Columns: 1e-6, Float16: 5e-4, BFloat16: 1e-2, Int8: 2e-2, Int4: 0.2}
X86 = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is on x86 alone")
KINDS = [pytest.param(kind, marks=X86) if kind is Float16 else kind for kind in ERRORS]


def layer(*, bias: bool = True, out: int = 48, width: int = 64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias)


def wanted(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(
        x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64), (2, 3, 64), (1, 40, 64)])
@torch.no_grad()
def test_the_product(kind: type[Product], bias: bool, shape: tuple[int, ...]) -> None:
    linear, x = layer(bias=bias), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got, exact = kind(linear.weight, linear.bias)(x), wanted(linear, x)
    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert (got - exact).norm() <= ERRORS[kind] * exact.norm()


@X86
@pytest.mark.parametrize(
    ("threads", "size", "rows", "way"),
    [(1, 9, 9, "alone"), (2, 9, 9, "shared")] + [(2, 0, 4, "shared"), (2, 9, 4, "alone"), (2, 9, 5, "shared")],
)
@torch.no_grad()
def test_few_rows_and_small_matrices_go_to_one_thread(
    monkeypatch: pytest.MonkeyPatch, threads: int, size: int, rows: int, way: str
) -> None:
    """Counted; and the product is the same."""
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr(products, "LARGE", size * 1000)
    calls = []
    for name, what in (("PRODUCT", "alone"), ("SHARED", "shared")):
        function = getattr(products, name)
        monkeypatch.setattr(products, name, partial(lambda f, w, *a: calls.append(w) or f(*a), function, what))
    linear, x = layer(), torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(1))
    product = Float16(linear.weight, linear.bias)
    calls.clear()
    exact = wanted(linear, x)
    assert (product(x) - exact).norm() <= ERRORS[Float16] * exact.norm()
    assert calls == [way]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_that_are_not_contiguous(kind: type[Product]) -> None:
    linear, x = layer(), torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    product = kind(linear.weight, linear.bias)
    torch.testing.assert_close(product(x), product(x.contiguous()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_some_channels_and_some_rows(kind: type[Product]) -> None:
    """The same as those of the whole, in the order that was asked for."""
    linear, x = layer(), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    product = kind(linear.weight, linear.bias)
    whole = product(x)
    for spans in [((16, 32),), ((32, 48), (0, 16))]:
        part = torch.cat([whole[..., slice(*span)] for span in spans], -1)
        torch.testing.assert_close(
            product.part(x, *spans), part, rtol=2e-2, atol=2e-2 if kind in (Int8, Int4) else 1e-5
        )
    rows = product.rows(torch.tensor([5, 0]))
    assert (rows - linear.weight[[5, 0]]).norm() <= ERRORS[kind] * linear.weight[[5, 0]].norm()
    torch.testing.assert_close(product.multiply(x, None) + linear.bias, whole, rtol=0, atol=1e-5)


@X86
def test_float16_holds_what_float16_holds_exactly() -> None:
    """A model that was published in float16 loses nothing."""
    weight_OI = layer(bias=False).weight.detach().half().float()
    assert torch.equal(Float16(weight_OI).dense(), weight_OI)


@X86
@pytest.mark.parametrize("value", [2 * FLOAT16_MAX, torch.inf, torch.nan])
def test_what_float16_has_no_room_for_is_refused(value: float) -> None:
    weight_OI = layer().weight.detach().clone()
    weight_OI[3, 4] = value
    with pytest.raises(UserError, match="float16 ends at 65504"):
        Float16(weight_OI)


@X86
def test_float16_wants_float32() -> None:
    with pytest.raises(UserError, match="the model runs in float64, and float32 is wanted"):
        Float16(layer().weight.double())


def test_int4_wants_groups() -> None:
    with pytest.raises(UserError, match="does not divide into groups of 32"):
        Int4(layer(width=40).weight)


@pytest.mark.parametrize("width", [3, 40])
def test_int8_wants_groups(width: int) -> None:
    """torch's kernel ends the process at others."""
    with pytest.raises(UserError, match="does not divide into groups of 16 input channels"):
        Int8(layer(width=width).weight)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_do_not_move(kind: type[Product]) -> None:
    product = nn.Sequential(kind(layer().weight))
    assert product.to("cpu") is product
    assert product.to(torch.float32) is product
    with pytest.raises(UserError, match="stay where they were made"):
        product.to("meta")
    with pytest.raises(UserError, match="for torch.float32"):
        product.double()
