"""The heads of all exits, by depth: built, read, saved. Knows no backbone and no policy.

While decoding, a recurrent gate must read every position once and in order, also those that left below it. Such
positions reach its depth later, as debts in the same chunk as newer rows; ``catch_up`` reads them first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dynamax.errors import UserError
from dynamax.heads import saved
from dynamax.heads.base import ExitHead, Gate, Lens
from dynamax.heads.exits import Exit, build_exit, check_depths, needed
from dynamax.heads.memories import Reads, RunState, alike_rows, joined, part_over, unread
from dynamax.heads.recorded import GateRecordings
from dynamax.past import KnownText, known_past
from dynamax.types import Evidence, Memory, Past, Site, Spec

LENS = "lens"
"""Stands for the lens where heads of an exit are told apart by name."""


def same_head(head: ExitHead, site: Site) -> Any:  # noqa: ANN401 - a lens or a gate, as it was given
    """A head that is built already, where a factory of heads is wanted."""
    return head


def found_in(heads: nn.Module) -> tuple[Lens, dict[str, Gate]]:
    """Lens and gates of one exit; to look them up in modules takes as long as a small product."""
    lens, gates = cast(nn.ModuleDict, heads).values()
    return cast(Lens, lens), cast(dict[str, Gate], dict(cast(nn.ModuleDict, gates).items()))


class ExitBank(nn.Module):
    """The exit heads of one backbone.

    Args:
        exits: What stands at each depth (blocks completed, from 1 to the depth of the model less 1).
        sites: The place at a depth, such as ``backbone.site``.

    Attributes:
        depths: Depths that have an exit, ascending.
        recurrent_depths: Those with a recurrent head, ascending.
        recent: Earlier tokens whose exits some gate looks at.

    Raises:
        UserError: If there is no exit, a depth is none of the model's or not a whole number (such as "2", which could
            stand beside 2), or an exit has two gates of one class.
    """

    def __init__(self, exits: Mapping[int, Exit], sites: Callable[[int], Site]) -> None:
        super().__init__()
        spec = sites(1).spec
        check_depths(exits, spec.depth)
        self._sites, self._width = sites, spec.width
        self.depths = tuple(sorted(exits))
        self.exits = nn.ModuleDict({str(depth): build_exit(exits[depth], sites(depth)) for depth in self.depths})
        self._found = {depth: found_in(self.exits[str(depth)]) for depth in self.depths}
        self._recordings = GateRecordings()
        self._recurrent: dict[int, dict[str, ExitHead]] = {
            depth: {name: head for name, head in {**gates, LENS: lens}.items() if head.recurrent}
            for depth, (lens, gates) in self._found.items()
        }
        self.recurrent_depths = tuple(depth for depth in self.depths if self._recurrent[depth])
        self._inner: frozenset[str] = frozenset()
        self.recent = max((gate.recent for depth in self.depths for gate in self.gates(depth).values()), default=0)

    def select_gates(self, names: Collection[str] | None, *, depths: Collection[int] | None = None) -> ExitBank:
        """A bank of the same heads with the named gates alone, so that other recurrent gates are not run.

        Names are those of classes; None keeps all. Gates whose scores a named one reads are kept, but a policy that
        names no gate does not mean them. With ``depths``, only the exits there are kept. A UserError if a gate is
        named that no exit has.
        """
        kept_depths = self.depths if depths is None else [depth for depth in self.depths if depth in depths]
        if names is None and len(kept_depths) == len(self.depths):
            return self
        known = sorted({name for depth in kept_depths for name in self.gates(depth)})
        for name in names or ():
            if name not in known:
                raise UserError(
                    f"The policy asks for the gate {name}, which no exit has; gates of the exits: "
                    f"{', '.join(known) or 'none'}. Name one of them in the policy (gate: NAME; for generate, "
                    f"--policy.gate NAME), or train exits with such a gate."
                )
        exits = {}
        for depth in kept_depths:
            gates = self.gates(depth)
            own = [name for name in gates if names is None or name in names]
            kept = needed({name: gate.asks for name, gate in gates.items()}, own, depth)
            heads = [partial(same_head, gates[name]) for name in kept]
            exits[depth] = Exit(partial(same_head, self.lens(depth)), heads)
        bank = ExitBank(exits, self._sites)
        bank._recordings = self._recordings
        bank._inner = self._inner if names is None else frozenset(known) - frozenset(names)
        return bank

    def lens(self, depth: int) -> Lens:
        """The lens of the exit at ``depth``."""
        return self._exit(depth)[0]

    def gates(self, depth: int) -> Mapping[str, Gate]:
        """The gates of the exit at ``depth``, by class name, in the order they were given."""
        return self._exit(depth)[1]

    def recurrent_heads(self, depth: int) -> Mapping[str, ExitHead]:
        """The recurrent heads of the exit at ``depth``, gates by class name and the lens as ``lens``."""
        return self._recurrent[depth]

    def _exit(self, depth: int) -> tuple[Lens, dict[str, Gate]]:
        if depth not in self._found:
            raise UserError(
                f"There is no exit at depth {depth}; there are exits at {', '.join(map(str, self.depths))}. "
                f"Ask for one of these, or add the exit and train it."
            )
        return self._found[depth]

    # -- reading ------------------------------------------------------------------------------------

    def evidence(
        self,
        site: Site,
        h_BTD: Tensor,
        *,
        pick: Callable[[Tensor], Tensor],
        step: int | Tensor = 0,
        trail: Sequence[Evidence] = (),
        recurrent: Mapping[str, Tensor] | None = None,
        recordings: GateRecordings | None = None,
        past: Past | None = None,
    ) -> Evidence:
        """The evidence of one exit. Nothing is computed before it is asked for.

        Args:
            site: The exit's place.
            h_BTD: States there: all of a known text, or the newest positions while decoding.
            pick: Takes the wanted ones of the ``[B, T, ...]`` positions.
            step: Tokens generated before.
            trail: Evidence of the step's earlier exits.
            recurrent: What recurrent heads make of these positions, which they have read already: scores ``s_BT`` of
                gates, ``u_BTD`` of the lens; the others read ``h_BTD`` as a whole sequence.
            recordings: Run the other gates; None runs them as they are.
            past: What was read and said before the step.
        """
        depth, known = site.depth, recurrent or {}
        lens, gates = self._exit(depth)

        def scorer(name: str, gate: Gate) -> Callable[[Evidence], Tensor]:
            if name in known:
                return lambda _: pick(known[name])
            if gate.recurrent:
                return lambda _: pick(gate.score(self.sequence(site, h_BTD, step)))
            return gate.score if recordings is None else partial(recordings.score, (depth, name), gate)

        @cache
        def translated() -> Tensor:  # read over candidates, and perhaps once more over all tokens
            return pick(known[LENS] if LENS in known else lens.translate(h_BTD, site))

        return Evidence(
            depth,
            site.spec.depth,
            step,
            pick(self._residual(h_BTD)),
            logits=lambda: lens.project(translated(), site),
            gates={name: scorer(name, gate) for name, gate in gates.items()},
            trail=trail,
            past=past,
            candidates=lambda tokens: lens.project(translated(), site, tokens),
            vocab=site.spec.vocab,
            inner=self._inner,
        )

    def _residual(self, h_BTD: Tensor) -> Tensor:
        """What gates read: the residual stream; some backbones keep more behind it."""
        return h_BTD if h_BTD.shape[-1] == self._width else h_BTD[..., : self._width]

    def sequence(self, site: Site, h_BTD: Tensor, step: int | Tensor) -> Evidence:
        """Evidence for a recurrent gate: all positions of ``h_BTD``, without a trail."""
        lens = self.lens(site.depth)

        def logits() -> Tensor:
            if lens.last_blocks or lens.recurrent:
                raise UserError(
                    f"A recurrent gate at depth {site.depth} asked for the logits of {type(lens).__name__}, which "
                    f"depend on earlier positions and are known of the newest alone. Give the exit another lens."
                )
            return lens.project(lens.translate(h_BTD, site), site)

        return Evidence(site.depth, site.spec.depth, step, self._residual(h_BTD), logits=logits)

    def known_texts(
        self,
        hidden: Mapping[int, Tensor],
        sites: Mapping[int, Site],
        counted_BT: Tensor,
        text: KnownText | None = None,
    ) -> dict[int, Evidence]:
        """Evidence of every exit, by depth, at the counted positions of known texts: for training and scoring.

        Args:
            hidden: States ``h_BTD`` of whole texts, by depth.
            sites: The places of the exits.
            counted_BT: Which positions the evidence is of; they become its leading dimension ``[N]``.
            text: What the texts are; left out, gates that read the text so far refuse.
        """
        trail: list[Evidence] = []
        pick: Callable[[Tensor], Tensor] = lambda x_BT: x_BT[counted_BT]  # noqa: E731
        given: dict[str, Any] = {"pick": pick, "trail": trail}
        if text is not None:
            # read anew: a past that holds the evidence that holds it would keep all logits for long
            alone = lambda: (self.evidence(sites[depth], hidden[depth], pick=pick) for depth in self.depths)  # noqa: E731
            given |= {"step": text.step_BT[counted_BT], "past": known_past(text, counted_BT, alone)}
        for depth in self.depths:
            trail.append(self.evidence(sites[depth], hidden[depth], **given))
        return {evidence.depth: evidence for evidence in trail}

    # -- while decoding ---------------------------------------------------------------------------

    def recordings(self) -> GateRecordings:
        """What runs the gates in a decoding run that begins now: without Python, once they are recorded."""
        self._recordings.begin({(d, name): gate for d in self.depths for name, gate in self.gates(d).items()})
        return self._recordings

    def catch_up(
        self,
        site: Site,
        h_BTD: Tensor,
        runs: Sequence[RunState],
        *,
        step: int | Tensor = 0,
        recordings: GateRecordings | None = None,
    ) -> tuple[dict[str, Tensor], list[Reads]]:
        """Let the recurrent heads of one exit read on, up to and including the caller's rows.

        Rows owed at this depth and not yet read are read first, in the same chunk. Where a rule for skipped state has
        left no debts, the heads go on without the skipped rows.

        Args:
            site: The exit's place.
            h_BTD: The newest positions that the block below has completed.
            runs: The fill levels, debts and memories of the decoding run; where each row has a run of its own, of all.
            step: Tokens generated before; a number for each row, if they differ.
            recordings: Run the gates; None runs them as they are.

        Returns:
            For each recurrent head, scores ``s_BT`` of the caller's rows, or ``u_BTD`` of a lens; and for each run,
            (depth, positions) of each reading of logits that a gate asked for.
        """
        depth, count = site.depth, h_BTD.shape[1]
        reads: list[Reads] = [()] * len(runs)
        scores: dict[str, Tensor] = {}
        if depth not in self.recurrent_depths:
            return scores, reads
        parts = [h_BTD] if len(runs) == 1 else h_BTD.split(1)
        for name, head in self.recurrent_heads(depth).items():
            memories = [self._memory(depth, name, run) for run in runs]
            chunks = [unread(depth, part, run, memory) for part, run, memory in zip(parts, runs, memories, strict=True)]
            found: list[Tensor] = [h_BTD] * len(runs)
            for alike in alike_rows(chunks, memories):
                memory = joined([memories[row] for row in alike])
                chunk_BTD = chunks[alike[0]] if len(alike) == 1 else torch.cat([chunks[row] for row in alike])
                own = step if isinstance(step, int) else step[alike]
                evidence = self.sequence(site, chunk_BTD, own)
                if isinstance(head, Lens):
                    said_BT = head.continued(chunk_BTD, site, memory)
                elif recordings is None:
                    said_BT = cast(Gate, head).score(evidence, memory)
                else:
                    said_BT = recordings.score((depth, name), cast(Gate, head), evidence, memory)
                memory.read += chunk_BTD.shape[1]
                part_over(memory, [memories[row] for row in alike])
                for row, said in zip(alike, said_BT.split(len(said_BT) // len(alike)), strict=True):
                    found[row] = said[:, -count:]
                    if evidence.logits_read:
                        reads[row] += ((depth, chunk_BTD.shape[1]),)
            scores[name] = found[0] if len(runs) == 1 else torch.cat(found)
        return scores, reads

    def advance(self, site: Site, h_BTD: Tensor, cache: RunState) -> None:
        """Let the recurrent heads of one exit read skipped positions, or those kept by a rollback, as ``h_BTD``."""
        for name, head in self.recurrent_heads(site.depth).items() if h_BTD.shape[1] else ():
            memory = self._memory(site.depth, name, cache)
            if isinstance(head, Lens):
                head.continued(h_BTD, site, memory)
            else:
                cast(Gate, head).score(self.sequence(site, h_BTD, 0), memory)
            memory.read += h_BTD.shape[1]

    def _memory(self, depth: int, name: str, run: RunState) -> Memory:
        """What a recurrent head remembers in a decoding run; empty at first."""
        return run.memories.setdefault((depth, name), Memory(pad_B=run.pad_B))

    # -- on disk ----------------------------------------------------------------------------------

    def save(self, folder: str | Path, spec: Spec, source: Mapping[str, Any] | None = None) -> None:
        """Write ``heads.safetensors`` and ``heads.json``, whole or not at all.

        Args:
            folder: Where to; made if it is missing.
            spec: The backbone the heads belong to.
            source: Where that backbone comes from, as JSON values; None if nobody knows.
        """
        saved.write(Path(folder), {**self.record(spec), "source": source}, self.state_dict())

    def record(self, spec: Spec) -> dict[str, Any]:
        """What ``save`` writes beside the weights: the backbone, and class and options of each head by depth."""
        exits = {}
        for depth in self.depths:
            heads = [self.lens(depth), *self.gates(depth).values()]
            lens, *gates = [saved.recorded(head) for head in heads]
            exits[str(depth)] = {"lens": lens, "gates": gates}
        return {"format": saved.FORMAT, "fingerprint": spec.fingerprint, "backbone": asdict(spec), "exits": exits}

    @classmethod
    def load(cls, folder: str | Path, sites: Callable[[int], Site]) -> Self:
        """The bank that ``save`` wrote, in the precision it was saved in, on the CPU.

        A UserError if the files are missing or damaged, belong to another backbone, hold NaN or infinite numbers, or
        hold a head whose class is unknown or has changed.
        """
        record, tensors = saved.read(Path(folder), sites(1).spec)
        exits = {
            int(depth): Exit(saved.factory(each["lens"]), [saved.factory(gate) for gate in each["gates"]])
            for depth, each in record["exits"].items()
        }
        bank = cls(exits, sites)
        try:
            bank.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise UserError(
                f"The heads in {folder} do not fit their classes: {error}. A class has changed since they were saved. "
                f"Train them again, or install the version that saved them."
            ) from error
        return bank
