"""A trained model as a folder in transformers' layout, with a card that says what it is. Knows files, no trainer.

The figures on the card are those of the very files: they are written, loaded again, and measured.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dynamax.backbones.base import Backbone
from dynamax.backbones.hf import HFBackbone
from dynamax.data.language import LanguageData
from dynamax.decoding.sampling import Greedy, Sampled, Sampler
from dynamax.engine import Engine, load
from dynamax.errors import UserError
from dynamax.metrics.environment import environment
from dynamax.metrics.language import DepthScores
from dynamax.modules.card import card
from dynamax.modules.checks import all_finite
from dynamax.modules.training_log import read_depths

REPORT = "training.json"
SAMPLE = 48
SAMPLERS: dict[str, Sampler] = {"greedy": Greedy(), "temperature 0.7": Sampled(0.7, seed=0)}


def check_target(target: str) -> None:
    """Refuse a folder that holds something other than an earlier export, which would be replaced.

    Raises:
        UserError: If it does, or lies below a file.
    """
    folder = Path(target)
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"model.export is {target}, but {above} is a file. Name another folder.")
    if folder.exists() and not (folder / REPORT).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{target} exists and is no model of `dynamax train` or `dynamax distill`. Name another folder as "
            f"model.export."
        )


@torch.no_grad()
def write_model(
    target: str,
    backbone: HFBackbone,
    data: LanguageData,
    exits: Sequence[int],
    prompts: Sequence[str],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write weights in float16, configuration, tokenizer, ``training.json`` and a card: whole or not at all.

    Args:
        target: The folder; an earlier export there is replaced, and what else lies there stays.
        backbone: The model.
        data: Gives the tokenizer, and the text that every depth is measured on.
        exits: Depths to measure beside the top.
        prompts: What to continue for the samples.
        facts: How it was trained, as JSON values.

    Returns:
        The report that was written.
    """
    folder = Path(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    device = next(backbone.parameters()).device
    tokenizer = data.streams.tokenizer
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
        fresh = Path(scratch) / "fresh"
        half(backbone.model).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        engine = load(fresh, device=str(device))
        written = engine.backbone
        report = {
            **facts,
            "parameters": sum(p.numel() for p in written.parameters()),
            "text": text_facts(data),
            "environment": environment(device.type, dtype="float32", batch=sum(data.rows)),
            "depths": measure(written, data, [*exits, written.spec.depth]),
            "samples": samples(engine, prompts),
            "files": sorted([*(path.name for path in fresh.iterdir()), REPORT, "README.md"]),
        }
        (fresh / REPORT).write_text(json.dumps(report, indent=1), "utf-8")
        (fresh / "README.md").write_text(card(folder.name, report), "utf-8")
        put(fresh, folder, Path(scratch) / "before")
    return report


def half(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float16 on the CPU.

    Raises:
        UserError: If a weight is not finite there.
    """
    twin = type(model)(copy.deepcopy(model.config)).half()
    twin.load_state_dict(model.state_dict())
    if not all_finite(twin.parameters()):
        raise UserError(
            "The model was not written: a weight is too large for float16, in which models are written, or not a "
            "number. Lower model.learning_rate, or set trainer.gradient_clip_val: 1, and train anew."
        )
    return twin


def put(fresh: Path, folder: Path, before: Path) -> None:
    """Move a complete folder to its place, and what was there out of the way; files of others go along."""
    if not folder.exists():
        os.replace(fresh, folder)
        return
    report = folder / REPORT
    known = json.loads(report.read_text("utf-8")).get("files", ()) if report.is_file() else ()
    others = sorted({path.name for path in folder.iterdir()} - {path.name for path in fresh.iterdir()} - set(known))
    os.replace(folder, before)
    os.replace(fresh, folder)
    for name in others:
        os.replace(before / name, folder / name)


def text_facts(data: LanguageData) -> dict[str, Any]:
    """What the model was trained on."""
    lengths = {part: data.streams.lengths(part) for part in ("train", "validation")}
    corpora = [
        {**identity, "rows": rows, "train": train, "validation": validation}
        for identity, rows, train, validation in zip(
            data.streams.inputs["corpora"], data.rows, lengths["train"], lengths["validation"], strict=True
        )
    ]
    return {
        "corpora": corpora,
        "vocabulary": len(data.streams.tokenizer),
        "tokenizer": data.streams.inputs.get("tokenizer"),
        "block": data.length,
        "rows": sum(data.rows),
    }


def measure(backbone: Backbone, data: LanguageData, depths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Perplexity, accuracy and agreement with the top by depth, over the validation blocks."""
    device = next(backbone.parameters()).device
    scores = DepthScores(depths)
    for tokens_BT in data.val_dataloader():
        scores.update(read_depths(backbone, tokens_BT.to(device), depths), tokens_BT.to(device))
    return {str(depth): score._asdict() for depth, score in scores.compute().items()}


def samples(engine: Engine, prompts: Sequence[str]) -> list[dict[str, str]]:
    """What the model makes of each prompt, by each way of sampling."""
    found = []
    for prompt in prompts:
        most = min(SAMPLE, engine.backbone.spec.context - engine.encode(prompt, chat=False).shape[1])
        for name, sampler in SAMPLERS.items():
            answer = engine.generate(prompt, chat=False, sampler=sampler, max_new_tokens=most)
            found.append({"prompt": prompt, "sampling": name, "text": answer.text})
    return found
