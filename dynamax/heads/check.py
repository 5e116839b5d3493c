"""What every exit head must do, as a check that a plug-in's author can run. Needs no backbone.

The head stands on a toy site with random weights and is *stirred*: all its parameters move by noise,
since a head that starts at zero would pass anything.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax.errors import UserError
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.base import ExitHead, Gate, Lens
from dynamax.types import Evidence, Memory, Site, Spec

TOLERANCE = 1e-10
REMEDIES = {
    True: "carry over everything it needs in memory.values",
    False: "set recurrent = True and carry over what it needs in memory.values",
}
"""What to do about scores that depend on earlier positions, by whether the gate is recurrent."""


def toy_site(*, depth: int = 2, width: int = 64, vocab: int = 97, fingerprint: str = "toy") -> Site:
    """A place in a made-up backbone of four blocks, in whatever precision its input has."""
    generator = torch.Generator().manual_seed(0)
    matrix_VD = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * width**-0.5
    block_DD = torch.randn(width, width, generator=generator, dtype=torch.float64) * width**-0.5

    def project(u_BTD: Tensor, tokens_C: Tensor | None = None) -> Tensor:
        rows = matrix_VD if tokens_C is None else matrix_VD[tokens_C]
        logits = u_BTD @ rows.to(u_BTD).T
        return logits if u_BTD.dtype == torch.float64 else logits.float()

    def last_block(h_BTD: Tensor) -> Tensor:
        return h_BTD + (h_BTD @ block_DD.to(h_BTD)).tanh()

    spec = Spec("toy", 4, width, vocab, 512, fingerprint)
    return Site(depth, spec, lambda h_BTD: F.rms_norm(h_BTD, (width,)), project, last_block)


def toy_evidence(h_BTD: Tensor, *, recurrent: bool = False) -> Evidence:
    """Evidence of the second of two exits, all of it a function of ``h_BTD``; a recurrent gate has no trail."""

    def exit_at(depth: int, x_BTD: Tensor, trail: list[Evidence]) -> Evidence:
        site = toy_site(depth=depth, width=x_BTD.shape[-1])
        return Evidence(depth, 4, 3, x_BTD, logits=lambda: site.project(site.normalize(x_BTD)), trail=trail)

    return exit_at(2, h_BTD, [] if recurrent else [exit_at(1, 0.5 * h_BTD.roll(1, -1), [])])


def stir(head: ExitHead, seed: int = 0) -> None:
    """Move every parameter by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def check_head(head_class: type[ExitHead], **options: object) -> None:
    """Check a lens or a gate against the contract of its kind.

    Shapes and precision, at one position too; the input is left alone; rows do not mix; no position
    sees a later one; every parameter gets a finite gradient; a recurrent gate gives the same however
    its sequence is cut, with padding at the left or without, and keeps old memories intact; any other gate
    scores a position as if it stood alone; FLOPs and memory are told; saved and loaded it is the same head.

    Args:
        head_class: A subclass of ``Lens`` or ``Gate``.
        **options: Its options.

    Raises:
        UserError: Naming the first thing that is wrong.

    Example:
        >>> from dynamax.heads import MambaGate
        >>> check_head(MambaGate, d_state=16)
    """
    site = toy_site()
    head = head_class(site, **options)
    stir(head)
    demand(head, isinstance(head, Lens | Gate), "is neither a Lens nor a Gate; derive it from one of them")
    flops = head.flops()
    least = 1 if isinstance(head, Gate) else 0
    demand(head, type(flops) is int and flops >= least, f"flops() gave {flops!r}, not a whole number from {least} on")
    call = caller(head, site)
    check_shapes(head, call)
    check_order(head, call)
    check_gradient(head, call)
    if isinstance(head, Gate):
        check_memory(copy.deepcopy(head).double())
    check_round_trip(head, head_class, options)


def demand(head: ExitHead, holds: bool, message: str) -> None:
    """Raise unless it holds.

    Raises:
        UserError: With the message, behind the name of the class.
    """
    if not holds:
        raise UserError(f"{type(head).__name__} {message}.")


def caller(head: ExitHead, site: Site) -> Callable[[Tensor], Tensor]:
    """What the head makes of ``h_BTD`` without a memory: ``u_BTD`` of a lens, ``s_BT`` of a gate."""
    if isinstance(head, Lens):
        return lambda h_BTD: head.translate(h_BTD, site)
    gate = cast(Gate, head)
    return lambda h_BTD: gate.score(toy_evidence(h_BTD, recurrent=gate.recurrent))


def states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random hidden states, with one activation far larger than the others as models have it."""
    h_BTD = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h_BTD[..., 3] += 50.0
    return h_BTD.to(dtype)


def check_shapes(head: ExitHead, call: Callable[[Tensor], Tensor]) -> None:
    """Shape, precision, finiteness, and an input left alone."""
    for shape in ((1, 1), (2, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            h_BTD = states(*shape, dtype=dtype)
            before = h_BTD.clone()
            out = call(h_BTD)
            wanted = (shape, torch.float32) if isinstance(head, Gate) else ((*shape, 64), dtype)
            given = (tuple(out.shape), out.dtype)
            demand(head, given == wanted, f"gave {given} for an input of {(*shape, 64)} in {dtype}; wanted {wanted}")
            demand(head, bool(out.isfinite().all()), f"gave numbers that are not finite for an input in {dtype}")
            demand(head, torch.equal(h_BTD, before), "wrote into its input; make a new tensor instead")


def check_order(head: ExitHead, call: Callable[[Tensor], Tensor]) -> None:
    """Rows do not mix, and no position sees a later one."""
    h_BTD = states(2, 5)
    whole = call(h_BTD)
    same = torch.allclose(call(h_BTD[1:]), whole[1:], atol=1e-4, rtol=1e-4)
    demand(head, same, "gives a row other values beside another row; rows must not mix")
    same = torch.allclose(call(h_BTD[:, :3]), whole[:, :3], atol=1e-4, rtol=1e-4)
    demand(head, same, "gives a position other values when later positions follow; it must be causal")


def check_gradient(head: ExitHead, call: Callable[[Tensor], Tensor]) -> None:
    """Every parameter that is trained gets a gradient, and a finite one."""
    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    if not trained:
        return
    head.zero_grad()
    call(states(2, 5)).float().square().sum().backward()
    for name, parameter in trained.items():
        gradient = parameter.grad
        demand(head, gradient is not None and bool(gradient.any()), f"gives its parameter {name} no gradient")
        demand(head, gradient is not None and bool(gradient.isfinite().all()), f"has a gradient of {name} not finite")
    head.zero_grad()


@torch.no_grad()
def check_memory(gate: Gate) -> None:
    """Cut anywhere, padded or not, a sequence gives the same scores; an old memory is not changed by later reads."""
    h_BTD = states(2, 9, dtype=torch.float64)
    whole_BT = caller(gate, toy_site())(h_BTD)
    if not gate.recurrent:
        alone_BT = torch.cat([caller(gate, toy_site())(h_BTD[:, t : t + 1]) for t in range(9)], 1)
        message = "says recurrent = False, but its score of a position depends on earlier ones; "
        demand(gate, near(alone_BT, whole_BT), message + REMEDIES[False])
    for cuts in ((9,), (1,) * 9, (4, 5), (2, 6, 1)):
        same = near(continued(gate, h_BTD, cuts, Memory()), whole_BT)
        demand(
            gate, same, f"gives other scores when nine positions come in chunks of {cuts}; {REMEDIES[gate.recurrent]}"
        )
    memory = Memory()
    continued(gate, h_BTD[:, :4], (4,), memory)
    first, second = (continued(gate, h_BTD[:, 4:], (5,), memory.copy()) for _ in range(2))
    demand(gate, torch.equal(first, second), "writes into the tensors of its memory; replace them, so that copies stay")
    for length in (3, 5):
        kept, told = held(gate, h_BTD[:1, :length]), gate.state + length * gate.keys
        demand(
            gate, kept == told, f"keeps {kept} values after {length} positions and tells of {told}; set keys and state"
        )
    if gate.recurrent:
        padded_BTD = torch.cat([states(2, 3, dtype=torch.float64), h_BTD], 1)
        padded_BTD[0, 3:], pad_B = h_BTD[0], torch.tensor([3, 0])
        scores_BT = continued(gate, padded_BTD, (2, 5, 5), Memory(pad_B))
        same = near(scores_BT[:1, 3:], whole_BT[:1])
        demand(gate, same, "gives a row other scores when it is padded at the left; mask by memory.live(T)")


def near(given: Tensor, wanted: Tensor) -> bool:
    """Equal within rounding of float64."""
    return torch.allclose(given, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def continued(gate: Gate, h_BTD: Tensor, cuts: tuple[int, ...], memory: Memory) -> Tensor:
    """Scores of a sequence read in chunks."""
    parts = []
    for chunk_BTD in h_BTD.split(list(cuts), 1):
        parts.append(gate.score(toy_evidence(chunk_BTD, recurrent=gate.recurrent), memory))
        memory.read += chunk_BTD.shape[1]
    return torch.cat(parts, 1)


def held(gate: Gate, h_1TD: Tensor) -> int:
    """Values that the memory of a sequence holds; masks are not counted."""
    memory = Memory()
    continued(gate, h_1TD, (h_1TD.shape[1],), memory)
    return sum(kept.numel() for kept in memory.values.values() if kept.is_floating_point())


def check_round_trip(head: ExitHead, head_class: type[ExitHead], options: dict[str, object]) -> None:
    """Saved and loaded, the head gives the same numbers."""

    def build(site: Site) -> ExitHead:
        return head_class(site, **options)

    given = Exit(lens=cast(Callable[[Site], Lens], build)) if isinstance(head, Lens) else Exit(gates=[build])  # type: ignore[list-item]
    bank = ExitBank({2: given}, lambda depth: toy_site(depth=depth))

    def saved(bank: ExitBank) -> ExitHead:
        return bank.lens(2) if isinstance(head, Lens) else bank.gates(2)[head_class.__name__]

    stir(saved(bank), seed=1)
    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder, toy_site().spec)
        loaded = ExitBank.load(folder, lambda depth: toy_site(depth=depth))
    h_BTD = states(2, 5, dtype=torch.float64)
    before, after = (caller(saved(each.double()), toy_site())(h_BTD) for each in (bank, loaded))
    demand(
        head,
        near(before, after),
        "gives other numbers once saved and loaded; keep its state in parameters or buffers",
    )
