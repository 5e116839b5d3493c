"""Types that every room uses: places, evidence, steps. Knows torch and nothing else.

Shape legend, used as a suffix in names throughout the package::

    B  rows of a batch          T  positions of a chunk      D  width of the residual stream
    V  vocabulary               K  keys attended to          H  attention heads
    C  candidate tokens         E  exits                     N  state size of a recurrent block
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dynamax.errors import UserError

T = TypeVar("T")


class Span(NamedTuple):
    """Blocks ``start`` up to, not including, ``stop``; block indices count from 0."""

    start: int
    stop: int


@dataclass(frozen=True)
class Spec:
    """What is known of a backbone without its weights.

    Attributes:
        family: Model type in transformers' spelling, such as ``"llama"``.
        depth: Number of blocks.
        width: Size of the residual stream, D.
        vocab: Rows of the output matrix, V.
        context: Longest sequence, in positions, the backbone accepts.
        fingerprint: Hash over configuration and weights; heads are bound to it.
    """

    family: str
    depth: int
    width: int
    vocab: int
    context: int
    fingerprint: str


class Project(Protocol):
    """The output matrix: normalised states to float32 logits, over all tokens or some."""

    def __call__(self, u_BTD: Tensor, tokens_C: Tensor | slice | None = None) -> Tensor:
        """``u_BTD`` to ``logits_BTV``, or to ``logits_BTC`` of some tokens: their ids, or a slice of all ids."""
        ...


@dataclass(frozen=True)
class Site:
    """The place of an exit head, and all of the backbone that it may use.

    Attributes:
        depth: Blocks completed below the head.
        spec: Facts about the backbone.
        normalize: The backbone's final norm, ``h_BTD -> u_BTD``.
        project: The output matrix, ``u_BTD -> logits_BTV`` (or ``_BTC`` over candidate tokens), in float32.
        last_blocks: So many of the backbone's last blocks, ``h_BTD, count -> h_BTD``; while decoding they attend to the
            keys that the cache holds, and record nothing.
    """

    depth: int
    spec: Spec
    normalize: Callable[[Tensor], Tensor]
    project: Project
    last_blocks: Callable[[Tensor, int], Tensor]


@dataclass
class Memory:
    """What a recurrent head remembers of the positions it has read.

    A head *replaces* the tensors in ``values`` and never writes into them: a copy of the mapping is a snapshot.

    Attributes:
        pad_B: Padding positions at the left of each row, or None.
        read: Positions read so far, padding included.
        values: The head's own tensors, by names of its choosing.
    """

    pad_B: Tensor | None = None
    read: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)

    def copy(self) -> Memory:
        """A snapshot: later reads of the original do not change it."""
        return Memory(self.pad_B, self.read, dict(self.values))

    def live(self, length: int) -> Tensor | None:
        """Mask ``live_BT`` of the next ``length`` positions: False on padding; None if nothing is padded."""
        if self.pad_B is None:
            return None
        positions_T = torch.arange(self.read, self.read + length, device=self.pad_B.device)
        return positions_T >= self.pad_B[:, None]


class Past:
    """What was read and said before one step, for policies that guess from it. Worked out when asked for.

    Args:
        texts: The tokens that each row has read, prompt included and padding left out, newest last.
        likely: For each row, the most likely tokens of steps before: given how many steps and how many tokens of each,
            the newest step's first and the most likely first.
        blocks: For each row, the block calls of each step before, without the prompt's own pass; None along a known
            text, where they depend on the policy.
        seconds: For each row, the time that each step before took, on the clock of the wall, without the prompt's own
            pass; None where ``blocks`` is.
        top: The full model's next token, ``top_B``; None while decoding, where nobody knows it.
        exits: For each row, the depths that the tokens before were drawn from, given how many; the newest first, and
            without the prompt's own pass. Along a known text, the first exit that says the full model's token stands
            in, or the top. None where nobody knows.
    """

    def __init__(
        self,
        texts: Callable[[], list[list[int]]],
        likely: Callable[[int, int], list[list[int]]],
        *,
        blocks: Callable[[], list[list[int]]] | None = None,
        seconds: Callable[[], list[list[float]]] | None = None,
        top: Callable[[], Tensor] | None = None,
        exits: Callable[[int], list[list[int]]] | None = None,
    ) -> None:
        self._texts = texts
        self.likely = likely
        self.blocks = blocks
        self.seconds = seconds
        self.top = top
        self.exits = exits
        self._derived: dict[tuple[object, ...], Any] = {}

    @cached_property
    def texts(self) -> list[list[int]]:
        """The tokens that each row has read."""
        return self._texts()

    def derive(self, function: Callable[..., T], *options: object) -> T:
        """``function(past, *options)``, computed once for all exits of the step."""
        if (function, *options) not in self._derived:
            self._derived[function, *options] = function(self, *options)
        return self._derived[function, *options]


class Evidence:
    """What a policy or a gate may look at when it decides about leaving at one exit.

    Logits and scores are computed when first asked for, and what was asked for is recorded, so that it can be charged.

    Leading dimensions are written ``...``. They are rows ``[B]`` for a policy and for a gate without memory; positions
    ``[T]`` where a known text is read; rows and positions ``[B, T]`` for a recurrent gate, which reads a sequence.

    Attributes:
        depth: Blocks completed, counted from 1.
        total: Blocks of the backbone.
        step: Tokens generated before this one; one number a row where rows are positions of a known text.
        hidden: Residual stream after ``depth`` blocks, ``[..., D]``.
        trail: Evidence of the earlier exits of the same step, shallowest first; empty for a recurrent gate.
        past: What was read and said before; None where nobody knows, as in training.
        vocab: Tokens of the vocabulary; 0 where nobody has said.
        rows_read: Rows of the output matrix that were read for some tokens alone.
        inner: Gates that are there for other gates: a policy that names no gate does not mean them.
    """

    def __init__(
        self,
        depth: int,
        total: int,
        step: int | Tensor,
        hidden: Tensor,
        *,
        logits: Callable[[], Tensor],
        gates: Mapping[str, Callable[[Evidence], Tensor]] | None = None,
        trail: Sequence[Evidence] = (),
        past: Past | None = None,
        candidates: Callable[[Tensor | slice], Tensor] | None = None,
        vocab: int = 0,
        inner: Collection[str] = (),
    ) -> None:
        self.depth = depth
        self.total = total
        self.step = step
        self.hidden = hidden
        self.trail = tuple(trail)
        self.past = past
        self.rows_read = 0
        self.inner = inner
        self._logits = logits
        self._candidates = candidates
        self.vocab = vocab
        self._few: tuple[int, Tensor, Tensor] | None = None
        self._settled: list[tuple[Tensor, Tensor]] = []
        self._gates = gates or {}
        self._scores: dict[str, Tensor] = {}
        self._derived: dict[tuple[object, ...], Tensor] = {}

    @cached_property
    def logits(self) -> Tensor:
        """Logits of this exit's lens, ``[..., V]``, in float32 at least."""
        logits = self._logits()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @cached_property
    def probs(self) -> Tensor:
        """Softmax of ``logits``, ``[..., V]``."""
        return self.logits.softmax(-1)

    @cached_property
    def token(self) -> Tensor:
        """The lens' most likely token, ``[...]``."""
        return self.logits.argmax(-1)

    def over(self, tokens_C: Tensor, own: Tensor | None = None, frequent: int = 0) -> Tensor:
        """Logits of some tokens alone, ``[..., frequent + C]``, in float32 at least: part of the matrix is read.

        If the exit's token is asked for afterwards, and the logits of all were never read, it is one of these.

        Args:
            tokens_C: Token ids, each once.
            own: Which of them count for each row, ``[..., C]``; the others get minus infinity. None for all.
            frequent: How many token ids besides, from 0 on, for every row. ``tokens_C`` has none of them.
        """
        few = self.few(tokens_C, own, frequent)
        self._few = frequent, tokens_C, few
        return few

    def few(self, tokens_C: Tensor, own: Tensor | None = None, frequent: int = 0) -> Tensor:
        """As ``over``, for a gate: what it looks at does not change which token the exit says."""
        if self.logits_read or self._candidates is None:
            read = [self.logits[..., :frequent], self.logits[..., tokens_C]]
        else:
            read = [self._candidates(slice(frequent))] if frequent else []
            read += [self._candidates(tokens_C)]
            self.rows_read += frequent + len(tokens_C)
        if own is not None:
            read[-1] = read[-1].masked_fill(~own, -torch.inf)
        few = torch.cat(read, -1) if len(read) > 1 else read[0]
        return few.to(torch.promote_types(few.dtype, torch.float32))

    @property
    def answers_from_few(self) -> bool:
        """Whether the exit's token is one of some tokens alone: ``over`` read them, and nobody read all logits."""
        return self._few is not None and not self.logits_read

    @property
    def answer(self) -> Tensor:
        """The logits that this exit's token is drawn from if it leaves here, ``[..., V]``.

        Those of all tokens; but if some tokens alone were read (``over``), theirs, and minus infinity for the others.
        """
        if self.logits_read or self._few is None:
            found = self.logits
        else:
            frequent, tokens_C, few = self._few
            found = few.new_full((*few.shape[:-1], self.vocab), -torch.inf)
            found[..., :frequent] = few[..., :frequent]
            found.index_copy_(-1, tokens_C, few[..., frequent:])
        for leave_B, known in reversed(self._settled):
            found = torch.where(leave_B[..., None], known, found)
        return found

    def settle(self, leave_B: Tensor) -> None:
        """These rows leave with what was read so far, whatever is read for the others afterwards."""
        if self.answers_from_few and bool(leave_B.any()):
            self._settled.append((leave_B, self.answer))

    def derive(self, function: Callable[..., Tensor], *options: object) -> Tensor:
        """``function(hidden, *options)``, computed once, whichever gates of the exit ask for it."""
        known = self._derived.get((function, *options))
        if known is None:
            known = self._derived[function, *options] = function(self.hidden, *options)
        return known

    @property
    def logits_read(self) -> bool:
        """Whether anyone has asked for the logits of this exit."""
        return "logits" in self.__dict__

    @property
    def gates_read(self) -> tuple[str, ...]:
        """Names of the gates asked for so far."""
        return tuple(self._scores)

    def select(self, rows: Sequence[int]) -> Evidence:
        """The evidence of some rows; what they ask for is computed for all, and recorded here. For a trail."""
        step = self.step if isinstance(self.step, int) else self.step[list(rows)]
        some = Evidence(
            self.depth,
            self.total,
            step,
            self.hidden[list(rows)],
            logits=lambda: self.logits[list(rows)],
            gates={name: lambda _, name=name: self.score(name)[list(rows)] for name in self._gates},
            vocab=self.vocab,
            inner=self.inner,
        )
        if self.logits_read:
            some.__dict__["logits"] = self.logits[list(rows)]
        return some

    def score(self, gate: str | None = None) -> Tensor:
        """Log-odds of a gate of this exit that leaving is right, ``[...]``.

        Args:
            gate: Class name of the gate; may be left out where the exit has just one.

        Raises:
            UserError: If the exit has no such gate, or several and none was named.
        """
        offered = [name for name in self._gates if name not in self.inner]
        name = gate if gate is not None else next(iter(offered), None)
        if name is None or name not in self._gates or (gate is None and len(offered) > 1):
            if self.depth == self.total:
                raise UserError(
                    f"The policy asked for the gate {gate or '(unnamed)'} of the exit at depth {self.depth}, the top, "
                    f"which takes no gates. Ask the gate at the exits below alone: OnlyAt(policy, depths)."
                )
            known = ", ".join(offered) or "none"
            raise UserError(
                f"The policy asked exit {self.depth} for the gate {gate or '(unnamed)'}; its gates that the policy may "
                f"ask are: {known}. Name one of them in the policy (gate: NAME), or give every exit such a gate."
            )
        if name not in self._scores:
            self._scores[name] = self._gates[name](self)
        return self._scores[name]

    def confidence(self, gate: str | None = None) -> Tensor:
        """Confidence in [0, 1] of a gate of this exit, ``[...]``: the sigmoid of ``score``."""
        return self.score(gate).sigmoid()


@dataclass(frozen=True)
class Work:
    """What the blocks did, counted by the blocks themselves; one entry a block.

    Attributes:
        calls: Calls of each block; a call reads the block's weights once.
        rows: Positions of each row of the batch that went through those calls.
        writes: Positions whose state was written into a block that did not run.
    """

    calls: tuple[int, ...]
    rows: tuple[int, ...]
    writes: tuple[int, ...]

    def __add__(self, other: Work) -> Work:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(tuple(map(operator.add, mine, theirs)) for mine, theirs in pairs))

    def __sub__(self, other: Work) -> Work:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(tuple(map(operator.sub, mine, theirs)) for mine, theirs in pairs))


NO_WORK = Work((), (), ())


@dataclass(frozen=True)
class BlockCost:
    """What one block costs, in counts that no run is needed for.

    Attributes:
        weights: Weights held, all experts included.
        active: Weights that one position is multiplied with.
        scores: Multiply-adds a position spends on each key it attends to.
        keys: Values kept for each position.
        window: Most positions attended to; None for all.
        write: Weights used to write a position's state without running the block.
        state: Values of recurrent state, read and written by every call; kept in float32 at least.
        scan: Multiply-adds a position spends on recurrence beside the weights.
    """

    weights: int
    active: int
    scores: int
    keys: int
    window: int | None
    write: int
    state: int = 0
    scan: int = 0


@dataclass(frozen=True)
class Step:
    """One decoded token of every row, and what it cost.

    Attributes:
        token_B: The tokens, int64.
        depth_B: Blocks the step's own positions ran through, a number a row, int64, on the CPU.
        logits_BV: The logits the tokens were drawn from.
        logits_read: (depth, positions) of each reading of logits; the top counts as depth ``total``.
        gates_read: (depth, gate) for each gate evaluation.
        work: What the blocks did for this step; debts paid on the way included.
        prefill: True for the token that the prompt's own pass gives.
        accepted: Lossless decoding: True if the token was drafted at an exit and then verified.
        rows_read: (depth, rows of the output matrix) of each exit that was read for some tokens alone.
    """

    token_B: Tensor
    depth_B: Tensor
    logits_BV: Tensor
    logits_read: tuple[tuple[int, int], ...] = ()
    gates_read: tuple[tuple[int, str], ...] = ()
    work: Work = NO_WORK
    prefill: bool = False
    accepted: bool = False
    rows_read: tuple[tuple[int, int], ...] = ()

    @property
    def depth(self) -> int:
        """The deepest row's."""
        return int(self.depth_B.max())
