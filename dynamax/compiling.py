"""Recorded programs compiled by inductor, piece by piece.

A program is cut where it calls the state of what was recorded or a function that looks at values, and where tensors are
as long as what is held; these operations stay as they are. The pieces between have the same shapes at every step.
Pieces of the same text, such as those of all blocks of one kind, are compiled once, with their weights as inputs;
inductor keeps what it made on disk.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, final

import torch
from torch import Tensor, fx

from dynamax.errors import UserError
from dynamax.files import cache_folder
from dynamax.recording import Line, Program, function_of

WORTH = 3
"""Operations of a piece that is worth a call of its own."""

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""How far a compiled piece may be from what was recorded, as a share of the largest value; 0.03 in shorter dtypes.

A model in float64 takes some steps in float32 too."""


class NotCompilableError(Exception):
    """A program that inductor cannot compile, or compiles to something else."""


@dataclass(frozen=True)
class Piece:
    """Lines that are compiled together.

    Attributes:
        lines: In order.
        takes: Names of the tensors that it reads, weights included.
        gives: Names of what it makes and others read.
    """

    lines: tuple[Line, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@final
class Compiler:
    """Makes functions of recorded programs: ``dynamax.recording.Build``.

    Attributes:
        pieces: The compiled pieces, by text, objects, shapes.

    Raises:
        UserError: If there is no C++ compiler.
    """

    def __init__(self) -> None:
        cpp_compiler()
        self.pieces: dict[Hashable, Callable[..., Sequence[Tensor]]] = {}
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))

    def __call__(self, recordings: Sequence[Program], arguments: str) -> Callable[..., Any]:
        """The function of a program.

        Args:
            recordings: The same program, as it was recorded at several places.
            arguments: Of the function, as for ``Program.function``.

        Raises:
            NotCompilableError: With the reason.
        """
        program = recordings[-1]
        names, text, grown = program.named(), [], growing(recordings)
        states = {name for line in program.lines if line.state for name in line.makes} - grown
        values = program.values | {name: program.values[name].contiguous() for name in states}
        for number, step in enumerate(schedule(program, grown)):
            if isinstance(step, Line):
                text.append(step.text)
                # a state may be a part of something larger, and not of the same thing at every step
                text += [f"{name} = {name}.contiguous()" for name in step.makes if name in states]
                continue
            names[f"piece{number}"] = self._compiled(step, program.named(), values)
            given = ", ".join(step.takes)
            text.append(f"({''.join(f'{name}, ' for name in step.gives)}) = piece{number}({given})")
        return function_of(text, arguments, names)

    def _compiled(
        self, piece: Piece, objects: dict[str, Any], values: dict[str, Tensor]
    ) -> Callable[..., Sequence[Tensor]]:
        """A piece's function: one that is known, or a new one; compared with what was recorded."""
        inputs = [(objects if name in objects else values)[name].detach() for name in piece.takes]
        others = {name: objects[name] for line in piece.lines for name in line.reads if name in objects}
        others = {name: value for name, value in others.items() if not isinstance(value, Tensor)}
        lines = [line.text for line in piece.lines]
        shapes = [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in inputs]
        key = (*lines, *piece.gives, *((name, described(value)) for name, value in others.items()), *shapes)
        if key not in self.pieces:
            returned = f"return ({''.join(f'{name}, ' for name in piece.gives)})"
            self.pieces[key] = compiled(function_of([*lines, returned], ", ".join(piece.takes), others), inputs)
        for name, found in zip(piece.gives, self.pieces[key](*inputs), strict=True):
            check(found, values[name])
        return self.pieces[key]


def cpp_compiler() -> str:
    """The C++ compiler: what CXX names, else g++ or clang++.

    Raises:
        UserError: If there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise UserError(
        "Compiling needs a C++ compiler, and neither CXX nor g++ nor clang++ names one here. Install one (on Debian: "
        "apt install g++), or leave compile out."
    )


def described(value: object) -> Hashable:
    """An object that a program names, as part of a key."""
    return repr(value) if isinstance(value, slice) else value  # pyright: ignore[reportReturnType]


def growing(recordings: Sequence[Program]) -> set[str]:
    """Names of the tensors whose shape depends on how much is held: masks, keys and values, scores.

    A window may hold as much at every place, so shapes that differ are not all of them; those that have the length of
    the keys wherever the program was recorded are taken too.
    """
    first = recordings[0].values
    differ = {name for other in recordings for name, value in other.values.items() if value.shape != first[name].shape}
    return differ | set.intersection(*map(as_long_as_keys, recordings))


def as_long_as_keys(program: Program) -> set[str]:
    """Names of the tensors that come from keys or a mask and have their length in some dimension."""
    values, behind, lengths = program.values, set[str](), set[int]()
    if "mask" in values:
        behind.add("mask")
        lengths.add(values["mask"].shape[-1])
    for line in program.lines:
        if line.state and line.reads and line.makes:
            lengths |= {values[name].shape[-2] for name in line.makes}
            behind |= set(line.makes)
        elif behind & set(line.reads):
            behind |= set(line.makes)
    return {name for name in behind if name in values and lengths & set(values[name].shape)}


def schedule(program: Program, growing: set[str]) -> list[Line | Piece]:
    """The lines of a program in an order that leaves few pieces; its last line, which returns, comes last.

    Args:
        program: What is to be ordered.
        growing: Names of tensors that no piece reads or makes.

    Raises:
        NotCompilableError: If a piece would change what it was given.
    """
    *lines, last = program.lines
    needs = needed(lines, program.values)
    alone = {i for i, line in enumerate(lines) if line.state or line.whole or growing & {*line.reads, *line.makes}}
    steps: list[Sequence[int]] = []
    done, left = set[int](), list(range(len(lines)))
    while left:
        ready = [i for i in left if i in alone and needs[i] <= done and (lines[i].makes or not lines[i].state)]
        piece: list[int] = []
        for i in left:
            if i not in alone and needs[i] <= done | set(piece):
                piece.append(i)
        if ready:
            steps += [[i] for i in ready]
        elif piece:
            steps.append(piece)
        else:  # what only takes note of something, such as of a new state
            steps += [[i] for i in left]
        done |= {i for step in steps for i in step}
        left = [i for i in left if i not in done]
    ordered: list[Line | Piece] = []
    for number, step in enumerate(steps):
        if len(step) < WORTH or step[0] in alone:
            ordered += [lines[i] for i in step]
            continue
        later = {name for other in steps[number + 1 :] for i in other for name in lines[i].reads} | set(last.reads)
        ordered.append(piece_of([lines[i] for i in step], program, later))
    return [*ordered, last]


def needed(lines: Sequence[Line], values: dict[str, Tensor]) -> list[set[int]]:
    """For each line, the numbers of those before it that must have run."""
    makers: dict[str, int] = {}
    users: dict[int, set[int]] = {}
    changed: dict[int, int] = {}
    state: int | None = None
    found: list[set[int]] = []
    for i, line in enumerate(lines):
        needs = {makers[name] for name in line.reads if name in makers}
        places = {values[name].untyped_storage().data_ptr() for name in line.reads if name in values}
        needs |= {changed[place] for place in places if place in changed}
        if line.changes is not None:
            place = values[line.changes].untyped_storage().data_ptr()
            needs |= users.get(place, set())
            changed[place] = i
        if line.state and line.reads:  # it may change the state
            needs |= set() if state is None else {state}
            state = i
        for name in line.makes:
            makers[name] = i
            if name in values:
                places.add(values[name].untyped_storage().data_ptr())
        for place in places:
            users.setdefault(place, set()).add(i)
        found.append(needs - {i})
    return found


def piece_of(lines: Sequence[Line], program: Program, later: set[str]) -> Piece:
    """These lines as a piece; ``later`` are the names that are read after it."""
    made = [name for line in lines for name in line.makes]
    objects = program.named()
    read = [name for line in lines for name in line.reads if name not in made]
    takes = [name for name in dict.fromkeys(read) if name in program.values or isinstance(objects.get(name), Tensor)]
    given = {program.values[name].untyped_storage().data_ptr() for name in takes if name in program.values}
    for line in lines:
        if line.changes is not None and program.values[line.changes].untyped_storage().data_ptr() in given:
            raise NotCompilableError(f"it changes what it is given: {line.text}")
    return Piece(tuple(lines), tuple(takes), tuple(name for name in made if name in later))


@torch.no_grad()
def compiled(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """A function of tensors compiled by inductor for tensors of these shapes.

    Raises:
        NotCompilableError: With inductor's reason.
    """
    from torch._inductor import standalone_compile  # takes a second
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own code
            graph = make_fx(function, tracing_mode="fake")(*inputs)
            join_products(graph)
            return standalone_compile(graph, list(inputs), dynamic_shapes="from_example_inputs")
    except Exception as error:  # inductor raises anything
        raise NotCompilableError(f"{type(error).__name__}: {str(error).strip()[:300]}") from error


def join_products(graph: fx.GraphModule) -> None:
    """Multiply all matrices that have the same input in one call, in place."""
    known = getattr(torch.ops.dynamax, "product", None)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if known is not None and node.target == known.default:
            groups.setdefault(node.args[0], []).append(node)
    for x, nodes in groups.items():
        if len(nodes) == 1:
            continue
        packed, sizes = [node.args[1] for node in nodes], [node.args[2] for node in nodes]
        with graph.graph.inserting_before(nodes[0]):
            joined = graph.graph.call_function(torch.ops.dynamax.products.default, (x, packed, sizes))
            parts = [graph.graph.call_function(getitem, (joined, i)) for i in range(len(nodes))]
        for node, part in zip(nodes, parts, strict=True):
            node.replace_all_uses_with(part)
            graph.graph.erase_node(node)
    graph.recompile()


def check(found: Tensor, wanted: Tensor) -> None:
    """Refuse a result that is not what was recorded.

    Raises:
        NotCompilableError: If shapes or values differ.
    """
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise NotCompilableError(f"compiled, it gives {found.dtype} {tuple(found.shape)}")
    if not found.dtype.is_floating_point:
        same = torch.equal(found, wanted)
    else:
        scale = TOLERANCE.get(found.dtype, 0.03) * float(wanted.abs().max()) if wanted.numel() else 0.0
        same = torch.allclose(found, wanted, rtol=0.0, atol=scale, equal_nan=True)
    if not same:
        raise NotCompilableError("compiled, it gives other values")
