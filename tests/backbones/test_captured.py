"""Steps that replay captured spans, in float64: what decoders say, and the state they leave, are those without.

On a CPU ``Operators`` stands for CUDA graphs: it repeats operations on the tensors that they had when they were
captured, so whatever is replaced or decided by Python in a span goes wrong as it would in a graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dynamax
from benchmarks.gpu_graphs import Operators
from dynamax.backbones import graphs
from dynamax.backbones.base import Backbone
from dynamax.backbones.captured import CapturedSpans
from dynamax.backbones.graphs import NotCapturableError, Watch
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.packed import pack
from dynamax.backbones.precision import Choice, capture_steps
from dynamax.backbones.skipped_state import Propagate, Skip
from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.errors import UserError
from dynamax.heads.bank import ExitBank
from dynamax.kernels.products import Rows
from dynamax.metrics.environment import environment
from dynamax.types import Span, Step
from tests.float64 import upcast64
from tests.laws.house import DEPTH, Dice, Listener, exits, padded, prompt
from tests.laws.house import fresh_pair as pair
from tests.states import same, state
from tests.tiny import DISTINCT, EXPERTS, tiny

DEPTHS = (2, 3, 5)
LIMIT = 10
CLOSE = {"rtol": 0, "atol": 1e-9}
Make = Callable[[HFBackbone], Decoder]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with upcast64():
        yield


def capture(backbone: Backbone, **options: int) -> CapturedSpans:
    """Spans of a backbone that are captured as they come."""
    lengths = range(1, 5)
    backbone.captured = CapturedSpans(backbone, DEPTHS, Operators(), lengths=lengths, **options)
    return backbone.captured


def bank(backbone: HFBackbone, depths: Sequence[int] = DEPTHS) -> ExitBank:
    """Exits with the same weights at every call."""
    torch.manual_seed(0)
    return exits(backbone, depths)


def decoded(decoder: Decoder, start_BT: Tensor, limit: int = LIMIT, pad_B: Tensor | None = None) -> list[Step]:
    return list(decoder.decode(start_BT, max_new_tokens=limit, pad_B=pad_B))


def same_steps(got: list[Step], wanted: list[Step]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.token_B.equal(theirs.token_B)
        assert mine.depth_B.equal(theirs.depth_B)
        assert mine.work == theirs.work
        torch.testing.assert_close(mine.logits_BV, theirs.logits_BV, **CLOSE)


def blocks_called(steps: list[Step]) -> int:
    return sum(sum(step.work.calls) for step in steps if not step.prefill)


def blocks_replayed(captured: CapturedSpans) -> int:
    return sum(count * (stop - start) for (start, stop, _), count in captured.replays.items())


MAKES: dict[str, Make] = {
    "Full": Full,
    "EarlyExit": lambda backbone: EarlyExit(backbone, bank(backbone), Dice(0.5)),
    "Propagate": lambda backbone: EarlyExit(backbone, bank(backbone), Listener(), skipped_state=Propagate()),
    "SelfSpeculative": lambda backbone: SelfSpeculative(backbone, bank(backbone), Dice(0.8), draft_limit=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in DISTINCT if family not in EXPERTS and "-" not in family])
def test_decoders_say_what_they_say_without(family: str) -> None:
    """Answers one after the other: each finds what the one before left in the places."""
    _, backbone = pair(family)
    wanted = {name: decoded(make(backbone), prompt(9)) for name, make in MAKES.items()}
    choice = capture_steps(backbone, DEPTHS, recorder=Operators())
    captured = backbone.captured
    assert captured is not None
    assert choice.graphs == 4 * 4, "spans between exits, and lengths"
    for name, theirs in wanted.items():
        captured.replays.clear()
        steps = decoded(MAKES[name](backbone), prompt(9))
        same_steps(steps, theirs)
        if name == "EarlyExit":  # debts make long chunks too
            assert 0 < blocks_replayed(captured) <= blocks_called(steps)
        else:
            assert blocks_replayed(captured) == blocks_called(steps)
        if name == "Full":
            assert captured.replays == {(a, b, 1): LIMIT - 1 for a, b in [(0, 2), (2, 3), (3, 5), (5, 6)]}
    assert len(captured.graphs) == choice.graphs, "nothing is captured while an answer is made"


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_chosen_by_python_are_refused(family: str) -> None:
    _, backbone = pair(family)
    with pytest.raises(UserError, match=r"a step of 1 positions: aten.* looks at the values.*Leave compile out"):
        capture_steps(backbone, DEPTHS, recorder=Operators())
    assert backbone.captured is None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba2", "bamba"])
def test_runs_take_turns(family: str) -> None:
    """Each moves the other's state out; two drafting runs among them, whose snapshots are held meanwhile."""
    _, backbone = pair(family)
    kinds = ["Full", "SelfSpeculative", "EarlyExit", "SelfSpeculative"]
    wanted = [decoded(MAKES[name](backbone), prompt(5 + seed, seed=seed)) for seed, name in enumerate(kinds)]
    capture(backbone)
    runs = [MAKES[name](backbone).decode(prompt(5 + i, seed=i), max_new_tokens=LIMIT) for i, name in enumerate(kinds)]
    together = list(zip_longest(*runs))
    for got, theirs in zip(zip(*together, strict=True), wanted, strict=True):
        same_steps(list(got), theirs)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "mamba", "falcon_h1", "lfm2"])
def test_places_grow_and_the_settled_state_is_that_of_one_pass(family: str) -> None:
    """Longer than the first capacity of run and places, with debts at every depth and chunks of many lengths."""
    _, backbone = pair(family)
    captured, tokens_1T = capture(backbone, capacity=16), prompt(75)
    cache, whole = backbone.new_cache(4), backbone.new_cache()
    for at, chunk_1T in enumerate(tokens_1T.split([7, *[1, 2, 1, 3, 5, 1, 4] * 4], 1)):
        depth = (6, 2, 3, 6, 5, 6, 2)[at % 7]
        h_BTD = backbone.run(backbone.embed(chunk_1T, cache), Span(0, depth), cache)
        if depth < DEPTH:
            cache.owe(depth, h_BTD)
    backbone.settle(cache)
    assert captured.capacity == (16 if family == "mamba" else 128), (
        "a recurrent state has no positions to make room for"
    )
    assert {length for *_, length in captured.replays} == {1, 2, 3, 4}
    backbone.captured = None
    backbone.run(backbone.embed(tokens_1T, whole), Span(0, DEPTH), whole)
    for mine, theirs in zip(cache.states, whole.states, strict=True):
        same(state(mine, 75), state(theirs, 75))


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mamba2", "bamba"])
def test_what_is_held_stays_as_it_was(family: str) -> None:
    """Hidden states, the state at a snapshot, and the state of a run that others have moved out."""
    _, backbone = pair(family)
    capture(backbone)
    runs, held, copies = [backbone.new_cache(), backbone.new_cache()], list[Tensor](), list[Tensor]()
    for cache in runs:
        backbone.run(backbone.embed(prompt(7), cache), Span(0, DEPTH), cache)
    for step in range(24):
        cache = runs[0 if step < 12 else step % 2]
        held.append(backbone.run(backbone.embed(prompt(1, seed=step), cache), Span(0, DEPTH), cache))
        held += [x for kept in (cache.snapshot().states if step in (5, 17) else ()) for x in kept.recurrent or ()]
        assert all(map(torch.equal, held, copies)), f"step {step} changed what was held before it"
        copies = [x.clone() for x in held]


@torch.inference_mode()
@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1", "lfm2"])
@pytest.mark.parametrize("keep", [3, 18])
def test_a_rollback_returns_to_the_state_of_one_pass(family: str, keep: int) -> None:
    """Of 20 positions behind a snapshot; of the last ones no states are held, so they are read again from the rows."""
    _, backbone = pair(family)
    capture(backbone)
    cache, whole, tokens_1T = backbone.new_cache(), backbone.new_cache(), prompt(27)
    backbone.run(backbone.embed(tokens_1T[:, :7], cache), Span(0, DEPTH), cache)
    snapshot = cache.snapshot()
    for token_1T in tokens_1T[:, 7:].split(1, 1):
        backbone.run(backbone.embed(token_1T, cache), Span(0, DEPTH), cache)
    cache.rollback(snapshot, keep)
    backbone.run(backbone.embed(tokens_1T[:, : 7 + keep], whole), Span(0, DEPTH), whole)
    for mine, theirs in zip(cache.states, whole.states, strict=True):
        same(state(mine, 7 + keep), state(theirs, 7 + keep))


def test_what_does_not_suit_runs_as_it_did() -> None:
    """Batches, padding, other spans, holes; each on a state that replayed steps share where they can."""
    _, backbone = pair("llama")
    rows, pad_B = padded()
    runs: list[Callable[[], list[Step]]] = [
        lambda: decoded(Full(backbone), rows, pad_B=pad_B),
        lambda: decoded(Full(backbone), rows[1:2], pad_B=pad_B[1:2]),
        lambda: decoded(EarlyExit(backbone, bank(backbone, [1, 4]), Dice()), prompt(9)),
        lambda: decoded(EarlyExit(backbone, bank(backbone), Dice(), skipped_state=Skip()), prompt(9)),
    ]
    wanted = [run() for run in runs]
    captured = capture(backbone)
    for number, (run, theirs) in enumerate(zip(runs, wanted, strict=True)):
        captured.replays.clear()
        steps = run()
        same_steps(steps, theirs)
        if number < 2:
            assert not captured.replays
        else:
            assert blocks_replayed(captured) < blocks_called(steps)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba2", "falcon_h1"])
def test_packed_models_can_be_captured(family: str) -> None:
    """Whose other small steps are recorded."""
    _, backbone = pair(family)
    pack(backbone, Rows)
    wanted = {name: decoded(make(backbone), prompt(9)) for name, make in MAKES.items()}
    choice = capture_steps(backbone, DEPTHS, Choice("float64", "Rows", {}), recorder=Operators())
    assert (choice.precision, choice.format, choice.graphs) == ("float64", "Rows", 16)
    for name, theirs in wanted.items():
        same_steps(decoded(MAKES[name](backbone), prompt(9)), theirs)


def test_batches_can_be_captured() -> None:
    _, backbone = pair("bamba")
    wanted = decoded(Full(backbone), prompt(9, batch=3))
    choice = capture_steps(backbone, recorder=Operators(), lengths=[1], rows=3)
    same_steps(decoded(Full(backbone), prompt(9, batch=3)), wanted)
    assert backbone.captured is not None
    assert (choice.graphs, backbone.captured.replays[0, 6, 1]) == (1, 2 + LIMIT - 1)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [None, partial(dynamax.SelfSpeculative, draft_limit=3)])
def test_an_engine_answers_as_without(decoder: object, tmp_path: Path) -> None:
    """Answers of one engine before and after; several prompts together, too."""
    engine = dynamax.load(Path(__file__).parents[2] / "assets/granite", exits=[2, 4], device="cpu")
    asked = {"policy": dynamax.MaxProb(0.4), "decoder": decoder, "max_new_tokens": 24}
    prompts = ["Once upon a time", "The sun"]
    wanted = [*(engine.generate(each, **asked) for each in prompts), *engine.generate(prompts, **asked)]
    assert engine.exits is not None
    engine.precision = capture_steps(engine.backbone, engine.exits.depths, recorder=Operators())
    found = [*(engine.generate(each, **asked) for each in prompts), *engine.generate(prompts, **asked)]
    assert [(each.tokens, each.depths) for each in found] == [(each.tokens, each.depths) for each in wanted]
    told = environment("cpu", dtype="float32", batch=1, precision=engine.precision)
    assert (told["precision"], told["weights"], told["graphs"]) == (None, None, 12)
    assert told["compile_seconds"] > 0
    with pytest.raises(UserError, match="captured in CUDA graphs.*stays where it was loaded"):
        engine.to("meta")


def test_a_model_that_moves_or_is_copied_has_no_graphs() -> None:
    """They know where its weights are."""
    _, backbone = pair("llama")
    captured = capture(backbone)
    assert copy.deepcopy(backbone).captured is None
    assert backbone.to(torch.float64).captured is captured, "nothing moved"
    assert backbone.to(torch.bfloat16).captured is None


# -- what a graph cannot hold, and that the stand-in would show it --------------------------------------------


def test_a_block_that_asks_for_a_value_is_refused() -> None:
    class Asks(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (1 if x.sum().item() > 0 else 2)

    backbone = HFBackbone(tiny("llama"))
    backbone._blocks[3].mlp = Asks(backbone._blocks[3].mlp)
    with pytest.raises(UserError, match=r"aten.*(item|_local_scalar_dense).*looks at the values"):
        capture_steps(backbone, DEPTHS, recorder=Operators())


def test_a_block_that_python_changes_is_refused() -> None:
    """It gives other values when it is repeated."""

    class Counts(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.count = inner, 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.inner(x) * self.count

    backbone = HFBackbone(tiny("llama"))
    backbone._blocks[3].mlp = Counts(backbone._blocks[3].mlp)
    with pytest.raises(UserError, match=r"at depth 5 a step of 1 positions gives hidden states .* apart"):
        capture_steps(backbone, DEPTHS, recorder=Operators())
    assert backbone.captured is None


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: x.to("meta"),
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_a_graph_cannot_hold(run: Callable[[Tensor], object]) -> None:
    with pytest.raises(NotCapturableError, match=r"aten.*(looks at the values|moves a tensor between cpu and meta)"):
        Operators().record(lambda: run(torch.ones(3)))


def test_numbers_that_attention_leaves_on_the_host_are_no_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """As float32 attention on a GPU does; here another operation stands for it, and another device for the GPU."""

    @torch.library.custom_op("dynamax_test::attention", mutates_args=())
    def attention(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), torch.zeros((), device="meta")

    with pytest.raises(NotCapturableError, match="moves a tensor between cpu and meta"), Watch():
        attention(torch.ones(3))
    monkeypatch.setattr(graphs, "ATTENTION", torch.ops.dynamax_test.attention)
    with Watch():
        made, _ = attention(torch.ones(3))
    assert made.equal(torch.ones(3))


def test_the_stand_in_goes_wrong_as_a_graph_would() -> None:
    """It reads tensors, not names; it decides nothing anew; and what another recording returned is lost."""
    x, numbers, recorder = torch.ones(3), [1.0], Operators()
    holder = [torch.ones(3)]
    doubled = recorder.record(lambda: (x * 2 + numbers[0], holder[0] + 1))
    other = recorder.record(lambda: x[:2].exp())
    x.fill_(5)
    numbers[0], holder[0] = 7.0, torch.zeros(3)
    first, second = doubled()
    assert first.tolist() == [11.0] * 3, "the new value of the tensor, the old number"
    assert second.tolist() == [2.0] * 3, "the tensor that has been replaced"
    assert other().tolist() == pytest.approx([148.413159] * 2)
    assert first.isnan().all()
