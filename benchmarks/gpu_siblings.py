"""Part ``siblings``: the small models in assets/, timed like the large ones; then their policies."""

from __future__ import annotations

import torch

from benchmarks import decode
from benchmarks.gpu_part import ROOT, Box
from benchmarks.gpu_shapes import Speeds
from dynamax.backbones.loading import load_backbone

NAMES = ("mamba2", "llama", "granite")
DEPTHS = (2, 4, 6)
PROMPT, TOKENS = 64, 64


def run(box: Box) -> None:
    """Speeds of each model in two precisions, then what its exits keep and cost."""
    names: tuple[str, ...] = NAMES[:1] if box.rehearse else NAMES
    dtypes = ("float32",) if box.rehearse else ("float32", "bfloat16")
    prompt, tokens = (8, 3) if box.rehearse else (PROMPT, TOKENS)
    size = 2**24 if box.rehearse else 2**30
    rate = box.measure("bandwidth_gb_s", lambda: decode.bandwidth(torch.device(box.device), size=size) / 1e9)
    for dtype in dtypes:
        for name in names:
            model = load_backbone(ROOT / "assets" / name, dtype=dtype, device=box.device)
            for batch in (1,) if box.rehearse else (1, 32):
                Speeds(box, f"{name} {dtype}", lambda model=model: model, DEPTHS, rate).run(batch, prompt, tokens)
    box.measure("policies", lambda: policies(box, names))


def policies(box: Box, names: tuple[str, ...]) -> str:
    """What the exits of each model keep and cost."""
    from benchmarks.gpu_sweep import FIRST, MOST, TOKENS, module, sweep  # needs more packages than the speeds
    from dynamax.backbones.sources import Folder

    for name in names:
        source = Folder(str(ROOT / "assets" / name))
        tested = module(source, DEPTHS, heads=None, dtype="float32", chat=False)
        sweep(box, name, tested, questions=FIRST if box.rehearse else MOST, tokens=4 if box.rehearse else TOKENS)
    return "below, by name"
