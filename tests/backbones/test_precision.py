"""Which format is taken, how that is measured and kept, and what cannot be had."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import dynamax
from dynamax import UserError
from dynamax.backbones import precision as precisions
from dynamax.backbones.base import Backbone
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.packed import pack
from dynamax.backbones.precision import PRECISIONS, set_precision
from dynamax.kernels.products import BFloat16, Columns, Float16, Int4, Int8, Product, Rows
from dynamax.kernels.torchao import Int8Torchao
from dynamax.types import Span
from tests.folders import model_folder
from tests.tiny import tiny

X86 = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is on x86 alone")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def backbone(dtype: torch.dtype = torch.float32) -> HFBackbone:
    return HFBackbone(tiny("llama", dtype=dtype))


def kinds_in(model: HFBackbone) -> set[type[Product]]:
    return {type(module) for module in model.modules() if isinstance(module, Product)}


@pytest.mark.parametrize("fastest", ["Rows", "Columns", "Float16"])
@X86
def test_auto_takes_the_fastest_of_the_faithful(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Rows", "Columns", "Float16"]
    monkeypatch.setattr(
        precisions, "timed", lambda products: ({name: 1.0 + (name != fastest) for name in products}, True)
    )
    model = backbone()
    choice = set_precision(model, "auto")
    assert choice is not None
    assert (choice.precision, choice.format) == ("float16" if fastest == "Float16" else "float32", fastest)
    assert sorted(choice.milliseconds) == sorted(names)
    assert {kind.__name__ for kind in kinds_in(model)} == {fastest}


def test_a_measurement_is_made_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept for the machine, its threads and the shapes; a damaged file is measured anew."""
    runs = []
    times = precisions.timed
    monkeypatch.setattr(precisions, "timed", lambda products: runs.append(1) or (times(products)[0], True))
    first, second = set_precision(backbone(), "float32"), set_precision(backbone(), "float32")
    assert first == second
    assert len(runs) == 1
    (file,) = (cache / "precision").iterdir()
    assert first is not None
    assert json.loads(file.read_text()) == first.milliseconds
    assert all(value > 0 for value in first.milliseconds.values())
    file.write_text("{")
    assert set_precision(backbone(), "float32") is not None
    assert len(runs) == 2


class Stalls(Product):
    """Takes 5 milliseconds at the rounds that are named, as a thread that waits for its turn, and else half of one."""

    rounds: ClassVar[set[int]] = set()

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O)
        self.calls = 0

    @classmethod
    def refusal(cls, weight_OI: torch.Tensor) -> str | None:
        return None

    def multiply(self, x: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        end = time.perf_counter() + (0.005 if self.calls in self.rounds else 0.0005)
        while time.perf_counter() < end:
            pass
        return x


@pytest.mark.parametrize(("stalled", "kept"), [(set(), True), ({3, 4}, True), (set(range(3, 14)), False)])
def test_a_busy_machine_is_noticed(stalled: set[int], kept: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most rounds stall: the time told is that of the others, and nothing is kept."""
    monkeypatch.setattr(Stalls, "rounds", stalled)
    times = precisions.measured([Stalls], [torch.ones(32, 64)])
    assert 0.5 <= times["Stalls"] < 5
    assert (cache / "precision").is_dir() == kept


@pytest.mark.parametrize("name", [*PRECISIONS, "auto"])
def test_every_precision_runs(name: str) -> None:
    """tiny models do not divide into int4's groups: the output matrix has 61 rows."""
    model = backbone()
    if name == "int4":
        with pytest.raises(UserError, match="The precision int4 cannot be had here: .*does not divide into groups"):
            set_precision(model, name)
        assert not kinds_in(model)
        return
    assert set_precision(model, name) is not None
    assert len(kinds_in(model)) == 1


def test_what_is_no_precision_is_refused() -> None:
    with pytest.raises(UserError, match="'fp16' was given; one of auto, float32, float16, bfloat16, int8, int4"):
        set_precision(backbone(), "fp16")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_dtype(dtype: torch.dtype) -> None:
    """It is refused a precision by name; ``auto`` keeps its weights as they are."""
    with pytest.raises(UserError, match="computes in .*Load it in float32"):
        set_precision(backbone(dtype), "float16")
    model = backbone(dtype)
    choice = set_precision(model, "auto")
    assert choice is not None
    assert choice.precision == str(dtype).removeprefix("torch.")
    assert kinds_in(model) <= {Rows, Columns}


class Own(Backbone):
    """Somebody's own backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    embed = block = normalize = project = block_cost = lambda self, *_: None  # type: ignore[assignment]


def test_a_backbone_of_ones_own() -> None:
    assert set_precision(Own(), "auto") is None
    with pytest.raises(UserError, match="of the class Own; wanted: a model of transformers on a CPU"):
        set_precision(Own(), "float16")


def test_int8_on_a_gpu_is_torchaos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplied on a CPU here, against float64; a GPU's own tests are in tests/gpu."""
    pytest.importorskip("torchao", reason="the extra quant is not installed")  # transformers would import it too
    monkeypatch.setattr(Int8Torchao, "refusal", classmethod(lambda *_: None))
    generator = torch.Generator().manual_seed(0)
    weight_OI, x = torch.randn(48, 64, generator=generator), torch.randn(1, 3, 64, generator=generator)
    product, exact = Int8Torchao(weight_OI, torch.ones(48)), x.double() @ weight_OI.double().t() + 1
    assert 1e-4 < (product(x) - exact).norm() / exact.norm() < 1e-2
    assert (product.part(x, (3, 9)) - exact[..., 3:9]).norm() / exact[..., 3:9].norm() < 2e-2
    model = HFBackbone(tiny("llama", dtype=torch.float32))
    pack(model, Int8Torchao)
    plain, tokens_1T = HFBackbone(tiny("llama", dtype=torch.float32)), torch.arange(12)[None]
    with torch.no_grad():
        logits, wanted = (m.unembed(m.run(m.embed(tokens_1T), Span(0, 6))) for m in (model, plain))
    assert 0 < (logits - wanted).norm() < 0.05 * wanted.norm()


def test_int8_on_a_gpu_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamax.kernels.torchao.find_spec", lambda _: None)
    weight_OI = SimpleNamespace(device=torch.device("cuda"))
    assert "pip install" in str(Int8Torchao.refusal(weight_OI))  # type: ignore[arg-type]
    assert "is for a GPU" in str(Int8Torchao.refusal(torch.ones(2, 2)))


@X86
def test_an_engine_in_a_precision(tmp_path: Path) -> None:
    """Its tokens are those of the model as it was loaded; its cost counts two bytes a weight."""
    folder = model_folder(tmp_path / "tiny")
    plain = dynamax.load(folder, exits=[2, 4], device="cpu")
    packed = dynamax.load(folder, exits=[2, 4], precision="float16", device="cpu")
    assert plain.precision is None
    assert packed.precision is not None
    assert packed.precision.format == "Float16"
    answers = [engine.generate("Hi", dynamax.MaxProb(0.05), max_new_tokens=8) for engine in (plain, packed)]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].cost.full.flops == answers[1].cost.full.flops
    assert answers[1].cost.full.bytes < 0.7 * answers[0].cost.full.bytes


@X86
def test_candidates_are_the_logits_of_the_whole_matrix() -> None:
    model, tokens_C = backbone(), torch.tensor([7, 0, 60])
    set_precision(model, "float16")
    u_BTD = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0))
    for some in (tokens_C, slice(9), slice(3, None)):
        torch.testing.assert_close(model.project(u_BTD, some), model.project(u_BTD)[..., some], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [Rows, Columns, Float16, BFloat16, Int8, Int4])
def test_frequent_candidates_and_others_come_from_the_same_weights(kind: type[Product]) -> None:
    """Weights of a few bits are not packed a second time, and any number of rows will do."""
    model, tokens_C = backbone(), torch.arange(64)
    weight_VD = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    if (reason := kind.refusal(weight_VD)) is not None:
        pytest.skip(reason)
    output = kind(weight_VD)
    model.model.set_output_embeddings(output)
    u_BTD = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0))
    gathered_BTV = model.project(u_BTD, tokens_C)
    for some in (slice(9), slice(0, 61), slice(3, 40)):
        torch.testing.assert_close(model.project(u_BTD, some), gathered_BTV[..., some], rtol=0, atol=0.05)
    if not kind.repacks:
        torch.testing.assert_close(model.project(u_BTD, slice(9)), gathered_BTV[..., :9], rtol=1e-6, atol=1e-5)


def test_half_packed_is_never_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that does not fit is found before anything is replaced."""
    model = backbone()
    with torch.no_grad():
        model._blocks[5].mlp.down_proj.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="the largest weight is 1e"):
        set_precision(model, "float16")
    assert not kinds_in(model)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux, which lists mapped files")
def test_a_packed_model_keeps_no_file_in_memory(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    plain = dynamax.load(folder, device="cpu")
    assert str(folder) in Path("/proc/self/maps").read_text(), "weights are views into the file"
    wanted = plain.generate("Hi", max_new_tokens=4).text
    del plain
    gc.collect()
    packed = dynamax.load(folder, precision="float16", device="cpu")
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert packed.generate("Hi", max_new_tokens=4).text == wanted
