"""The format in which weights are held, chosen by name or by a short measurement on this machine."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn

from dynamax.backbones.base import Backbone
from dynamax.backbones.captured import CapturedSpans
from dynamax.backbones.experts import matrices_of, unknown_experts
from dynamax.backbones.graphs import Graphs, NotCapturableError, Recorder
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.linear import weight_of
from dynamax.backbones.packed import pack
from dynamax.compiling import Compiler, NotCompilableError
from dynamax.device import processor
from dynamax.errors import UserError
from dynamax.files import cache_folder, read_mapping, write_atomically
from dynamax.kernels.operators import Float16Operator, load_operators
from dynamax.kernels.products import BFloat16, Columns, Float16, Int4, Int8, Product, Rows
from dynamax.kernels.torchao import Int8Torchao
from dynamax.recording import MOST_POSITIONS, STEPS_TO_SEE
from dynamax.types import Span

PRECISIONS: dict[str, tuple[type[Product], ...]] = {
    "float32": (Rows, Columns),
    "float16": (Float16,),
    "bfloat16": (BFloat16,),
    "int8": (Int8, Int8Torchao),
    "int4": (Int4,),
}
"""The formats of each precision; the fastest on the machine is taken."""

ON_GPU = ("int8",)
"""Precisions that a GPU can have too."""

AUTO, FAITHFUL = "auto", ("float32", "float16")
"""``auto`` takes the fastest of those whose tokens are float32's, but for ties in the last digits."""

SAMPLE = 48 << 20
"""Bytes of float32 weights that a measurement reads: more than most processors keep in their caches."""

ROUNDS = 15

QUIET = 2.0
"""How many times the best the median of a measurement may take for it to be kept."""

COMPILED = 4
"""Most positions of a step that is compiled or captured: every length is on its own."""

BOUNDS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05}
"""Relative distance of captured hidden states from others that the order of sums may make; 0.2 in shorter dtypes.

A model in float64 takes some steps in float32 too."""


@dataclass(frozen=True)
class Choice:
    """How weights are held, and what that was chosen from.

    Attributes:
        precision: Its name in ``PRECISIONS``; None for weights as they were loaded.
        format: The name of the class that multiplies; None for torch's own.
        milliseconds: For each format that was measured, the time of the sample's products for one position.
        compiling: Seconds that compiling or capturing took; None where neither was done.
        graphs: CUDA graphs that were captured; None on a CPU.
    """

    precision: str | None
    format: str | None
    milliseconds: dict[str, float]
    compiling: float | None = None
    graphs: int | None = None


def check_precision(precision: str | None) -> None:
    """Refuse (UserError) what is no name of a precision; None stands for weights as they were loaded."""
    if precision not in (None, AUTO, *PRECISIONS):
        raise UserError(f"The precision {precision!r} was given; one of {', '.join([AUTO, *PRECISIONS])} is wanted.")


def set_precision(backbone: Backbone, precision: str, *, compiled: bool = False) -> Choice | None:
    """Hold a backbone's weights in a precision, in place, and run its small steps recorded.

    Args:
        backbone: The model, on the device where it will run.
        precision: A name of ``PRECISIONS``; or ``auto``, which takes what suits the model and the machine.
        compiled: Whether inductor compiles the steps of one row, of up to ``COMPILED`` positions, on a CPU. On a GPU
            see ``capture_steps``.

    Returns:
        What was chosen; None if ``auto`` left the model as it is: on a GPU, or if it is none of transformers'.

    Raises:
        UserError: If there is no such precision, or this model or this machine cannot have it or be compiled for.
    """
    check_precision(precision)
    like = next(backbone.parameters())
    on_cpu = like.device.type == "cpu"
    if compiled:
        check_compilable(backbone)
    if compiled and not on_cpu:
        raise UserError(f"inductor was asked to compile a model on {like.device}; there use capture_steps.")
    if not isinstance(backbone, HFBackbone) or not (on_cpu or precision in ON_GPU):
        if precision == AUTO:
            return None
        what = f"on {like.device}" if isinstance(backbone, HFBackbone) else f"of the class {type(backbone).__name__}"
        raise UserError(
            f"The precision {precision} was asked of a model {what}; wanted: a model of transformers on a CPU, or "
            f"{' or '.join(ON_GPU)} on a GPU. Leave precision out, and choose a dtype."
        )
    if on_cpu and like.dtype != torch.float32 and precision != AUTO:
        raise UserError(
            f"The precision {precision} was asked of a model that computes in {str(like.dtype).removeprefix('torch.')}."
            f" Load it in float32, or leave precision out."
        )
    begin = time.perf_counter()
    compiler = Compiler() if compiled else None  # which refuses a machine that cannot compile, before anything is done
    choice = _choose(backbone, precision, compiled=compiled)
    _leave_file(backbone)
    if compiler is None:
        return choice
    compile_steps(backbone, compiler)
    return replace(choice, compiling=time.perf_counter() - begin)


def _leave_file(backbone: Backbone) -> None:
    """Copy the weights that are not packed: one view into a mapped file would keep all of it in memory."""
    for weight in backbone.parameters():
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()


@torch.inference_mode()
def compile_steps(backbone: HFBackbone, compiler: Compiler) -> None:
    """Compile the steps of one row, by taking some of each length. Others stay as they are recorded.

    So nobody waits for a compiler in the middle of an answer.

    Raises:
        UserError: If a block cannot be recorded or compiled.
    """
    recordings, span, device = backbone.recordings, Span(0, backbone.spec.depth), next(backbone.parameters()).device
    assert recordings is not None, "a packed backbone has recordings"
    recordings.build = compiler
    for length in range(1, COMPILED + 1):
        cache, reason = backbone.new_cache(2 * MOST_POSITIONS), ""
        try:
            for count in (MOST_POSITIONS + 3, *[length] * STEPS_TO_SEE):  # as many keys as nothing else has channels
                tokens_1T = torch.zeros(1, count, dtype=torch.long, device=device)
                backbone.run(backbone.embed(tokens_1T, cache), span, cache)
        except NotCompilableError as error:
            reason = f"a step of {length} positions: {error}"
        for index, cause in recordings.given_up.items():
            reason = reason or f"block {index}: {cause}"
        if reason:
            raise UserError(f"This model cannot be compiled; {reason}. Leave compile out.")
    recordings.build = None


@torch.inference_mode()
def capture_steps(
    backbone: Backbone,
    depths: Collection[int] = (),
    choice: Choice | None = None,
    *,
    recorder: Recorder | None = None,
    lengths: Sequence[int] = range(1, COMPILED + 1),
    rows: int = 1,
) -> Choice:
    """Capture the steps of one row in CUDA graphs, by taking some of each length, span by span.

    So nobody waits for it in the middle of an answer. What is replayed must give what the blocks give.

    Args:
        backbone: The model, on the GPU where it will run.
        depths: Where steps may leave, such as those of the exits: one graph for each span between, and each length.
        choice: How its weights are held, if not as they were loaded.
        recorder: Captures; CUDA graphs if left out.
        lengths: Positions of a step.
        rows: Rows of a step.

    Returns:
        The choice, with the time it took and the number of graphs.

    Raises:
        UserError: If a span cannot be captured, or gives something else.
    """
    begin = time.perf_counter()
    check_compilable(backbone)
    like, refused = next(backbone.parameters()), "This model cannot be captured in CUDA graphs; "
    captured = CapturedSpans(backbone, depths, recorder or Graphs(like.device), lengths=lengths, rows=rows)
    for length in lengths:
        sizes = (MOST_POSITIONS + 3, length, length)  # a prompt, and steps at two places
        tokens_BT = (torch.arange(sum(sizes), device=like.device) % backbone.spec.vocab).expand(rows, -1)
        passes: list[list[tuple[int, Tensor]]] = [[], []]
        for passed, backbone.captured in zip(passes, (None, captured), strict=True):
            cache = backbone.new_cache(sum(sizes))
            try:
                for chunk_BT in tokens_BT.split(sizes, 1):
                    passed += backbone.walk(backbone.embed(chunk_BT, cache), captured.depths[1:], cache)
            except NotCapturableError as error:
                backbone.captured = None
                raise UserError(f"{refused}a step of {length} positions: {error}. Leave compile out.") from error
        for (depth, wanted_BTD), (_, found_BTD) in zip(*passes, strict=True):
            apart = float((found_BTD.double() - wanted_BTD.double()).norm() / wanted_BTD.double().norm())
            if not apart <= BOUNDS.get(like.dtype, 0.2):
                backbone.captured = None
                raise UserError(
                    f"{refused}at depth {depth} a step of {length} positions gives hidden states that are {apart:.2g} "
                    f"of their length apart from its own. Leave compile out."
                )
    return replace(choice or Choice(None, None, {}), compiling=time.perf_counter() - begin, graphs=len(captured.graphs))


def check_compilable(backbone: Backbone) -> None:
    """Refuse (UserError) a model whose steps can neither be compiled nor captured."""
    if not isinstance(backbone, HFBackbone):
        raise UserError(
            f"compile was asked of a model of the class {type(backbone).__name__}; it is there for models of "
            f"transformers. Leave it out."
        )


def _choose(backbone: HFBackbone, precision: str, *, compiled: bool) -> Choice:
    names = FAITHFUL if precision == AUTO else (precision,)
    weights, unknown = list(linear_weights(backbone.model)), unknown_experts(backbone.model)
    own, device = str(weights[0].dtype).removeprefix("torch."), weights[0].device.type
    kinds = [kind for name in names for kind in PRECISIONS[name]]
    reasons = {kind: refusal(kind, weights) or (unknown if kind.bytes else None) for kind in kinds}
    possible = {kind: name for name in names for kind in PRECISIONS[name] if reasons[kind] is None}
    if not possible:
        raise UserError(
            f"The precision {precision} cannot be had here: {reasons[kinds[0 if device == 'cpu' else -1]]}. Choose "
            f"another of {', '.join(PRECISIONS)}, or leave it out."
        )
    times = {} if len(possible) == 1 else measured(list(possible), sample(weights))
    kind = min(possible, key=lambda kind: times.get(kind.__name__, 0.0))
    del weights  # so that what is packed can be freed
    if kind is Float16 and compiled:
        load_operators()
        pack(backbone, Float16Operator)
    else:
        pack(backbone, kind)
    return Choice(own if kind.bytes is None else possible[kind], kind.__name__, times)


def linear_weights(model: nn.Module) -> Iterable[Tensor]:
    """The matrices ``[O, I]`` of a model's linear layers and experts, each once."""
    for module in model.modules():
        weight_OI = weight_of(module)
        if weight_OI is not None:
            yield weight_OI
        for weight_EOI in matrices_of(module).values():
            yield from weight_EOI


def refusal(kind: type[Product], weights: Iterable[Tensor]) -> str | None:
    """Why a format cannot hold some of these weights; None if it can hold all."""
    return next((reason for weight_OI in weights if (reason := kind.refusal(weight_OI)) is not None), None)


def sample(weights: Sequence[Tensor]) -> list[Tensor]:
    """The first matrices, up to ``SAMPLE`` bytes."""
    taken, size = [], 0
    for weight_OI in weights:
        size += 4 * weight_OI.numel()
        if taken and size > SAMPLE:
            break
        taken.append(weight_OI)
    return taken


def measured(kinds: Sequence[type[Product]], weights: Sequence[Tensor]) -> dict[str, float]:
    """Milliseconds of the products with one position, by format; measured once for each machine and kept on disk.

    What was measured while the machine was busy is not kept.
    """
    key = [processor(weights[0].device), torch.__version__, torch.get_num_threads(), [list(w.shape) for w in weights]]
    digest = hashlib.sha256(json.dumps([key, sorted(kind.__name__ for kind in kinds)]).encode()).hexdigest()[:16]
    file = cache_folder() / "precision" / f"{digest}.json"
    with suppress(OSError, ValueError):
        known = read_mapping(file)
        if all(type(known.get(kind.__name__)) is float for kind in kinds):
            return known
    times, quiet = timed({kind.__name__: [kind(weight_OI) for weight_OI in weights] for kind in kinds})
    if quiet:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(times).encode())
    return times


@torch.inference_mode()
def timed(products: dict[str, list[Product]]) -> tuple[dict[str, float], bool]:
    """Milliseconds for one position, formats in turn: each product's best of some rounds behind one to warm up.

    The best, since a product that several threads share waits for the slowest, and on a busy machine for a turn of the
    scheduler, a hundred times as long as it takes.

    Returns:
        The times, and whether the machine was quiet: whether the median round was near the best.
    """
    spent: dict[str, list[list[float]]] = {name: [] for name in products}
    for _ in range(ROUNDS + 1):
        for name, parts in products.items():
            rows = [torch.ones(1, part.in_features, dtype=part.dtype) for part in parts]
            spent[name].append([])
            for part, row in zip(parts, rows, strict=True):
                begin = time.perf_counter()
                part(row)
                spent[name][-1].append(1000 * (time.perf_counter() - begin))
    best = {name: sum(map(min, zip(*rounds[1:], strict=True)), 0.0) for name, rounds in spent.items()}
    usual = {name: median(map(sum, rounds[1:])) for name, rounds in spent.items()}
    return best, all(usual[name] <= QUIET * best[name] for name in products)
