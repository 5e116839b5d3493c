"""Contracts for plug-in authors: run these on a class of your own before anyone else does.

Each check raises ``UserError`` naming the first thing that is wrong; none needs the network or a GPU.
A head is checked at a toy site with random weights, a policy at made-up exits in several random *worlds*.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax.backbones.check import Reference, check_backbone
from dynamax.backbones.sources import Source
from dynamax.errors import UserError, shown
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.base import ExitHead, Gate, Lens
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Evidence, Memory, Past, Site, Span, Spec

__all__ = [
    "Reference",
    "check_backbone",
    "check_head",
    "check_policy",
    "check_source",
    "stir",
    "toy_evidence",
    "toy_site",
]

WORLDS, ROWS, WIDTH, VOCAB = 6, 7, 8, 11
near = partial(torch.allclose, atol=1e-10, rtol=1e-10)
"""Equal within rounding of float64."""


@torch.no_grad()
def check_source(source: Source, *, dtype: str = "float32", blocks: int = 1) -> None:
    """Check that what heads are trained with, a source's output stage, is the top of the whole model.

    Args:
        source: The source; both are loaded.
        dtype: Type to run in.
        blocks: How many of the last blocks to run.

    Raises:
        UserError: If the two are of different models, or give different logits.
    """
    wanted_kind("check_source", source, isinstance(source, Source), "a source, such as Folder(PATH)")
    whole, top = source.load(dtype=dtype), source.output_stage(dtype=dtype, blocks=blocks)
    demand(source, whole.spec == top.spec, f"loads {whole.spec}, but its output stage is of {top.spec}")
    depth = whole.spec.depth - blocks
    tokens_BT = torch.randint(whole.spec.vocab, (2, 24), generator=torch.Generator().manual_seed(0))
    h_BTD = whole.run(whole.embed(tokens_BT), Span(0, depth)) if depth else whole.embed(tokens_BT)
    ours, theirs = top.site(depth), whole.site(depth)
    for what, got, wanted in (
        ("lens", ours.normalize(h_BTD), theirs.normalize(h_BTD)),
        ("last blocks", ours.last_blocks(h_BTD, blocks), theirs.last_blocks(h_BTD, blocks)),
    ):
        logits, known = ours.project(got), theirs.project(wanted)
        error = ((logits - known).norm() / known.norm()).item()
        message = (
            f"has another {what} at the top: its output stage gives other logits than the whole model ({error:.1e})"
        )
        demand(source, error < 1e-5, f"{message}; load both by the same rules, and keep each block's index")


def wanted_kind(check: str, given: object, holds: bool, wanted: str) -> None:
    """Refuse (UserError) what a check is not for, unless ``holds``."""
    if not holds:
        raise UserError(f"{check} was given {shown(repr(given))}; wanted: {wanted}. Pass one.")


def demand(part: object, holds: bool, message: str) -> None:
    """Raise the message, behind the name of the part's class, unless it holds."""
    if not holds:
        raise UserError(f"{type(part).__name__} {message}.")


# -- heads ------------------------------------------------------------------------------------------


def toy_site(*, depth: int = 2, width: int = 64, vocab: int = 97, fingerprint: str = "toy") -> Site:
    """A place in a made-up backbone of four blocks, in whatever precision its input has."""
    generator = torch.Generator().manual_seed(0)
    matrix_VD = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * width**-0.5
    block_DD = torch.randn(width, width, generator=generator, dtype=torch.float64) * width**-0.5

    def project(u_BTD: Tensor, tokens_C: Tensor | slice | None = None) -> Tensor:
        rows = matrix_VD if tokens_C is None else matrix_VD[tokens_C]
        logits = u_BTD @ rows.to(u_BTD).T
        return logits if u_BTD.dtype == torch.float64 else logits.float()

    def last_blocks(h_BTD: Tensor, count: int) -> Tensor:
        for _ in range(count):
            h_BTD = h_BTD + (h_BTD @ block_DD.to(h_BTD)).tanh()
        return h_BTD

    return Site(
        depth,
        Spec("toy", 4, width, vocab, 512, fingerprint),
        normalize=lambda h_BTD: F.rms_norm(h_BTD, (width,)),
        project=project,
        last_blocks=last_blocks,
    )


def toy_evidence(h_BTD: Tensor, *, recurrent: bool = False) -> Evidence:
    """Evidence of the second of two exits, all of it a function of ``h_BTD``: each position has a text of its own.

    A recurrent gate has no trail and no text.
    """
    trail: list[Evidence] = []
    texts = (h_BTD[..., :9].detach().double() * 4).round().long().remainder(5).flatten(0, -2)
    exits: Callable[[int], list[list[int]]] = lambda count: (texts[:, :count].remainder(4) + 1).tolist()  # noqa: E731
    past = None if recurrent else Past(texts.tolist, lambda steps, count: texts[:, :steps].tolist(), exits=exits)
    for depth in (2,) if recurrent else (1, 2):
        x_BTD = h_BTD if depth == 2 else 0.5 * h_BTD.roll(1, -1)
        site = toy_site(depth=depth, width=h_BTD.shape[-1])
        logits: Callable[[], Tensor] = lambda x=x_BTD, site=site: site.project(site.normalize(x))  # noqa: E731
        trail.append(Evidence(depth, 4, 3, x_BTD, logits=logits, trail=trail, past=past))
    return trail[-1]


def stir(head: nn.Module, seed: int = 0) -> None:
    """Move every parameter by noise: a head that starts at zero would pass anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def check_head(head_class: type[ExitHead], **options: object) -> None:
    """Check a lens or a gate against the contract of its kind.

    Shapes and precision, at one position too; the input is left alone; rows do not mix; no position sees a later one;
    every parameter gets a finite gradient; a recurrent head gives the same however its sequence is cut, with padding
    at the left or without, and keeps old memories intact; any other reads a position as if it were alone; FLOPs and
    memory are counted; saved and loaded it is the same head.

    Args:
        head_class: A subclass of ``Lens`` or ``Gate``.
        **options: Its options.

    Example:
        >>> from dynamax.heads import MambaGate
        >>> check_head(MambaGate, d_state=16)
    """
    holds = isinstance(head_class, type) and issubclass(head_class, Lens | Gate)
    wanted_kind("check_head", head_class, holds, "a class that is derived from Lens or Gate")
    site = toy_site()
    head = head_class(site, **options)
    stir(head)
    flops, least = head.flops(), 1 if isinstance(head, Gate) else 0
    demand(head, type(flops) is int and flops >= least, f"flops() gave {flops!r}, not a whole number from {least} on")
    _check_values(head)
    _check_memory(copy.deepcopy(head).double())

    factory: Any = partial(head_class, **options)
    bank = ExitBank({2: Exit(factory) if isinstance(head, Lens) else Exit(gates=[factory])}, lambda _: site)
    stir(bank, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder, site.spec)
        loaded = ExitBank.load(folder, lambda _: site)
    before, after = (
        _output(each.lens(2) if isinstance(head, Lens) else each.gates(2)[head_class.__name__], _states(2, 5).double())
        for each in (bank.double(), loaded.double())
    )
    demand(
        head, near(before, after), "gives other numbers once saved and loaded; keep its state in parameters or buffers"
    )


def _output(head: ExitHead, h_BTD: Tensor) -> Tensor:
    """What the head makes of ``h_BTD`` without a memory: ``u_BTD`` of a lens, ``s_BT`` of a gate."""
    if isinstance(head, Lens):
        return head.translate(h_BTD, toy_site())
    gate = cast(Gate, head)
    return gate.score(toy_evidence(h_BTD, recurrent=gate.recurrent))


def _states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random hidden states, with one activation far larger than the others as models have it."""
    h_BTD = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h_BTD[..., 3] += 50.0
    return h_BTD.to(dtype)


def _check_values(head: ExitHead) -> None:
    """Shape, precision, finiteness, an input left alone; rows and later positions left out; gradients."""
    for shape in ((1, 1), (2, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            h_BTD = _states(*shape, dtype=dtype)
            before = h_BTD.clone()
            out = _output(head, h_BTD)
            wanted = (shape, torch.float32) if isinstance(head, Gate) else ((*shape, 64), dtype)
            given = (tuple(out.shape), out.dtype)
            demand(head, given == wanted, f"gave {given} for an input of {(*shape, 64)} in {dtype}; wanted {wanted}")
            demand(head, bool(out.isfinite().all()), f"gave numbers that are not finite for an input in {dtype}")
            demand(head, torch.equal(h_BTD, before), "wrote into its input; make a new tensor instead")

    h_BTD = _states(2, 5)
    whole = _output(head, h_BTD)
    same = torch.allclose(_output(head, h_BTD[1:]), whole[1:], atol=1e-4, rtol=1e-4)
    demand(head, same, "gives a row other values beside another row; rows must not mix")
    same = torch.allclose(_output(head, h_BTD[:, :3]), whole[:, :3], atol=1e-4, rtol=1e-4)
    demand(head, same, "gives a position other values when later positions follow; it must be causal")

    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    head.zero_grad()
    if trained:
        out = _output(head, h_BTD)
        out = head.project(out, toy_site()) if isinstance(head, Lens) else out  # some have a matrix of their own
        out.float().square().sum().backward()
    for name, parameter in trained.items():
        gradient = parameter.grad
        demand(head, gradient is not None and bool(gradient.any()), f"gives its parameter {name} no gradient")
        demand(head, gradient is not None and bool(gradient.isfinite().all()), f"has a gradient of {name} not finite")
    head.zero_grad()


@torch.no_grad()
def _check_memory(head: ExitHead) -> None:
    """Cut anywhere, padded or not, a sequence gives the same; an old memory is not changed by later reads."""
    h_BTD = _states(2, 9, dtype=torch.float64)
    whole = _output(head, h_BTD)
    remedy = "carry over everything it needs in memory.values"
    if not head.recurrent:
        remedy = "set recurrent = True and carry over what it needs in memory.values"
        alone = torch.cat([_output(head, h_BTD[:, t : t + 1]) for t in range(9)], 1)
        said = "says recurrent = False, but what it makes of a position depends on earlier ones"
        demand(head, near(alone, whole), f"{said}; {remedy}")
        if isinstance(head, Lens):
            return  # it has no memory
    for cuts in ((9,), (1,) * 9, (4, 5), (2, 6, 1)):
        same = near(_continued(head, h_BTD, cuts, Memory()), whole)
        demand(head, same, f"gives other numbers when nine positions come in chunks of {cuts}; {remedy}")
    memory = Memory()
    _continued(head, h_BTD[:, :4], (4,), memory)
    first, second = (_continued(head, h_BTD[:, 4:], (5,), memory.copy()) for _ in range(2))
    demand(head, torch.equal(first, second), "writes into the tensors of its memory; replace them, so that copies stay")
    for length in (3, 5):
        memory = Memory()
        _continued(head, h_BTD[:1, :length], (length,), memory)
        kept = sum(each.numel() for each in memory.values.values() if each.is_floating_point())  # masks do not count
        stated = head.state + length * head.keys
        message = f"keeps {kept} values after {length} positions, but states {stated}; set keys and state"
        demand(head, kept == stated, message)
    if head.recurrent:
        padded_BTD = torch.cat([_states(2, 3, dtype=torch.float64), h_BTD], 1)
        padded_BTD[0, 3:], pad_B = h_BTD[0], torch.tensor([3, 0])
        found = _continued(head, padded_BTD, (2, 5, 5), Memory(pad_B))
        same = near(found[:1, 3:], whole[:1])
        demand(head, same, "gives a row other numbers when it is padded at the left; mask by memory.live(T)")


def _continued(head: ExitHead, h_BTD: Tensor, cuts: tuple[int, ...], memory: Memory) -> Tensor:
    """What a head makes of a sequence read in chunks."""
    parts = []
    for chunk_BTD in h_BTD.split(list(cuts), 1):
        if isinstance(head, Lens):
            parts.append(head.continued(chunk_BTD, toy_site(), memory))
        else:
            parts.append(cast(Gate, head).score(toy_evidence(chunk_BTD, recurrent=head.recurrent), memory))
        memory.read += chunk_BTD.shape[1]
    return torch.cat(parts, 1)


# -- policies ---------------------------------------------------------------------------------------

World = tuple[Tensor, Tensor, Tensor, Tensor]
"""What one step shows at its exits: ``hidden_EBD``, ``logits_EBV``, a gate's ``score_EB``; ``text_1BT``."""


def check_policy(
    policy: TerminationPolicy,
    *,
    thresholds: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    depths: Sequence[int] = (2, 4, 6),
    gate: str = "LinearGate",
) -> None:
    """Check a policy against the contract.

    It answers one bool a row; asked again it answers the same; rows do not mix; a greater threshold leaves
    nowhere that a smaller one would not, and ``at`` changes no policy but the new one; it asks no gate that its
    ``gates`` do not name; logits are read only by a policy whose answers depend on them.

    Args:
        policy: The policy, at a threshold at which it sometimes leaves and sometimes stays.
        thresholds: Thresholds to sweep it over, ascending; not used where the policy has none.
        depths: Depths of the made-up exits.
        gate: Class name of their gate.

    Example:
        >>> from dynamax.policies import MaxProb
        >>> check_policy(MaxProb(0.5))
    """
    wanted_kind("check_policy", policy, isinstance(policy, TerminationPolicy), "a policy, such as MaxProb(0.5)")
    worlds = [_world(len(depths), seed) for seed in range(WORLDS)]
    policy.validate(depths)
    read = False
    for world in worlds:
        seen = _exits(world, depths, gate)
        for evidence in seen:
            _check_answer(policy, evidence)
        read = read or any(evidence.logits_read for evidence in seen)
        whole_EB = _answers(policy, world, depths, gate)
        for row in range(ROWS):
            alone_EB = _answers(policy, cast(World, tuple(each[:, row : row + 1] for each in world)), depths, gate)
            same = torch.equal(alone_EB[:, 0], whole_EB[:, row])
            demand(policy, same, "answers otherwise for a row that stands alone; rows must not mix")
        if policy.threshold is None:
            continue
        swept = [_answers(policy.at(threshold), world, depths, gate) for threshold in thresholds]
        for index in range(1, len(swept)):
            nested = not (swept[index] & ~swept[index - 1]).any()
            lower, upper = thresholds[index - 1], thresholds[index]
            demand(policy, nested, f"leaves at threshold {upper} where it stays at {lower}; greater must mean surer")
        same = torch.equal(_answers(policy, world, depths, gate), whole_EB)
        demand(policy, same, "was changed by at(); it must return a copy")
    for hidden, _, scores, text in worlds if read else ():
        others = [_answers(policy, (hidden, logits, scores, text), depths, gate) for _, logits, _, _ in worlds]
        if not all(torch.equal(other_EB, others[0]) for other_EB in others):
            return
    message = "reads logits, which cost the output matrix, but its answers never depend on them; do not touch them"
    demand(policy, not read, message)


def _world(exits: int, seed: int) -> World:
    """A random world: lenses from nearly uniform to certain; in those of odd seed the exits agree on the token."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    hidden_EBD = normal(1, ROWS, WIDTH) + normal(exits, ROWS, 1).abs() * normal(exits, ROWS, WIDTH)
    logits_EBV = normal(1 if seed % 2 else exits, ROWS, VOCAB).expand(exits, -1, -1)
    logits_EBV = logits_EBV * normal(exits, ROWS, 1).mul(2).exp()
    text_1BT = normal(1, ROWS, 9).mul(VOCAB).long() % VOCAB
    return hidden_EBD, logits_EBV, normal(exits, ROWS).mul(3), text_1BT


def _exits(world: World, depths: Sequence[int], gate: str) -> list[Evidence]:
    """Evidence of the exits, shallowest first, each with the earlier ones in its trail, and a past."""
    *exits, text_1BT = world
    texts, total = text_1BT[0].tolist(), depths[-1] + 1
    past = Past(
        lambda: texts,
        lambda steps, count: [text[: steps * count] for text in texts],
        blocks=lambda: [[1 + token % total for token in text] for text in texts],
        seconds=lambda: [[0.001 * (1 + token % total) for token in text] for text in texts],
        top=lambda: world[1][-1].argmax(-1),
    )
    seen: list[Evidence] = []
    for hidden_BD, logits_BV, s_B, depth in zip(*exits, depths, strict=True):
        logits: Callable[[], Tensor] = lambda logits_BV=logits_BV: logits_BV  # noqa: E731 - bound now
        gates: dict[str, Callable[[Evidence], Tensor]] = {gate: lambda _, s_B=s_B: s_B}
        seen.append(Evidence(depth, total, 3, hidden_BD, logits=logits, gates=gates, trail=seen, past=past))
    return seen


def _answers(policy: TerminationPolicy, world: World, depths: Sequence[int], gate: str) -> Tensor:
    """What the policy says at each exit, ``leave_EB``."""
    return torch.stack([policy(evidence) for evidence in _exits(world, depths, gate)])


def _check_answer(policy: TerminationPolicy, evidence: Evidence) -> None:
    """One bool a row, the same when asked again; no gate but those named."""
    leave_B = policy(evidence)
    given = (tuple(leave_B.shape), leave_B.dtype)
    demand(policy, given == ((ROWS,), torch.bool), f"answered {given} for {ROWS} rows; wanted one bool a row")
    kept_B = leave_B.clone()
    again_B = policy(evidence)
    demand(policy, torch.equal(again_B, kept_B), "answers otherwise when asked again; keep nothing between calls")
    named = policy.gates is None or set(evidence.gates_read) <= set(policy.gates)
    demand(policy, named, f"asks {evidence.gates_read}, which its gates {policy.gates} do not name; name them there")
    demand(policy, torch.equal(leave_B, kept_B), "wrote into an answer it had given; make a new tensor instead")
