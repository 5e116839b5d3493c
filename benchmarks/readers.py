"""How often each kind of reader is right at an exit, against how many positions it was fitted on.

    python -m benchmarks.readers --train FOLDER [FOLDER ...] --held FOLDER [FOLDER ...] --states FOLDER
                                 [--model SmolLM2] [--exits 15,19,23,27] [--sizes 2500,10000,40000,80000]
                                 [--readers ...] [--steps 300] [--save FOLDER] [--out FILE]

Folders hold pieces of text as ``dynamax cache`` and ``dynamax tune`` write them (``WrittenText``); states at the exits,
at the inputs of the late blocks and at the top are computed once and kept in ``--states`` as float16.

``ridge``: a TunedLens in closed form. ``bridge-K ridge``: a BridgeLens over the last K blocks, its map in closed form.
The others are distilled to the top (``LensDistillation``), for as many steps whatever the size: from the closed form
(``trained``; ``trained longer``: four times the steps), or lenses from zero. Readers and sizes that ``--out`` holds are
not fitted again.

Right: the share of held-out positions whose most likely token is the top's. The fit
``right = a - b * positions ** -c`` says what more positions would give.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import curve_fit
from torch import Tensor

from dynamax.data.batch import HiddenBatch, collate
from dynamax.data.store import StoredDocument
from dynamax.engine import Engine, find_source, load
from dynamax.heads import (
    AttentionLens,
    BridgeLens,
    Exit,
    ExitBank,
    Lens,
    LowRankLens,
    MambaLens,
    MLPLens,
    TunedLens,
)
from dynamax.metrics.environment import environment
from dynamax.objectives import LensDistillation
from dynamax.objectives.ridge import RidgeLens

LABELS = 8
"""Most likely tokens of the top that are kept of each position."""

PENALTY = 0.01
LATE = (1, 3)
"""How many of the last blocks bridges run."""


@dataclass
class States:
    """Documents one behind the other.

    Attributes:
        hidden: Residual stream by depth, ``h_ND``, float16.
        tokens: Token ids.
        top_tokens: The top's most likely next tokens, surest first, ``[N, K]``.
        top_probs: Their probabilities.
        lengths: Tokens of each document.
        prompts: Prompt tokens of each document.
    """

    hidden: dict[int, np.ndarray]
    tokens: np.ndarray
    top_tokens: np.ndarray
    top_probs: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray

    def documents(self, most: int | None = None) -> list[StoredDocument]:
        """The first documents, about ``most`` positions of them; all if None."""
        stops = self.lengths.cumsum()
        count = len(stops) if most is None else int(np.searchsorted(stops, most)) + 1
        found = []
        for stop, length, prompt in zip(stops[:count], self.lengths, self.prompts, strict=False):
            part = slice(stop - length, stop)
            found.append(
                StoredDocument(
                    torch.from_numpy(self.tokens[part].astype(np.int32)),
                    int(prompt),
                    zlib.crc32(self.tokens[stop - length : stop - length + prompt].tobytes()),
                    {depth: torch.from_numpy(np.array(h_ND[part])) for depth, h_ND in self.hidden.items()},
                    torch.from_numpy(self.top_tokens[part].astype(np.int32)),
                    torch.from_numpy(self.top_probs[part].astype(np.float32)),
                    torch.zeros(int(length)),  # the objective reads no logsumexp
                )
            )
        return found


def pieces(folders: Sequence[Path]) -> Iterator[tuple[np.ndarray, int]]:
    """Token ids and prompt length of each written document; folders take turns, a piece each."""
    files = sorted((file for folder in folders for file in folder.glob("piece-*.npz")), key=lambda file: file.name)
    for file in files:
        with np.load(file) as held:
            parts = np.split(held["tokens"].astype(np.int64), held["stops"][:-1])
            yield from zip(parts, held["prompts"].tolist(), strict=True)


@torch.inference_mode()
def read(engine: Engine, folders: Sequence[Path], depths: Sequence[int], file: Path, most: int) -> States:
    """States of all documents of some folders, up to about ``most`` positions: computed once, then from the file."""
    names = {depth: file.with_name(f"{file.name}-{depth}.npy") for depth in depths}
    notes = file.with_name(f"{file.name}.npz")
    if not notes.is_file():
        hidden: dict[int, list[np.ndarray]] = {depth: [] for depth in depths}
        columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        prompts: list[int] = []
        for tokens, prompt in pieces(folders):
            h_1TD = engine.backbone.embed(torch.from_numpy(tokens)[None])
            for depth, h_1TD in engine.backbone.walk(h_1TD, depths):  # noqa: B020 - the last is the top's
                hidden[depth].append(h_1TD[0].half().numpy())
            prob_TK, token_TK = engine.backbone.unembed(h_1TD)[0].softmax(-1).topk(LABELS)
            columns.append((tokens, token_TK.numpy(), prob_TK.half().numpy()))
            prompts.append(prompt)
            if sum(len(each[0]) for each in columns) >= most:
                break
        file.parent.mkdir(parents=True, exist_ok=True)
        for depth, name in names.items():
            np.save(name, np.concatenate(hidden[depth]))
        tokens, top_tokens, top_probs = (np.concatenate(column) for column in zip(*columns, strict=True))
        lengths = [len(each[0]) for each in columns]
        np.savez(
            notes, tokens=tokens, top_tokens=top_tokens, top_probs=top_probs, lengths=lengths, prompts=np.array(prompts)
        )
    return kept(file, depths)


def kept(file: Path, depths: Sequence[int]) -> States:
    """States that ``read`` has kept."""
    hidden = {depth: np.load(file.with_name(f"{file.name}-{depth}.npy"), mmap_mode="r") for depth in depths}
    with np.load(file.with_name(f"{file.name}.npz")) as held:
        return States(hidden, **held)


def ridge(engine: Engine, documents: Sequence[StoredDocument], depth: int, blocks: int) -> tuple[Tensor, Tensor]:
    """The map in closed form of a TunedLens (no blocks), or of a BridgeLens: weight and bias as a layer has them."""
    backbone, total = engine.backbone, engine.backbone.spec.depth
    lens = RidgeLens(backbone.spec.width, PENALTY)
    for document in documents:
        here_TD, late_TD = document.hidden[depth].float(), document.hidden[total - blocks].float()
        u_TD = backbone.normalize(here_TD)
        lens.add(u_TD, u_TD + (backbone.normalize(late_TD) - u_TD if blocks == 0 else late_TD - here_TD))
    a_DD, b_D = lens.solve()
    return a_DD.T.float(), b_D.float()


def started(lens: Lens, found: tuple[Tensor, Tensor]) -> None:
    """Put a map in closed form into a TunedLens or a BridgeLens."""
    assert isinstance(lens, TunedLens | BridgeLens)
    with torch.no_grad():
        lens.shift.weight.copy_(found[0])
        lens.shift.bias.copy_(found[1])


def batches(documents: Sequence[StoredDocument], rows: int, seed: int) -> Iterator[HiddenBatch]:
    """Documents of similar length side by side, in random order, without end."""
    order = sorted(range(len(documents)), key=lambda index: len(documents[index].tokens_T))
    groups = [order[start : start + rows] for start in range(0, len(order), rows)]
    generator = np.random.default_rng(seed)
    while True:
        for place in generator.permutation(len(groups)):
            yield collate([documents[index] for index in groups[place]], groups[place])


def trained(bank: ExitBank, engine: Engine, documents: Sequence[StoredDocument], steps: int, rate: float) -> None:
    """Distil all lenses of a bank to the top."""
    sites = {depth: engine.backbone.site(depth) for depth in bank.depths}
    objective, weights = LensDistillation(), list(bank.parameters())
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.05)
    given = batches(documents, 8, seed=0)
    for _ in range(steps):
        loss, _ = objective.loss(bank, next(given), sites)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()


@torch.inference_mode()
def right(bank: ExitBank, engine: Engine, documents: Sequence[StoredDocument]) -> dict[int, float]:
    """Share of answer positions at which each lens says what the top says."""
    same: dict[int, list[Tensor]] = {depth: [] for depth in bank.depths}
    for document in documents:
        from_answer = slice(max(0, document.prompt - 1), -1)
        for depth in bank.depths:
            site = engine.backbone.site(depth)
            u_1TD = bank.lens(depth).translate(document.hidden[depth][None].float(), site)[:, from_answer]
            same[depth].append(site.project(u_1TD)[0].argmax(-1) == document.top_tokens_TK[from_answer, 0])
    return {depth: float(torch.cat(parts).float().mean()) for depth, parts in same.items()}


def reader(
    name: str, engine: Engine, documents: Sequence[StoredDocument], depths: Sequence[int], steps: int
) -> ExitBank:
    """A bank of lenses of one kind, fitted."""
    kinds: dict[str, Any] = {each.__name__: each for each in (LowRankLens, MLPLens, AttentionLens, MambaLens)}
    blocks = int(name.split("-")[1].split()[0]) if name.startswith("bridge") else 0
    if blocks:
        kind: Any = lambda site: BridgeLens(site, blocks=blocks)  # noqa: E731
        depths = [depth for depth in depths if depth < engine.backbone.spec.depth - blocks]
    else:
        kind = kinds.get(name, TunedLens)
    bank = ExitBank({depth: Exit(kind) for depth in depths}, engine.backbone.site)
    if "ridge" in name:
        for depth in depths:
            started(bank.lens(depth), ridge(engine, documents, depth, blocks))
    if "trained" in name or "ridge" not in name:
        steps = 4 * steps if "longer" in name else steps
        trained(bank, engine, documents, steps, 3e-4 if "ridge" in name else 2e-3)
    return bank


READERS = (
    *("ridge", "bridge-1 ridge", "bridge-3 ridge", "ridge, trained", "ridge, trained longer"),
    *("bridge-3 ridge, trained", "TunedLens", "LowRankLens", "MLPLens", "AttentionLens", "MambaLens"),
)


def extrapolated(sizes: Sequence[int], shares: Sequence[float]) -> dict[str, float]:
    """``right = a - b * positions ** -c`` through the points, and what it gives at ten times the most positions."""
    (a, b, c), _ = curve_fit(
        lambda n, a, b, c: a - b * n**-c, np.array(sizes, float), np.array(shares), p0=(max(shares) + 0.05, 1.0, 0.3),
        bounds=([0.0, 0.0, 0.05], [1.0, 50.0, 2.0]), maxfev=20000,
    )  # fmt: skip
    return {"a": float(a), "b": float(b), "c": float(c), "at ten times": float(a - b * (10.0 * max(sizes)) ** -c)}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The report; written again after every reader, so that a run that is stopped keeps what it found."""
    engine = load(args.model, device="cpu")
    total = engine.backbone.spec.depth
    exits = [int(depth) for depth in args.exits.split(",")]
    sizes = [int(size) for size in args.sizes.split(",")]
    depths = sorted({*exits, *(total - blocks for blocks in (0, *LATE))})
    train = read(engine, args.train, depths, args.states / "train", max(sizes)).documents()
    held = read(engine, args.held, depths, args.states / "held", max(sizes)).documents()
    lengths = np.cumsum([len(document.tokens_T) for document in train])
    report: dict[str, Any] = {
        "environment": environment("cpu", dtype="float32", batch=1),
        "options": {"exits": exits, "sizes": sizes, "steps": args.steps, "model": args.model},
        "positions": {"train": int(lengths[-1]), "held": sum(len(document.tokens_T) for document in held)},
        "right": {},
    }
    if args.out is not None and args.out.is_file():
        report["right"] = json.loads(args.out.read_text())["right"]
    for name in args.readers.split("; "):
        for size in sizes:
            known = report["right"].setdefault(name, {})
            if str(size) in known or size > lengths[-1]:
                continue
            documents = train[: int(np.searchsorted(lengths, size)) + 1]
            begin = time.perf_counter()
            bank = reader(name, engine, documents, exits, args.steps)
            if args.save is not None and size == max(sizes):
                folder = args.save / name.replace(",", "").replace(" ", "-")
                bank.save(folder, engine.backbone.spec, find_source(args.model)[0].recipe)
            found = right(bank, engine, held)
            known[str(size)] = {str(depth): share for depth, share in found.items()}
            print(f"{name:20} {size:8} {time.perf_counter() - begin:6.0f} s  " + line(known[str(size)]), flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    report["fit"] = {
        name: {
            depth: extrapolated([int(size) for size in known], [row[depth] for row in known.values()])
            for depth in next(iter(known.values()))
        }
        for name, known in report["right"].items()
        if len(known) >= 4
    }
    return report


def line(row: dict[str, float]) -> str:
    """Shares by depth."""
    return "  ".join(f"{depth}: {share:.3f}" for depth, share in row.items())


def main() -> None:
    """Fit, read, print, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--held", type=Path, nargs="+", required=True)
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--model", default="SmolLM2")
    parser.add_argument("--exits", default="15,19,23,27")
    parser.add_argument("--sizes", default="2500,10000,40000,80000")
    parser.add_argument("--readers", default="; ".join(READERS), help="names, parted by '; '")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save", type=Path, default=None, help="folder for the heads of the largest size")
    parser.add_argument("--out", type=Path, default=None)
    report = measured(args := parser.parse_args())
    for name, fits in report["fit"].items():
        print(f"{name:20} at ten times the positions: " + line({d: fit["at ten times"] for d, fit in fits.items()}))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
