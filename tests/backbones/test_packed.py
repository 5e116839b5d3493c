"""Packed execution gives what transformers gives, for every family, recorded steps included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.packed import RMSNorm, norm_of, pack
from dynamax.backbones.recorded import BEFORE_RECORDING
from dynamax.kernels.products import Columns, Float16, Product, Rows
from dynamax.recording import MOST_POSITIONS
from dynamax.testing import check_backbone
from dynamax.types import Span
from tests.float64 import upcast64
from tests.tiny import DISTINCT, tiny

X86 = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is on x86 alone")


def packed(name: str, kind: type[Product], dtype: torch.dtype = torch.float64) -> tuple[HFBackbone, HFBackbone]:
    """A backbone as it was loaded, and a packed copy."""
    plain = HFBackbone(tiny(name, dtype=dtype))
    backbone = copy.deepcopy(plain)
    pack(backbone, kind)
    return plain, backbone


def steps(backbone: HFBackbone, count: int, *, rows: int = 1, prompt: int = 5, length: int = 1) -> list[Tensor]:
    """Logits of a prompt and of chunks after it."""
    cache, span = backbone.new_cache(), Span(0, backbone.spec.depth)
    tokens_BT = torch.randint(61, (rows, prompt + count * length), generator=torch.Generator().manual_seed(3))
    chunks = tokens_BT.split([prompt, *[length] * count], 1)
    with torch.no_grad():
        return [backbone.unembed(backbone.run(backbone.embed(chunk, cache), span, cache)) for chunk in chunks]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, Rows) for name in DISTINCT if "-" not in name),
        *((name, Columns) for name in ("llama", "gpt2", "gemma2", "mixtral", "mamba2")),
    ],
)
def test_contract(name: str, kind: type[Product]) -> None:
    """In float64, against an unpacked copy run by transformers' own forward.

    Every block is recorded; but not those that make keys of latents again, since that grows with the text.
    """
    with upcast64():
        plain, backbone = packed(name, kind)
        check_backbone(backbone, plain.reference, tolerance=1e-12)
    assert backbone.recordings is not None
    if backbone.row.turned == "values":
        assert set(backbone.recordings.given_up) == set(range(6))
        return
    assert not backbone.recordings.given_up
    assert {index for index, *_ in backbone.recordings.ready} == set(range(6))


@X86
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "phi3", "gemma3_text", "mamba", "mamba2", "falcon_h1", "lfm2"]
)
def test_float16_weights(name: str) -> None:
    plain, backbone = packed(name, Float16, torch.float32)
    check_backbone(backbone, plain.reference, tolerance=5e-3)


@pytest.mark.parametrize("name", ["llama", "mamba2", "gemma2", "mixtral", "nemotron_h"])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 3), (2, 1)])
def test_a_recorded_step_is_bit_for_bit_the_step_it_repeats(name: str, rows: int, length: int) -> None:
    _, backbone = packed(name, Rows, torch.float32)
    recordings, backbone.recordings = backbone.recordings, None
    count = 6 if rows == 1 else BEFORE_RECORDING + 6
    unrecorded = steps(backbone, count, rows=rows, length=length)
    backbone.recordings = recordings
    for recorded, other in zip(steps(backbone, count, rows=rows, length=length), unrecorded, strict=True):
        assert torch.equal(recorded, other)
    assert recordings is not None
    assert len(recordings.ready) >= 6


def test_modules_are_not_called_once_recorded() -> None:
    """Counted: after the second step of a kind no module of a block runs."""
    _, backbone = packed("llama", Rows)
    calls = []
    backbone._blocks[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    steps(backbone, 7)
    assert len(calls) == 1 + 2


def test_batches_are_recorded_once_their_size_has_come_often() -> None:
    _, backbone = packed("llama", Rows)
    assert backbone.recordings is not None
    steps(backbone, BEFORE_RECORDING, rows=3)
    assert not backbone.recordings.ready
    steps(backbone, BEFORE_RECORDING, rows=3)
    assert backbone.recordings.ready


def test_long_chunks_run_as_they_are() -> None:
    _, backbone = packed("llama", Rows)
    steps(backbone, 3, length=MOST_POSITIONS + 1)
    assert backbone.recordings is not None
    assert not backbone.recordings.ready


def test_gradients_are_not_recorded() -> None:
    _, backbone = packed("llama", Rows)
    h_BTD = torch.randn(1, 1, 32, dtype=torch.float64, requires_grad=True)
    for _ in range(4):
        backbone.run(h_BTD, Span(0, 6), backbone.new_cache()).sum().backward()
    assert h_BTD.grad is not None
    assert backbone.recordings is not None
    assert not backbone.recordings.ready


class Odd(nn.Module):
    """Wraps a part of a block and does something a recording cannot hold."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how, self.count = inner, how, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.how == "asks a value":
            return y * (2.0 if y.sum() > 0 else 3.0)
        if self.how == "makes a number of a value":
            return y * float(y.mean())
        if self.how == "counts":
            self.count += 1
            return y * self.count
        if self.how == "holds what it made":
            self.made = getattr(self, "made", y * 0 + 2)
            return y * self.made
        return y[:, torch.nonzero(y[0].sum(-1).abs() >= 0)[:, 0]]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("asks a value", "__bool__ looks at the values"),
        ("makes a number of a value", "__float__ looks at the values"),
        ("counts", "differs from step to step"),
        ("holds what it made", "neither an input nor a weight"),
    ],
)
def test_what_cannot_be_repeated_is_not(how: str, reason: str) -> None:
    """The block runs as it is, and the others are recorded; the answers are those without recordings."""
    plain, backbone = packed("llama", Rows)
    for model in (plain, backbone):
        model._blocks[2].mlp = Odd(model._blocks[2].mlp, how)
    with upcast64():
        for got, wanted in zip(steps(backbone, 8), steps(plain, 8), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert backbone.recordings is not None
    assert list(backbone.recordings.given_up) == [2]
    assert reason in backbone.recordings.given_up[2]
    assert {index for index, *_ in backbone.recordings.ready} == {0, 1, 3, 4, 5}


class Half(nn.Module):
    """Half a gain, and something that has a weight and no such norm."""

    def __init__(self, *, mean: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.mean = nn.Parameter(torch.ones(8)), 1e-5, mean

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.mean else x * 0.5
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize("module", [Half(mean=True), Half(mean=False), nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU()])
def test_other_norms_are_left_alone(module: nn.Module) -> None:
    assert norm_of(module) is None


def test_a_norm_that_holds_its_gain_less_one() -> None:
    backbone = HFBackbone(tiny("gemma2", dtype=torch.float32))
    norm = backbone._blocks[0].input_layernorm
    found, x = norm_of(norm), torch.randn(2, 3, 32)
    assert isinstance(found, RMSNorm)
    torch.testing.assert_close(found(x), norm(x))


def test_costs_are_those_of_the_model_and_its_format() -> None:
    plain, backbone = packed("llama", Rows, torch.float32)
    assert [backbone.block_cost(i) for i in range(6)] == [plain.block_cost(i) for i in range(6)]
    assert backbone.weight_bytes == 4.0
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert packed("llama", Float16, torch.float32)[1].weight_bytes == 2.0


def test_a_step_that_comes_back_to_its_place_is_not_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a rollback. It is recorded once there, and in use after another place."""
    _, backbone = packed("llama", Rows)
    assert backbone.recordings is not None
    notes = []
    note = backbone.recordings.note
    monkeypatch.setattr(backbone.recordings, "note", lambda *given: notes.append(given[:2]) or note(*given))
    cache, span, token_11 = backbone.new_cache(), Span(0, 6), torch.tensor([[7]])
    with torch.no_grad():
        for _ in range(4):
            before = cache.snapshot()
            backbone.run(backbone.embed(token_11, cache), span, cache)
            cache.rollback(before)
        assert len(notes) == 6
        for _ in range(3):
            backbone.run(backbone.embed(token_11, cache), span, cache)
    assert len(notes) == 12
    assert len(backbone.recordings.ready) == 6
