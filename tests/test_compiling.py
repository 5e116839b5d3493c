"""Compiled steps give what transformers gives, whatever is mixed; what cannot be compiled is said."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dynamax
from dynamax import compiling
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.packed import pack
from dynamax.backbones.precision import COMPILED, compile_steps, set_precision
from dynamax.compiling import Compiler, NotCompilableError, schedule
from dynamax.errors import UserError
from dynamax.kernels import operators
from dynamax.kernels.operators import Float16Operator
from dynamax.kernels.products import Float16, Rows
from dynamax.recording import NotRecordableError, Program, Recorder, as_a_whole
from dynamax.types import Span
from tests.tiny import tiny

LLAMA = Path(__file__).parents[1] / "assets" / "llama"
CHUNKS = [5, 1, 1, 1, 3, 3, 3, 1, 3, 1, 1, 3, 20, 1, 3]
"""Steps and chunks take turns, so that each continues what the other left."""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is on x86 alone"
)


def compiled(name: str) -> tuple[HFBackbone, HFBackbone, Compiler]:
    """A float64 backbone as it was loaded, a packed copy whose steps are compiled, and what compiles them."""
    plain = HFBackbone(tiny(name, dtype=torch.float64))
    backbone, compiler = copy.deepcopy(plain), Compiler()
    pack(backbone, Rows)
    compile_steps(backbone, compiler)
    return plain, backbone, compiler


@torch.no_grad()
def decoded(backbone: HFBackbone, tokens_1T: Tensor) -> Tensor:
    """Logits of a text that is read in chunks."""
    cache, span = backbone.new_cache(), Span(0, backbone.spec.depth)
    chunks = tokens_1T.split(CHUNKS, 1)
    return torch.cat([backbone.unembed(backbone.run(backbone.embed(chunk, cache), span, cache)) for chunk in chunks], 1)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("name", "most"), [("llama", 2), ("gemma2", 2), ("mamba2", 2), ("falcon_h1", 2), ("mixtral", 2), ("nemotron_h", 6)]
)
def test_steps_and_chunks_in_turn(name: str, most: int) -> None:
    """Against transformers' own forward; twice, so that compiled steps meet what compiled chunks left.

    ``most`` are the pieces of a step: two of a block at the most, of each kind of block.
    """
    plain, backbone, compiler = compiled(name)
    tokens_1T = torch.randint(61, (1, sum(CHUNKS)), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = plain.reference(tokens_1T).double()
    for _ in range(2):
        assert torch.allclose(decoded(backbone, tokens_1T), wanted, atol=2e-5)
    assert backbone.recordings is not None
    assert {kind[2] for kind in backbone.recordings.ready} >= set(range(1, COMPILED + 1))
    assert COMPILED <= len(compiler.pieces) <= most * COMPILED, "all blocks of a kind share their pieces"


@pytest.mark.slow
@needs_compiler
def test_what_is_not_compiled_at_first_never_is() -> None:
    """Batches and longer chunks run as they were recorded, and nobody waits for a compiler."""
    _, backbone, compiler = compiled("llama")
    known = len(compiler.pieces)
    with torch.no_grad():
        for rows, length in ((2, 1), (1, COMPILED + 1)):
            cache, span = backbone.new_cache(), Span(0, backbone.spec.depth)
            for _ in range(20):
                backbone.run(backbone.embed(torch.ones(rows, length, dtype=torch.long), cache), span, cache)
    assert backbone.recordings is not None
    assert {kind[1:3] for kind in backbone.recordings.ready} >= {(2, 1), (1, COMPILED + 1)}
    assert len(compiler.pieces) == known


@needs_compiler
def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiling.compiled
    monkeypatch.setattr(compiling, "compiled", lambda f, x: lambda *given: [y * 1.01 for y in made(f, x)(*given)])
    with pytest.raises(UserError, match="a step of 1 positions: compiled, it gives other values"):
        compiled("llama")


@needs_compiler
def test_a_model_that_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise NotCompilableError("no kernel for this")

    monkeypatch.setattr(compiling, "compiled", fails)
    backbone = HFBackbone(tiny("llama", dtype=torch.float32))
    with pytest.raises(UserError, match=r"cannot be compiled.*no kernel for this.*Leave compile out"):
        set_precision(backbone, "float32", compiled=True)


@needs_compiler
def test_a_block_that_cannot_be_recorded_is_refused() -> None:
    class Asks(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if bool(x.sum() > 0) else self.inner(x)

    backbone = HFBackbone(tiny("llama", dtype=torch.float32))
    backbone._blocks[2].mlp = Asks(backbone._blocks[2].mlp)
    with pytest.raises(UserError, match=r"block 2: .*looks at the values"):
        set_precision(backbone, "float32", compiled=True)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"C\+\+ compiler.*apt install g\+\+.*leave compile out"):
        dynamax.load(LLAMA, precision="float32", compile=True, device="cpu")


def test_without_a_precision() -> None:
    with pytest.raises(UserError, match="compile without a precision"):
        dynamax.load(LLAMA, compile=True, device="cpu")


@pytest.mark.slow
@needs_compiler
@needs_fbgemm
def test_exits_and_drafts_over_compiled_steps() -> None:
    """Tokens and depths of an engine without; debts and drafts make chunks of many lengths."""
    tokens = {}
    for compile in (False, True):
        engine = dynamax.load(LLAMA, exits=[3, 5], precision="float16", compile=compile, device="cpu")
        for decoder in (dynamax.EarlyExit, dynamax.SelfSpeculative):
            policy = dynamax.MaxProb(threshold=0.5)
            answer = engine.generate("Once upon a time", policy, decoder=decoder, max_new_tokens=40)
            tokens[compile, decoder] = answer.tokens, answer.depths
    assert tokens[True, dynamax.EarlyExit] == tokens[False, dynamax.EarlyExit]
    assert tokens[True, dynamax.SelfSpeculative] == tokens[False, dynamax.SelfSpeculative]


@pytest.mark.slow
@needs_compiler
@needs_fbgemm
def test_experts_with_float16_weights() -> None:
    """Logits of steps that are recorded, whose experts are multiplied by torch's own function."""
    plain = HFBackbone(tiny("mixtral", dtype=torch.float32))
    tokens_1T, logits = torch.arange(sum(CHUNKS))[None] % 61, []
    for compile in (False, True):
        backbone = copy.deepcopy(plain)
        set_precision(backbone, "float16", compiled=compile)
        logits.append(decoded(backbone, tokens_1T))
    assert torch.allclose(*logits, atol=1e-4)
    assert not torch.allclose(logits[0], decoded(plain, tokens_1T), atol=1e-4), "the weights are float16's"


@needs_compiler
@needs_fbgemm
@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 7, 96), (2, 3, 96), (5, 96)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_operators_multiply_as_torch_does(shape: tuple[int, ...], threads: int) -> None:
    operators.load_operators()
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, 96, generator=generator) for size in (8, 50, 128)]
    x, bias_O = torch.randn(shape, generator=generator), torch.randn(50, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = [Float16Operator(weight_OI) for weight_OI in weights]
        together = torch.ops.dynamax.products(x, [each._packed for each in ours], [8, 50, 128])
        for weight_OI, own, joined in zip(weights, ours, together, strict=True):
            wanted = Float16(weight_OI)(x)
            assert torch.equal(own(x), wanted)
            assert torch.equal(joined, wanted)
        with_bias = Float16Operator(weights[1], bias_O)
        assert torch.equal(with_bias(x), Float16(weights[1], bias_O)(x))
        assert torch.equal(with_bias.part(x, (3, 9)), with_bias(x)[..., 3:9])
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_a_source_that_does_not_compile_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.cpp").write_text("this is no C++")
    monkeypatch.setattr(operators, "SOURCE", tmp_path / "bad.cpp")
    with pytest.raises(UserError, match=r"could not compile bad.cpp"):
        operators.build(tmp_path / "made" / "it.so")
    assert not list((tmp_path / "made").iterdir())


def recorded(function: object, **inputs: Tensor) -> Program:
    """A function of tensors as a program."""
    recorder = Recorder(inputs, [])
    with recorder:
        out = function(*inputs.values())  # pyright: ignore[reportCallIssue]
    return recorder.finish(out)


@as_a_whole
def larger(x: Tensor, y: Tensor) -> Tensor:
    """Looks at values."""
    return x + 0.0 if bool(x.sum() > y.sum()) else y + 0.0


def test_a_function_that_looks_at_values_is_recorded_as_a_whole() -> None:
    """What is repeated looks again; without the mark it is refused."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        return larger(x * 2, y) - 1

    low, high = torch.zeros(2, 3), torch.ones(2, 3)
    program = recorded(function, x=low, y=high)
    (line,) = [line for line in program.lines if line.whole]
    assert not line.state
    repeat = program.function("x, y")
    for x, y in ((low, high), (high, low), (2 * high, high)):
        assert torch.equal(repeat(x, y), function(x, y))
    with pytest.raises(NotRecordableError, match="looks at the values"):
        recorded(lambda x, y: larger.__wrapped__(x * 2, y) - 1, x=low, y=high)


def test_a_whole_call_is_cut_out_and_is_no_state() -> None:
    """No order between it and calls of the state, and what it gives is not taken for keys."""
    x, keys = torch.ones(3, 4), torch.ones(1, 3, 4)
    recorder = Recorder({"x": x}, [])
    with recorder:
        held = recorder.call("view.update", lambda _: keys, x * 2)
        chosen = larger(x * 3, x)
        noted = recorder.call("view.more", lambda _: torch.ones(9, 9), chosen)
        out = (chosen + 1) * 2 + held[0] + noted.sum()
    program = recorder.finish(out)
    first, whole, second = [i for i, line in enumerate(program.lines) if line.state or line.whole]
    needs = compiling.needed(program.lines, program.values)
    assert first not in needs[whole]
    assert {first, whole} <= needs[second], "calls of the state keep their order"
    behind = compiling.as_long_as_keys(program)
    assert set(program.lines[first].makes) <= behind
    assert not set(program.lines[whole].makes) & behind
    steps = schedule(program, behind)
    assert program.lines[whole] in steps, "in no piece"


def test_a_change_in_place_by_a_keyword_or_an_operator_is_noticed() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        F.silu(y, inplace=True)
        z = y > 0.5
        z |= x > 2
        z ^= x > 3
        return y * z

    repeat = recorded(function, x=torch.ones(2, 3)).function("x")
    x = torch.linspace(-4, 4, 6).view(2, 3)
    assert torch.equal(repeat(x), function(x))
    with pytest.raises(NotRecordableError, match="add writes into a tensor that it is given"):
        recorded(lambda x: torch.add(x, 1, out=torch.empty(2, 3)), x=torch.ones(2, 3))


def test_a_change_in_place_keeps_its_order() -> None:
    """A view of a tensor is read before it is changed, and the tensor after that."""

    def function(x: Tensor) -> Tensor:
        a = x * 2
        b = a[0].clone()
        a.mul_(3)
        return a + b

    program = recorded(function, x=torch.ones(2, 3))
    needs = compiling.needed(program.lines, program.values)
    change = next(i for i, line in enumerate(program.lines) if line.changes)
    assert change == 3, "product, row, copy; then the change, and the sum"
    assert needs[3] >= {0, 1, 2}
    assert needs[4] >= {2, 3}


def test_a_piece_may_not_change_what_it_is_given() -> None:
    program = recorded(lambda x: (x * 2 + 1) * x.mul_(3), x=torch.ones(2, 3))
    with pytest.raises(NotCompilableError, match="changes what it is given"):
        schedule(program, set())


@pytest.mark.slow
def test_nothing_is_warned_about_while_compiling_well() -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_precision(HFBackbone(tiny("llama", dtype=torch.float32)), "float32", compiled=True)
