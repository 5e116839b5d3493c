"""Part ``shapes``: Mistral-7B and Codestral-Mamba-7B with random weights, at the paper's exits, batch 1, 8 and 32.

Each batch of both models, the smallest first: the library's decoders, then the same with their steps in CUDA graphs;
beside the time in which memory is read once, and bare products. At batch 1 also chunks of several positions, as debts
make them.
"""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import torch

from benchmarks import decode, gpu_speeds
from benchmarks.gpu_part import Box
from benchmarks.models import CONTESTANTS, Contestant, load
from dynamax.backbones.hf import HFBackbone

MODELS = ("mistral-7b", "codestral-7b")
BATCHES = (1, 8, 32)
PROMPT, TOKENS = 128, 24
SMALL: dict[str, dict[str, Any]] = {
    "mistral": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
    },
    "mamba2": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "vocab_size": 64},
}
"""What a rehearsal changes: all sizes but the depth."""


def small(name: str) -> str:
    """A contestant with the depth of another and tiny sizes; its name."""
    given = CONTESTANTS[name]
    assert given.config is not None, "only random weights come in any size"
    CONTESTANTS[f"small {name}"] = Contestant(given.depths, {**given.config, **SMALL[given.config["model_type"]]})
    return f"small {name}"


def run(box: Box) -> None:
    """Measure, both models at each batch in turn."""
    names = [small(name) for name in MODELS] if box.rehearse else list(MODELS)
    dtype, batches = ("float32", (1, 2)) if box.rehearse else ("bfloat16", BATCHES)
    prompt, tokens = (8, 3) if box.rehearse else (PROMPT, TOKENS)
    device = torch.device(box.device)
    rate = box.measure("bandwidth_gb_s", lambda: decode.bandwidth(device, size=2**24 if box.rehearse else 2**30) / 1e9)

    @cache
    def model(name: str) -> HFBackbone:
        return load(name, dtype=dtype, device=box.device, prompts=0)[0]

    for batch in batches:
        for name in names:
            Speeds(box, name, lambda name=name: model(name), CONTESTANTS[name].depths, rate).run(batch, prompt, tokens)


class Speeds:
    """Everything that is timed of one model, in a box, with the table's rows.

    Args:
        box: Where findings go.
        name: Name of the model.
        model: Gives the model, made when it is first asked for.
        depths: Exits.
        rate: GB a second that memory moves; None if that is not known.
    """

    def __init__(self, box: Box, name: str, model: Any, depths: tuple[int, ...], rate: float | None) -> None:  # noqa: ANN401
        self.box, self.name, self.model, self.depths, self.rate = box, name, model, depths, rate

    def run(self, batch: int, prompt: int, tokens: int) -> None:
        """Eager, captured, and at batch 1 chunks."""
        box, name, depths = self.box, f"{self.name}, batch {batch}", self.depths

        def prompt_BT() -> torch.Tensor:
            torch.manual_seed(batch)
            return torch.randint(self.model().spec.vocab, (batch, prompt), device=box.device)

        slow = box.measure(f"{name}, eager", lambda: gpu_speeds.eager(self.model(), prompt_BT(), depths, tokens))
        fast = box.measure(f"{name}, captured", lambda: gpu_speeds.captured(self.model(), prompt_BT(), depths, tokens))
        if batch == 1:
            box.measure(f"{name}, chunks", lambda: gpu_speeds.chunks(self.model(), prompt_BT(), tokens))
        if (slow or fast) and self.rate:
            every = (*depths, self.model().spec.depth)
            least = decode.memory_ms(self.model(), every, 1e9 * self.rate)
            box.put(f"{name}, memory_ms", least)
            head = [] if box.report["table"] else [gpu_speeds.HEAD]
            box.tabulate("\n".join([*head, *gpu_speeds.lines(name, slow, fast, self.rate, least)]))
        gc.collect()  # captured spans are in a cycle with their backbone, and their state may be gigabytes
        if box.device == "cuda":
            torch.cuda.empty_cache()
