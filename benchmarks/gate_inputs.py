"""Which information helps a gate: AUROC of each exit for each set of inputs, and what asking costs.

    python -m benchmarks.gate_inputs --model FOLDER
                                     (--store FOLDER [--seen 0.75] | --states FILE [--skip 0] | --exits 2 4 6)
                                     [--documents 480] [--seeds 3] [--epochs 10] [--out FILE]

``--model`` is a folder of heads, or of a model whose exits are then logit lenses. Documents come from a store, from
states that ``benchmarks.readers`` has kept (``STATES/train``), or are written by the model. Those are left out that the
lenses were trained on. Of a store: the share ``--seen`` of the prompts that are not for validation, as ``fit`` takes
them. Of states: all documents with a prompt of the first ``--skip`` positions. Each seed splits the documents that are
left by their prompts: a third for testing, and of the others a sixth says when training stops. Every input is read
once, by ``dynamax.heads.inputs`` itself, and kept in memory; gates are those of the package.

Cost is the weights read to ask the gate at one exit: its own; of the lens and the output matrix where an input reads
logits, or of the candidates' rows; those of another gate. The trail counts this exit alone.

All sets of inputs are read by an ``MLPGate`` of 64 units. Memory: ``MambaGate`` beside the same gate that reads every
position as a sequence of its own (in training too), and beside an ``FFNGate`` of as many parameters.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.classification import binary_auroc

from benchmarks.readers import kept
from dynamax.data.batch import collate
from dynamax.data.generated import SelfGenerated
from dynamax.data.states import StateReader
from dynamax.data.store import Store, StoredDocument
from dynamax.data.text import held_out
from dynamax.engine import Engine, load
from dynamax.heads import (
    AttentionGate,
    CandidateStatistics,
    Exit,
    FFNGate,
    Gate,
    GateInput,
    HiddenState,
    LensStatistics,
    LinearGate,
    MambaGate,
    MLPGate,
    NgramAgreement,
    PastExits,
    Position,
    TrailStatistics,
)
from dynamax.metrics.environment import environment
from dynamax.modules.phases import PARTS as PARTS_OF_PROMPTS
from dynamax.objectives.base import counted
from dynamax.types import Evidence, Site

PARTS: dict[str, GateInput] = {
    "lens": LensStatistics(),
    "candidates": CandidateStatistics(),
    "trail": TrailStatistics(),
    "n-gram": NgramAgreement(),
    "position": Position(),
    "past exits": PastExits(),
}
LOGITS = ("lens", "trail", "n-gram")
"""Inputs that read the output matrix."""
CHEAP = ("hidden", "candidates", "position")
ALL = ("hidden", "lens", "candidates", "trail", "n-gram", "position")
SETS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden",),
    **{name: (name,) for name in PARTS},
    **{f"hidden + {name}": ("hidden", name) for name in PARTS},
    "all": ALL,
    "all but the hidden state": tuple(name for name in ALL if name != "hidden"),
    "all but the lens": tuple(name for name in ALL if name != "lens"),
    "all that read no logits": CHEAP,
    "hidden + MambaGate": ("hidden", "MambaGate"),
    "all that read no logits + MambaGate": (*CHEAP, "MambaGate"),
    "all + MambaGate": (*ALL, "MambaGate"),
}
"""Past exits along a known text are those of a perfect policy, which decoding does not have: they stand in no sum."""
CUT = "MambaGate, memory cut"
ROWS = 256
"""Positions of a training step."""
PATIENCE = 4
"""Epochs without a better loss after which training stops."""
FASTER = 4
"""Epochs of a gate that judges positions alone, for each of a recurrent one: its epochs are shorter."""


class Known(GateInput):
    """Numbers that were read before: the evidence holds them, and those of other inputs, in the place of the state."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def width(self, site: Site) -> int:
        """As many as there are."""
        return self.count

    def read(self, evidence: Evidence, dtype: torch.dtype) -> Tensor:
        """Its part of the numbers."""
        return evidence.hidden[..., self.first : self.first + self.count]


@dataclass
class Document:
    """What one document shows at one exit.

    Attributes:
        origin: Hash of its prompt.
        hidden_TD: States of all positions.
        counted_T: Positions that count: those a decoder would ask about.
        numbers: What each input gives at these, ``[N, F]``.
        right_N: Whether the lens says the full model's token there.
        rows: Rows of the output matrix that the candidates take, on average.
    """

    origin: int
    hidden_TD: Tensor
    counted_T: Tensor
    numbers: dict[str, Tensor]
    right_N: Tensor
    rows: float


@torch.inference_mode()
def read(engine: Engine, documents: Iterable[StoredDocument]) -> dict[int, list[Document]]:
    """All inputs at all exits."""
    bank = engine.exits
    assert bank is not None, "a model with exits"
    sites = {depth: engine.backbone.site(depth) for depth in bank.depths}
    found: dict[int, list[Document]] = {depth: [] for depth in bank.depths}
    for number, stored in enumerate(documents):
        batch = collate([stored], [number])
        counted_1T = counted(batch)
        counted_1T = counted_1T & (counted_1T.cumsum(1) > 1)  # the prompt's last position is decided at the top
        if not counted_1T.any():
            continue
        top_N = batch.top_tokens_BTK[counted_1T][:, 0]
        texts = [stored.tokens_T[: int(place) + 1].tolist() for place in counted_1T[0].nonzero()]
        for depth, evidence in bank.known_texts(batch.hidden, sites, counted_1T, batch.text).items():
            numbers = {name: part.read(evidence, torch.float32).float() for name, part in PARTS.items()}
            numbers["hidden"] = HiddenState().read(evidence, torch.float32)
            rows = sum(len(set(text)) for text in texts) / len(texts)  # fewer than the most that are taken
            one = Document(
                stored.origin, batch.hidden[depth][0].half(), counted_1T[0], numbers, evidence.token == top_N, rows
            )
            found[depth].append(one)
    return found


def split(documents: Sequence[Document], seed: int) -> tuple[list[Document], list[Document], list[Document]]:
    """Documents for training, for stopping and for testing; a prompt's documents stay together."""
    origins = sorted({document.origin for document in documents})
    order = torch.randperm(len(origins), generator=torch.Generator().manual_seed(seed)).tolist()
    place = {origins[index]: rank / len(origins) for rank, index in enumerate(order)}
    parts: tuple[list[Document], ...] = ([], [], [])
    for document in documents:
        at = place[document.origin]
        parts[2 if at < 1 / 3 else 1 if at < 4 / 9 else 0].append(document)
    return parts


Batch = tuple[Evidence, Tensor, Tensor]
"""Evidence; which of its positions count; whether the lens is right there."""


def flat(documents: Sequence[Document], names: Sequence[str], site: Site, rows: int | None = None) -> list[Batch]:
    """Positions on their own, in an order of chance; all together if ``rows`` is None."""
    numbers_NF = torch.cat([torch.cat([each.numbers[name] for name in names], -1) for each in documents])
    right_N = torch.cat([each.right_N for each in documents])
    order = torch.arange(len(right_N)) if rows is None else torch.randperm(len(right_N))
    parts = [order] if rows is None else list(order.split(rows))
    return [(known(numbers_NF[part], site), torch.ones(len(part), dtype=torch.bool), right_N[part]) for part in parts]


def sequences(documents: Sequence[Document], site: Site, rows: int | None = None) -> list[Batch]:
    """Whole documents, some side by side; in order of length if ``rows`` is None."""
    order = torch.randperm(len(documents)).tolist() if rows is not None else range(len(documents))
    chosen = [documents[index] for index in order]
    found = []
    for start in range(0, len(chosen), 4):
        some = chosen[start : start + 4]
        hidden_BTD = pad_sequence([each.hidden_TD for each in some], batch_first=True).float()
        counted_BT = pad_sequence([each.counted_T for each in some], batch_first=True)
        found.append((known(hidden_BTD, site), counted_BT, torch.cat([each.right_N for each in some])))
    return found


def known(numbers: Tensor, site: Site) -> Evidence:
    """Evidence that holds numbers in the place of the hidden state."""
    return Evidence(site.depth, site.spec.depth, 0, numbers, logits=lambda: numbers)


@torch.no_grad()
def said(gate: Gate, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Scores and labels."""
    scores = torch.cat([gate.score(evidence)[counts] for evidence, counts, _ in batches])
    return scores, torch.cat([right for *_, right in batches])


def trained(gate: Gate, parts: Sequence[Sequence[Document]], batches: Any, epochs: int, rate: float) -> float:  # noqa: ANN401 - a function
    """Train a gate, keep the weights of the best epoch on the documents for stopping; AUROC on those for testing."""
    optimizer = torch.optim.AdamW(gate.parameters(), lr=rate, weight_decay=0.01)
    best, kept, since = float("inf"), copy.deepcopy(gate.state_dict()), 0
    for _ in range(epochs):
        for evidence, counts, right_N in batches(parts[0], ROWS):
            loss = F.binary_cross_entropy_with_logits(gate.score(evidence)[counts], right_N.float())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
            optimizer.step()
        scores_N, right_N = said(gate, batches(parts[1], None))
        loss = float(F.binary_cross_entropy_with_logits(scores_N, right_N.float()))
        if loss < best:
            best, kept, since = loss, copy.deepcopy(gate.state_dict()), 0
        else:
            since += 1
        if since == PATIENCE:
            break
    gate.load_state_dict(kept)
    scores_N, right_N = said(gate, batches(parts[2], None))
    return float(binary_auroc(scores_N, right_N.long()))


def held(module: nn.Module) -> int:
    """Weights of a head."""
    return sum(parameter.numel() for parameter in module.parameters())


def measured(engine: Engine, depth: int, documents: Sequence[Document], seed: int, epochs: int) -> dict[str, Any]:
    """AUROC and cost of every gate at one exit, for one seed."""
    torch.manual_seed(seed)
    bank, site = engine.exits, engine.backbone.site(depth)
    assert bank is not None, "a model with exits"
    parts = split(documents, seed)
    lens, width = held(bank.lens(depth)), site.spec.width
    rows = sum(each.rows for each in documents) / len(documents)
    found: dict[str, Any] = {}

    def note(name: str, gate: Gate, batches: Any, rate: float, more: int = 0) -> None:  # noqa: ANN401 - a function
        whole = isinstance(gate, MambaGate | AttentionGate) and name != CUT
        auroc = trained(gate, parts, batches, epochs if whole else FASTER * epochs, rate)
        found[name] = {"auroc": auroc, "weights": held(gate) + more}

    def over(names: Sequence[str]) -> Any:  # noqa: ANN401 - a function
        return lambda part, rows: flat(part, names, site, rows)

    mamba = MambaGate(site)
    note("MambaGate", mamba, lambda part, rows: sequences(part, site, rows), 1e-3)
    for part in parts:
        for one in part:
            scores_N, _ = said(mamba, sequences([one], site))
            one.numbers["MambaGate"] = scores_N[:, None]
    note("AttentionGate", AttentionGate(site), lambda part, rows: sequences(part, site, rows), 1e-3)
    cut = MambaGate(site)
    note(
        CUT,
        cut,
        lambda part, rows: [
            (known(evidence.hidden[:, None], site), counts[:, None], right)
            for evidence, counts, right in flat(part, ["hidden"], site, rows)
        ],
        1e-3,
    )
    equal = max(1, held(mamba) // (2 * width + 1))
    note("FFNGate of as many weights", FFNGate(site, hidden=equal), over(["hidden"]), 1e-3)
    note("LinearGate", LinearGate(site), over(["hidden"]), 2e-3)
    for name, names in SETS.items():
        stops = list(accumulate(documents[0].numbers[each].shape[-1] for each in names))
        told = [Known(first, stop - first) for first, stop in pairwise([0, *stops])]
        more = 0
        if set(names) & set(LOGITS):
            more += lens + site.spec.vocab * width
        elif "candidates" in names:
            more += lens + round(rows) * width
        more += held(mamba) if "MambaGate" in names else 0
        note(name, MLPGate(site, inputs=told), over(names), 2e-3, more)
    return found


def documents_of(args: argparse.Namespace) -> tuple[Engine, list[StoredDocument]]:
    """The model, and documents that its lenses never saw."""
    if args.states is not None:
        engine = load(args.model, device="cpu")
        assert engine.exits is not None, "a model with exits"
        written = kept(args.states, engine.exits.depths).documents()
        stops = list(accumulate(len(each.tokens_T) for each in written))
        seen = {each.origin for each, stop in zip(written, stops, strict=True) if stop <= args.skip}
        unseen = [each for each in written if each.origin not in seen]
        order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))[: args.documents]
        return engine, [unseen[number] for number in order.tolist()]
    if args.store is None:
        engine = load(args.model, exits={depth: Exit() for depth in args.exits}, device="cpu")
        assert engine.exits is not None
        source = SelfGenerated(documents=args.documents, max_new_tokens=64, chat=False, batch=40)
        reader = StateReader(engine.backbone, engine.exits.depths, k=1, dtype="float32")
        return engine, [each for group in source.groups(engine) for each in reader.read(group)]
    engine, store = load(args.model, device="cpu"), Store(args.store)
    origins_N = store.origins()
    seen_N = ~held_out(origins_N, 0.1) & (origins_N % PARTS_OF_PROMPTS < args.seen * PARTS_OF_PROMPTS)
    unseen_M = (~seen_N).nonzero()[:, 0]
    order_M = torch.randperm(len(unseen_M), generator=torch.Generator().manual_seed(0))[: args.documents]
    return engine, [store.read(number) for number in unseen_M[order_M].tolist()]


def main() -> None:
    """Read, train, print the table, write one JSON file after each exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--store", type=Path, default=None)
    parser.add_argument("--states", type=Path, default=None)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--exits", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--seen", type=float, default=0.75)
    parser.add_argument("--out", type=Path, default=None)
    for name, value in {"documents": 480, "seeds": 3, "epochs": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    began = time.perf_counter()
    engine, stored = documents_of(args)
    documents = read(engine, stored)
    print(f"read {len(stored)} documents in {time.perf_counter() - began:.0f} s", flush=True)
    spec = engine.backbone.spec
    report: dict[str, Any] = {
        "environment": environment("cpu", dtype="float32", batch=1),
        "options": {name: getattr(args, name) for name in ("documents", "seeds", "epochs", "seen", "skip")},
        "model": spec.family,
        "block": engine.backbone.block_cost(0).active,
        "matrix": spec.vocab * spec.width,
        "documents": len(stored),
        "positions": sum(len(each.right_N) for each in next(iter(documents.values()))),
        "agreement": {
            str(depth): float(torch.cat([each.right_N for each in some]).float().mean())
            for depth, some in documents.items()
        },
        "seeds": [],
    }
    for seed in range(args.seeds):
        report["seeds"].append({})
        for depth, some in documents.items():
            report["seeds"][seed][str(depth)] = measured(engine, depth, some, seed, args.epochs)
            print(f"seed {seed}, depth {depth}: {time.perf_counter() - began:.0f} s", flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(table(report), flush=True)


def table(report: dict[str, Any]) -> str:
    """A row a gate: mean AUROC over seeds and half the range, by exit; weights in millions and in blocks."""
    depths = list(report["seeds"][0])
    lines = [f"{'':40}" + "".join(f"{depth:>13}" for depth in depths) + f"{'mean':>8}{'weights':>10}{'blocks':>8}"]
    for name in report["seeds"][0][depths[0]]:
        cells, all_of = [], []
        for depth in depths:
            values = [seed[depth][name]["auroc"] for seed in report["seeds"]]
            all_of += values
            cells.append(f"{sum(values) / len(values):>8.3f} ±{(max(values) - min(values)) / 2:.3f}"[:14].rjust(13))
        weights = sum(report["seeds"][0][depth][name]["weights"] for depth in depths) / len(depths)
        mean = sum(all_of) / len(all_of)
        lines.append(f"{name:40}{''.join(cells)}{mean:>8.3f}{weights / 1e6:>9.3f}M{weights / report['block']:>8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
