"""What a part of a network did once, as a flat list of operations that can be repeated without its Python.

A step of one position calls a few dozen to a few hundred small operations, and the code around them (modules, keywords,
choices that always fall the same way) takes as long as they do. So they are recorded while the part runs, and from the
third step of a kind on they are called one after the other by a function made of them.

What is repeated must not depend on what was recorded once. A recording is given up, for good and with its reason, if
the part asks a tensor for a value, or reads a tensor that is neither an input, nor a weight, nor made on the way; and
it is used only if another step, at another place, gives the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function, resolve_name

STEPS_TO_SEE = 2
"""Steps of a kind that are recorded and compared before one is repeated."""

MOST_POSITIONS = 16
"""Longer chunks are run as they are: there the operations take the time."""

FOLDED = 1 << 16
"""What is made of weights alone is kept if it is a view or has at most so many values, else made at every step."""

FACTS = {
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "is_cuda",
    "is_cpu",
    "requires_grad",
    "is_sparse",
    "is_quantized",
}
FACTS |= {"is_mps", "is_meta", "is_nested", "is_leaf", "grad_fn", "is_xpu", "is_mtia", "names"}
FACTS |= {"size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size"}
FACTS |= {"__len__", "nelement", "get_device", "is_inference", "ndimension", "is_same_size", "has_names", "__hash__"}
"""What may be asked of a tensor without looking at its values. Shapes are the same whenever a recording is used."""


class NotRecordableError(Exception):
    """What a block does depends on more than a recording can hold."""


@dataclass(frozen=True)
class Line:
    """One operation of a program.

    Attributes:
        text: As source text.
        reads: Names of the tensors and objects that it is given.
        makes: Names of what it returns.
        changes: Name of the tensor that it changes in place; None for none.
        state: Whether it reads or changes something that the program is given, such as a block's state.
        whole: Whether it calls a function that looks at values (``as_a_whole``).
    """

    text: str
    reads: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    changes: str | None = None
    state: bool = False
    whole: bool = False


@dataclass
class Program:
    """The operations of one part, as source text and the objects it names.

    Attributes:
        lines: One operation a line.
        objects: Functions, weights, dtypes and the like; number ``i`` has the name ``ci``.
        values: The tensors that were there when it was recorded, by name: those it was given, and those it made.
    """

    lines: list[Line] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)

    def same(self, other: Program) -> bool:
        """Whether both do the same."""
        pairs = zip(self.objects, other.objects, strict=False)
        return self.lines == other.lines and all(a is b or equal(a, b) for a, b in pairs)

    def named(self) -> dict[str, Any]:
        """Its objects, by name."""
        return {f"c{index}": value for index, value in enumerate(self.objects)}

    def function(self, arguments: str) -> Callable[..., Tensor]:
        """A function of these arguments, which have the names that the recorder's inputs were given."""
        return function_of((line.text for line in self.lines), arguments, self.named())


def function_of(lines: Iterable[str], arguments: str, names: dict[str, Any]) -> Callable[..., Any]:
    """A function of these arguments, made of source text, which may name these objects too."""
    names = dict(names)
    exec(code("\n ".join([f"def program({arguments}):", *lines])), names)  # noqa: S102
    return names["program"]


@functools.cache
def code(text: str) -> CodeType:
    """Source text, made ready to run: most blocks of a model have the same. Nothing in it comes from outside."""
    return compile(text, "<recording>", "exec")


IN_PLACE = {"__setitem__", "__iadd__", "__imul__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
"""Names of functions that change their first argument; those of all others end in an underscore."""

WHOLE: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Functions that a recording does not look into, as they are called and as they were written."""


def as_a_whole(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that looks at values of tensors. A recording calls it, and does not hold what it did once.

    Whatever else it depends on must stay, and it must change nothing that it is given.
    """

    @functools.wraps(function)
    def called(*args: Any) -> Tensor:  # noqa: ANN401
        tensors = tuple(tensors_in(args))
        return handle_torch_function(called, tensors, *args) if has_torch_function(tensors) else function(*args)

    WHOLE[called] = function
    return called


@functools.cache
def name_of(func: Any) -> str:  # noqa: ANN401
    """The last part of the name of a function of torch, or of what gives an attribute of a tensor."""
    name = resolve_name(func) or getattr(func, "__name__", "")
    return name.removesuffix(".__get__").rpartition(".")[2]


def equal(a: object, b: object) -> bool:
    """Whether two objects that a program names are the same for it."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


@final
class Recorder(TorchFunctionMode):
    """Writes down every operation while it is on.

    Args:
        inputs: Tensors that differ from step to step, by the names they have in the program.
        weights: Identities of the tensors that stay.
    """

    def __init__(self, inputs: dict[str, Tensor], weights: Iterable[int]) -> None:
        super().__init__()
        self.program = Program(values=dict(inputs))
        self._weights = frozenset(weights)
        self._names = {id(tensor): name for name, tensor in inputs.items()}
        self._held: list[object] = list(inputs.values())  # an identity is unique only as long as its object lives
        self._constants: set[int] = set()
        self._places: dict[int, str] = {}
        self._made = 0
        self._reads: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run one operation and write it down."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = name_of(func)
        tensors = list(tensors_in((args, kwargs)))
        if name in FACTS or not (tensors or list(tensors_in(out))):
            return out
        changes = (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE or kwargs.get("inplace", False)
        if kwargs.get("out") is not None:
            raise NotRecordableError(f"{name} writes into a tensor that it is given")
        if changes:
            self._check_changed(args[0], name)
        elif not list(tensors_in(out)):
            raise NotRecordableError(f"{name} looks at the values of a tensor")
        elif isinstance(out, Tensor) and any(out is tensor for tensor in tensors):
            return out  # nothing was done, such as a change to the dtype that it has
        elif (tensors or name == "full") and all(map(self._constant, tensors)) and self._keep(out, tensors):
            return out
        given = [self._text(argument) for argument in args]
        given += [f"{name}={self._text(value)}" for name, value in kwargs.items()]
        changed = self._text(args[0]) if changes else None
        made = None if out is None or (changes and out is args[0]) else out
        function = WHOLE.get(func, func)
        self._line(f"{self._place(function)}({', '.join(given)})", made, changes=changed, whole=func in WHOLE)
        return out

    def call(self, text: str, function: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401
        """Run a function of a state, by a name that the program knows, and write that down."""
        with torch._C.DisableTorchFunction():
            out = function(*args)
        given = ", ".join(self._text(argument) for argument in args)
        self._line(f"{text}({given})", out, state=True)
        return out

    def assign(self, target: str, value: object) -> None:
        """Write down that something, by a name that the program knows, becomes ``value``."""
        self._line(f"{target} = {self._text(value)}", None, state=True)

    def finish(self, out: Tensor) -> Program:
        """The program; ``out`` is what it returns."""
        self._line(f"return {self._text(out)}", None)
        return self.program

    def _line(self, text: str, out: object, **facts: Any) -> None:  # noqa: ANN401
        """Write a line; ``out`` is what it returns, None for nothing. What it reads was noted by ``_text``."""
        made: tuple[str, ...] = ()
        if isinstance(out, (tuple, list)):
            made = tuple(self._new(item) for item in out)
            text = f"({''.join(f'{name}, ' for name in made)}) = {text}"
        elif out is not None:
            made = (self._new(out),)
            text = f"{made[0]} = {text}"
        self.program.lines.append(Line(text, tuple(dict.fromkeys(self._reads)), made, **facts))
        self._reads.clear()

    def _new(self, value: object) -> str:
        name = f"v{self._made}"
        self._made += 1
        self._names[id(value)] = name
        self._held.append(value)
        if isinstance(value, Tensor):
            self.program.values[name] = value
        return name

    def _text(self, value: object) -> str:
        """An argument as source text."""
        if isinstance(value, Tensor):
            if id(value) in self._names:
                self._reads.append(self._names[id(value)])
                return self._reads[-1]
            if self._constant(value):
                return self._place(value)
            raise NotRecordableError(f"a tensor {tuple(value.shape)} is neither an input nor a weight")
        if type(value) in (list, tuple):
            inner = "".join(f"{self._text(item)}, " for item in value)  # pyright: ignore[reportGeneralTypeIssues]
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if type(value) is dict:
            return "".join(["{", *(f"{name!r}: {self._text(item)}, " for name, item in value.items()), "}"])
        if value is None or type(value) in (int, float, bool, str):
            return repr(value) if value == value and value not in (float("inf"), -float("inf")) else self._place(value)
        return self._place(value)

    def _place(self, value: object) -> str:
        """The name of an object that source text cannot write."""
        if id(value) not in self._places:
            self._places[id(value)] = f"c{len(self.program.objects)}"
            self.program.objects.append(value)
        self._reads.append(self._places[id(value)])
        return self._reads[-1]

    def _constant(self, tensor: Tensor) -> bool:
        return id(tensor) in self._weights or id(tensor) in self._constants

    def _keep(self, out: object, tensors: list[Tensor]) -> bool:
        """Keep what is made of weights alone, if it takes little memory."""
        made = list(tensors_in(out))
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        if any(t.numel() > FOLDED and t.untyped_storage().data_ptr() not in storages for t in made):
            return False
        self._constants |= {id(tensor) for tensor in made}
        self._held += made
        return True

    def _check_changed(self, tensor: Tensor, name: str) -> None:
        if self._constant(tensor):
            raise NotRecordableError(f"{name} changes a weight")
        self._text(tensor)


def tensors_in(value: object) -> Iterable[Tensor]:
    """All tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


Build = Callable[[Sequence[Program], str], Callable[..., Any]]
"""``(recordings of one program, its arguments) -> its function``."""


class Programs:
    """Programs of many parts, and those that are not in use yet.

    Args:
        arguments: What every program is called with.

    Attributes:
        build: Makes the function of a program that was recorded at several places; None for ``Program.function``.
        ready: Programs in use, by kind of step; a kind begins with the part.
        given_up: Parts that are not recorded, and why.
    """

    def __init__(self, arguments: str) -> None:
        self._arguments = arguments
        self.build: Build | None = None
        self._seen: dict[tuple[Any, ...], list[tuple[Hashable, Program]]] = {}
        self.ready: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self.given_up: dict[Any, str] = {}

    def note(self, kind: tuple[Any, ...], place: Hashable, program: Program) -> None:
        """Take note of what was recorded at a place; once it was the same at two, it is in use."""
        seen = self._seen.setdefault(kind, [])
        seen.append((place, program))
        if len(seen) == STEPS_TO_SEE:
            del self._seen[kind]
            if all(program.same(other) for _, other in seen):
                build, recorded = self.build, [other for _, other in seen]
                self.ready[kind] = build(recorded, self._arguments) if build else program.function(self._arguments)
            else:
                self.given_up[kind[0]] = "what it does differs from step to step"

    def recorded_at(self, kind: tuple[Any, ...], place: Hashable) -> bool:
        """Whether such a step was recorded at this place already: recording it again would show nothing new."""
        return any(place == known for known, _ in self._seen.get(kind, ()))

    def forget(self, part: Hashable) -> None:
        """Forget all programs of a part."""
        self.given_up.pop(part, None)
        for kinds in (self._seen, self.ready):
            for kind in [kind for kind in kinds if kind[0] == part]:
                del kinds[kind]


def held_by(model: nn.Module) -> Iterable[int]:
    """Identities of all tensors that the modules of a model hold, registered or not."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            yield from (id(value) for value in held.values() if isinstance(value, Tensor))
