"""The kernels of mamba_ssm and causal_conv1d against plain PyTorch in float64, on a GPU."""

from importlib.util import find_spec

import pytest
import torch

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.precision import set_precision
from dynamax.heads import MambaGate
from dynamax.kernels import backend, selective, ssd
from dynamax.kernels.convolution import convolve
from dynamax.testing import stir, toy_evidence, toy_site
from dynamax.types import Memory, Span
from tests.devices import DEVICE, missing
from tests.tiny import tiny

pytestmark = [pytest.mark.gpu, missing]
kernel = pytest.mark.skipif(backend("mamba_ssm", DEVICE) == "torch", reason="mamba_ssm is not installed")
conv_kernel = pytest.mark.skipif(backend("causal_conv1d", DEVICE) == "torch", reason="causal_conv1d is not installed")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
BOUNDS = {torch.float32: 5e-3, torch.bfloat16: 3e-2}  # Mamba-2's kernel multiplies float32 in TF32


def drawing():
    g = torch.Generator("cuda").manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=g, device="cuda")


def close(given, exact, dtype):
    assert (given.double() - exact).norm() / exact.norm() < BOUNDS[dtype]


def ssd_inputs(length, dtype, groups=2):
    draw = drawing()
    x, dt = draw(2, length, 8, 32), draw(2, length, 8).sigmoid() / 10
    b, c = draw(2, length, groups, 32), draw(2, length, groups, 32)
    return x.to(dtype), dt, -draw(8).exp(), b.to(dtype), c.to(dtype), draw(2, 8, 32, 32).to(dtype)


@kernel
@dtypes
@pytest.mark.parametrize("length", [2, 64, 200])
def test_mamba_2s_kernel_is_the_plain_scan(length, dtype):
    arguments = ssd_inputs(length, dtype)
    for given, exact in zip(ssd.by_kernel(*arguments), ssd.chunked(*(z.double() for z in arguments)), strict=True):
        close(given, exact, dtype)


@kernel
def test_mamba_2s_kernel_has_the_gradients_of_the_plain_scan():
    plain = [z.double().requires_grad_() for z in ssd_inputs(100, torch.float32)]
    fast = [z.float().detach().requires_grad_() for z in plain]
    for arguments, function in ((plain, ssd.chunked), (fast, ssd.by_kernel)):
        y, state = function(*arguments)
        (y.square().sum() + state.square().sum()).backward()
    for given, exact in zip(fast, plain, strict=True):
        assert (given.grad.double() - exact.grad).norm() / exact.grad.norm() < 1e-2


@kernel
@dtypes
@pytest.mark.parametrize("length", [2, 64, 200])
def test_mamba_1s_kernel_continues_a_live_state(length, dtype):
    draw = drawing()
    x, dt = draw(2, length, 64).to(dtype), draw(2, length, 64).sigmoid() / 10
    b, c = draw(2, length, 16).to(dtype), draw(2, length, 16).to(dtype)
    arguments = x, dt, -draw(64, 16).exp(), b, c, draw(2, 64, 16)
    exact = selective.chunked(*(z.double() for z in arguments))
    for given, wanted in zip(selective.by_kernel(*arguments), exact, strict=True):
        close(given, wanted, dtype)


@conv_kernel
@dtypes
def test_the_convolution_kernel_continues_its_window(dtype):
    draw = drawing()
    arguments = [draw(2, 70, 64), draw(2, 3, 64), draw(64, 4), draw(64)]
    exact = convolve(*(z.double() for z in arguments))
    for given, wanted in zip(convolve(*(z.to(dtype) for z in arguments)), exact, strict=True):
        close(given, wanted, dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gate_on_the_gpu_is_the_gate_on_the_cpu(dtype):
    gate = MambaGate(toy_site())
    stir(gate)
    gate, h_BTD = gate.to(dtype), torch.randn(2, 90, 64, dtype=dtype)
    wanted = gate.score(toy_evidence(h_BTD, recurrent=True)).sigmoid()
    gate.to(DEVICE)
    memory, parts = Memory(pad_B=torch.zeros(2, dtype=torch.long, device=DEVICE)), []
    for chunk_BTD in h_BTD.to(DEVICE).split([40, 1, 49], 1):
        parts.append(gate.score(toy_evidence(chunk_BTD, recurrent=True), memory).sigmoid())
        memory.read += chunk_BTD.shape[1]
    bound = 1e-9 if dtype == torch.float64 else BOUNDS[dtype]
    torch.testing.assert_close(torch.cat(parts, 1).cpu(), wanted, rtol=bound, atol=bound)


@pytest.mark.skipif(find_spec("torchao") is None or DEVICE == "cpu", reason="needs torchao and a CUDA device")
def test_int8_weights_of_a_model():
    """Logits near those of the model in bfloat16; a byte a weight is counted."""
    plain = HFBackbone(tiny("llama", dtype=torch.bfloat16)).to(DEVICE)
    model = HFBackbone(tiny("llama", dtype=torch.bfloat16)).to(DEVICE)
    choice = set_precision(model, "int8")
    assert choice is not None
    assert choice.format == "Int8Torchao"
    assert model.weight_bytes == 1
    tokens = torch.arange(12, device=DEVICE)[None]
    with torch.no_grad():
        given, wanted = (m.unembed(m.run(m.embed(tokens), Span(0, 6))) for m in (model, plain))
    assert 0 < (given - wanted).norm() < 0.05 * wanted.norm()
