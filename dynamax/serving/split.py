"""``dynamax split``: a model in two folders, one for an edge device and one for a cloud.

Each holds its own blocks and what stands around them, and loads no more. Before they are kept, both are loaded once:
over a short text, the one behind the other gives the whole model's logits.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from dynamax.backbones.checkpoint import SINGLE, Checkpoint, reading
from dynamax.backbones.families import FamilySpec, family
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.loading import (
    CONFIG,
    GENERATION,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    block_of,
    blocks_needed,
    load_backbone,
    read_config,
)
from dynamax.backbones.parts import Part, part_in
from dynamax.errors import UserError
from dynamax.files import whole_folder
from dynamax.heads import ExitBank
from dynamax.types import Span

EDGE, CLOUD, HEADS = "edge", "cloud", "heads"
CHECKED = 16
"""Tokens over which the two parts are compared with the whole."""


@dataclass(frozen=True)
class Places:
    """Where a model is cut.

    Attributes:
        edge: Blocks of the edge: from the first to its last exit.
        cloud: Blocks of the cloud: from where states are sent up to the top.
    """

    edge: Span
    cloud: Span


def places(exits: ExitBank, total: int, at: int | None, start: int | None) -> Places:
    """Where to cut, in blocks completed.

    Args:
        exits: The exits of the whole model.
        total: Its blocks.
        at: Depth of the edge's last exit; left out, that of the last exit.
        start: Depth at which the edge sends states, an exit's; left out, ``at``. Blocks above it up to ``at`` are on
            both sides: then states can be sent sooner, while the edge goes on.

    Raises:
        UserError: If there is no exit at one of them, or ``start`` is above ``at``; if an edge's exit runs blocks that
            only the cloud has.
    """
    below = [depth for depth in exits.depths if depth < total]
    at = max(below, default=0) if at is None else at
    start = at if start is None else start
    for depth in (at, start):
        if depth not in below:
            raise UserError(
                f"The model was to be split at {depth}, but its exits are at "
                f"{', '.join(map(str, below)) or 'no depth'}. Split it at one of them, or train an exit there."
            )
    if start > at:
        raise UserError(
            f"States were to be sent up at depth {start}, but the edge ends at {at}. Send them at {at} or below."
        )
    for depth in below:
        if depth <= at and exits.lens(depth).last_blocks:
            raise UserError(
                f"The exit at {depth} reads through {type(exits.lens(depth)).__name__}, which runs the model's last "
                f"blocks; the edge does not have them. Split with exits of another lens."
            )
    return Places(Span(0, at), Span(start, total))


def split(folder: Path, exits: ExitBank, cut: Places, out: Path) -> tuple[Path, Path]:
    """Write both folders, whole or not at all.

    Args:
        folder: The whole model, in transformers' layout.
        exits: Its exits; the edge gets those up to its last block.
        cut: Where.
        out: The folder to make, with ``edge`` and ``cloud`` in it.

    Returns:
        The two folders.

    Raises:
        UserError: If ``out`` exists, the model cannot be read, or the parts do not give its logits.
    """
    if out.exists():
        raise UserError(f"{out} exists already. Name another folder, or remove it.")
    whole = load_backbone(folder, dtype="float32", device="cpu")
    with whole_folder(out) as fresh:
        write_part(folder, fresh / EDGE, whole, cut.edge, sends=cut.cloud.start)
        write_part(folder, fresh / CLOUD, whole, cut.cloud)
        kept = exits.select_gates(None, depths=[depth for depth in exits.depths if depth <= cut.edge.stop])
        kept.save(fresh / EDGE / HEADS, whole.spec)
        check_parts(whole, fresh / EDGE, fresh / CLOUD, cut)
    return out / EDGE, out / CLOUD


def write_part(folder: Path, out: Path, whole: HFBackbone, span: Span, *, sends: int | None = None) -> None:
    """Write some blocks, the output matrix, and whatever else is no block; with the embedding matrix for an edge.

    An output matrix that is the embedding matrix brings that along.

    Args:
        folder: The whole model.
        out: Folder to make.
        whole: The model, loaded.
        span: The blocks.
        sends: Depth at which an edge sends states; None for a cloud.
    """
    embedding = sends is not None
    row = family(whole.spec.family)
    with reading(folder, "*.safetensors", "*.safetensors.index.json"):
        tensors = Checkpoint(folder)
        needed = blocks_of(folder, row, span)
        left_out = set() if embedding else apart_from_output(whole, row, tensors)
        kept = [name for name in tensors if block_of(name, row) in {None, *needed} and name not in left_out]
        out.mkdir()
        save_file({name: tensors[name].contiguous() for name in kept}, out / SINGLE, metadata={"format": "pt"})
    absent = tuple(names_of(whole.model, whole.model.get_input_embeddings())) if left_out else ()
    width = whole.embed(torch.zeros(1, 1, dtype=torch.long)).shape[-1]
    Part(span, whole.spec.depth, not left_out, True, absent, whole.spec.fingerprint, width, sends).write(out)
    wanted = (CONFIG, GENERATION, *((*TOKENIZER, *TOKENIZER_SETTINGS) if embedding else ()))
    for file in sorted({file for pattern in wanted for file in folder.glob(pattern)}):
        shutil.copy(file, out / file.name)


def blocks_of(folder: Path, row: FamilySpec, span: Span) -> set[int]:
    """Indices of the blocks of a span, and of those whose weights they share."""
    config = read_config(folder)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        return blocks_needed(kind(config), row, span)


def apart_from_output(whole: HFBackbone, row: FamilySpec, tensors: Iterable[str]) -> set[str]:
    """Names on disk of the embedding matrix, where another matrix gives the logits; else none."""
    model: Any = whole.model
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        return set()
    ending = re.compile(rf"(^|\.){row.embedding}\.weight$")
    return {name for name in tensors if ending.search(name)}


def names_of(model: nn.Module, wanted: object) -> list[str]:
    """Names of the weights of one module of a model."""
    return [f"{name}.weight" for name, module in model.named_modules() if module is wanted]


@torch.inference_mode()
def check_parts(whole: HFBackbone, edge: Path, cloud: Path, cut: Places) -> None:
    """Refuse parts that do not give the whole model's logits, one behind the other."""
    tokens_1T = torch.arange(CHECKED)[None] % whole.spec.vocab
    wanted_1TV = whole.unembed(whole.run(whole.embed(tokens_1T), Span(0, whole.spec.depth)))
    lower = load_part(edge)
    h_1TD = lower.run(lower.embed(tokens_1T), Span(0, cut.cloud.start))
    del lower  # one part at a time beside the whole
    upper = load_part(cloud)
    found_1TV = upper.unembed(upper.run(h_1TD, cut.cloud))
    if not found_1TV.equal(wanted_1TV):
        apart = float((found_1TV - wanted_1TV).abs().max())
        raise UserError(
            f"The parts do not give the model's logits: they are up to {apart:.2g} apart. Nothing was written. Report "
            f"the model, {whole.spec.family}, as a bug."
        )


def load_part(folder: Path) -> HFBackbone:
    """A part of a model from its folder: its own weights alone.

    Raises:
        UserError: If the folder is no part, or cannot be read.
    """
    return load_backbone(folder, dtype="float32", device="cpu", part=read_part(folder))


def read_part(folder: Path) -> Part:
    """What a folder holds.

    Raises:
        UserError: If it is no part, or cannot be read.
    """
    part = part_in(folder)
    if part is None:
        raise UserError(f"{folder} holds no part of a model. Give one of the folders that dynamax split wrote.")
    return part
