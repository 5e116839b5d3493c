"""A trained model as a folder in transformers' layout, with a card in Markdown. Knows files, no trainer.

The figures on the card are those of the very files: they are written, loaded again, and measured.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dynamax.backbones.base import Backbone
from dynamax.backbones.hf import HFBackbone
from dynamax.data.language import LanguageData
from dynamax.decoding.sampling import Greedy, Sampled, Sampler
from dynamax.engine import load
from dynamax.errors import UserError
from dynamax.files import read_mapping
from dynamax.metrics.environment import environment
from dynamax.metrics.language import DepthScores
from dynamax.modules.checks import all_finite

REPORT = "training.json"
SAMPLE = 48
"""Tokens of a sample, at most."""
SAMPLERS: dict[str, Sampler] = {"greedy": Greedy(), "temperature 0.7": Sampled(0.7, seed=0)}
CANNOT = """\
It is small and saw little text: a fixture for tests and comparisons. It knows no facts, follows no instructions and \
writes text that need not be true or make sense. Nothing was done against what its text may contain. How well its \
exits do is no evidence of how well those of a large model would."""
CANNOT_STUDENT = """\
It imitates its teacher on the text named above, and does so worse on other text and on longer contexts than its \
blocks. What its teacher gets wrong it gets wrong too. Nothing was done against what its text may contain."""


def check_target(target: str, report: str = REPORT) -> None:
    """Refuse a folder that holds something other than an earlier export, which would be replaced.

    Args:
        target: The folder.
        report: Name of the file that an earlier export has.

    Raises:
        UserError: If it does, or lies below a file.
    """
    folder = Path(target)
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"model.export is {target}, but {above} is a file. Name another folder.")
    if folder.exists() and not (folder / report).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        commands = "`dynamax train` or `dynamax distill`" if report == REPORT else "`dynamax tune`"
        raise UserError(f"{target} exists and is no model of {commands}. Name another folder as model.export.")


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

    Raises:
        UserError: If a weight is not finite in float16.
    """
    folder = Path(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    device = next(backbone.parameters()).device
    half = in_float16(backbone)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
        fresh = Path(scratch) / "fresh"
        half.save_pretrained(fresh)
        data.streams.tokenizer.save_pretrained(fresh)
        engine = load(fresh, device=str(device))
        written = engine.backbone
        depths, samples = measure(written, data, [*exits, written.spec.depth]), []
        for prompt, (name, sampler) in itertools.product(prompts, SAMPLERS.items()):
            limit = min(SAMPLE, written.spec.context - engine.encode(prompt, chat=False).shape[1])
            answer = engine.generate(prompt, chat=False, sampler=sampler, max_new_tokens=limit)
            samples.append({"prompt": prompt, "sampling": name, "text": answer.text})
        report = {
            **facts,
            "parameters": sum(p.numel() for p in written.parameters()),
            "text": _text_facts(data),
            "environment": environment(device.type, dtype="float32", batch=sum(data.rows)),
            "depths": depths,
            "samples": samples,
            "files": sorted([*(path.name for path in fresh.iterdir()), REPORT, "README.md"]),
        }
        (fresh / REPORT).write_text(json.dumps(report, indent=1), "utf-8")
        (fresh / "README.md").write_text(card(folder.name, report), "utf-8")
        put(fresh, folder, Path(scratch) / "before", REPORT)
    return report


def in_float16(backbone: HFBackbone) -> PreTrainedModel:
    """A copy of the model in float16.

    Raises:
        UserError: If a weight is not finite in float16.
    """
    half = type(backbone.model)(copy.deepcopy(backbone.model.config)).half()
    half.load_state_dict(backbone.model.state_dict())
    if not all_finite(half.parameters()):
        raise UserError(
            "The model was not written: a weight is too large for float16, in which models are written, or not a "
            "number. Lower model.learning_rate, or set trainer.gradient_clip_val: 1, and train anew."
        )
    return half


def put(fresh: Path, folder: Path, before: Path, name: str) -> None:
    """Move a complete folder to its place, and an earlier export out of the way; other files there stay.

    Args:
        fresh: The complete folder.
        folder: Its place.
        before: Where an earlier export goes.
        name: Of the report, whose ``files`` are those of the export.
    """
    if not folder.exists():
        os.replace(fresh, folder)
        return
    known: list[str] = []
    with suppress(OSError, ValueError, TypeError):  # no report, or a damaged one: then all that is there stays
        known = [str(each) for each in read_mapping(folder / name).get("files", ())]
    others = sorted({path.name for path in folder.iterdir()} - {path.name for path in fresh.iterdir()} - set(known))
    os.replace(folder, before)
    os.replace(fresh, folder)
    for name in others:
        os.replace(before / name, folder / name)


def _text_facts(data: LanguageData) -> dict[str, Any]:
    parts = (
        data.streams.inputs["corpora"],
        data.rows,
        data.streams.lengths("train"),
        data.streams.lengths("validation"),
    )
    corpora = [
        {**identity, "rows": rows, "train": train, "validation": validation}
        for identity, rows, train, validation in zip(*parts, strict=True)
    ]
    return {
        "corpora": corpora,
        "vocabulary": len(data.streams.tokenizer),
        "tokenizer": data.streams.inputs.get("tokenizer"),
        "block": data.length,
        "rows": sum(data.rows),
    }


def measure(backbone: Backbone, data: LanguageData, depths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Perplexity, accuracy and agreement with the top by depth, over the validation blocks.

    Every depth is read through the final norm and the output matrix.
    """
    scores = DepthScores(depths)
    for block_BT in data.val_dataloader():
        tokens_BT = block_BT.to(next(backbone.parameters()).device)
        states = backbone.walk(backbone.embed(tokens_BT), depths)
        scores.update([backbone.unembed(h_BTD) for _, h_BTD in states], tokens_BT)
    return {str(depth): score for depth, score in scores.compute().items()}


def card(name: str, report: dict[str, Any]) -> str:
    """The card in Markdown: use, recipe, text, figures by depth, losses, samples, limits.

    Args:
        name: What the model is called.
        report: See ``write_model``.
    """
    student, config = "teacher" in report, report["config"]
    made = "trained from the start by `dynamax train`"
    use = "In transformers: `AutoModelForCausalLM.from_pretrained(FOLDER)`."
    if student:
        made = (
            f"distilled by `dynamax distill` from a Transformer whose attention it keeps in {len(config['keep'])} of "
            f"{config['num_hidden_layers']} blocks (numbered from 0), with Mamba-2 in the others,"
        )
        if not config["keep"]:
            use = "It keeps no attention, so transformers runs it with `use_cache=False` only."
    scores = [
        (depth, f"{score['perplexity']:.1f}", f"{score['accuracy']:.3f}", f"{score['agreement']:.3f}")
        for depth, score in report["depths"].items()
    ]
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {name}",
        f"A causal language model of type `{config['model_type']}` with {report['parameters'] / 1e6:.2f} million "
        f"parameters, {made} on {report['tokens'] / 1e6:.2f} million tokens in {report['seconds'] / 60:.1f} minutes. "
        f"Weights are float16.",
        f"## Use\n\nWith this folder as FOLDER: `{command(report['depths'])}`\n\n{use}",
        f"## Recipe\n\n{_recipe(report)}",
        f"## Text\n\n{_text(report['text'])}",
        "## Every depth, on held-out text",
        "All depths are read through the final norm and the output matrix; the last is the top. Agreement is with the "
        "top's likeliest token, accuracy with the true one. Measured on these files.",
        table(("blocks", "perplexity", "accuracy", "agreement"), scores),
        "## Loss",
        "Cross-entropy of the top on training batches, mean of the steps since the row before.",
        table(("step", "loss"), [(step, f"{loss:.3f}") for step, loss in report["curve"]]),
    ]
    if student:
        tops = [(step, list(depths.values())[-1]) for step, depths in report["validation"].items()]
        rows = [(step, f"{top['divergence']:.4f}", f"{top['fidelity']:.3f}") for step, top in tops]
        parts += [
            "## Distance from the teacher",
            "Of the top on held-out text: KL(teacher || student) in nats, and how often the likeliest token is its "
            "own.",
            table(("step", "divergence", "same token"), rows),
        ]
    if report["samples"]:
        parts += ["## Samples", "Prompts may stand in the training text."]
        each = [
            (s["sampling"], *(" ".join(s[k].replace("`", "'").split()) for k in ("prompt", "text")))
            for s in report["samples"]
        ]
        parts.append("\n".join(f"- `{prompt}` ({way}): `{text}`" for way, prompt, text in each))
    parts += ["## What it cannot do", CANNOT_STUDENT if student else CANNOT]
    return "\n\n".join(parts) + "\n"


def _recipe(report: dict[str, Any]) -> str:
    def listed(name: str) -> str:
        return ", ".join(f"{option} {value}" for option, value in report[name].items())

    rows = [
        ("configuration", listed("config")),
        *([("teacher", listed("teacher")), ("trained", report["trained"])] if "teacher" in report else []),
        ("objective", listed("objective")),
        ("AdamW (.9, .95)", listed("optimiser")),
        ("steps", report["steps"]),
        ("tokens a step", report["text"]["rows"] * report["text"]["block"]),
        ("gradients clipped at", report["gradient_clip"]),
        ("precision", report["precision"]),
        ("environment", listed("environment")),
    ]
    return table(("", ""), rows)


def _text(text: dict[str, Any]) -> str:
    rows = [
        (corpus["source"], corpus["rows"], f"{corpus['train']:,}", f"{corpus['validation']:,}")
        for corpus in text["corpora"]
    ]
    head = ("corpus", f"rows of {text['rows']} in a batch", "training tokens", "validation tokens")
    kind = f"Byte-level BPE of {text['vocabulary']} tokens, trained on the training text."
    if text["tokenizer"] is not None:
        kind = f"Another model's tokenizer, of {text['vocabulary']} tokens."
    return (
        f"{table(head, rows)}\n\n{kind} Blocks of {text['block']} tokens. `training.json` has each corpus' options and "
        f"the hash of its contents."
    )


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown.

    >>> print(table(("a", "b"), [(1, 2)]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    first, *others = ["| " + " | ".join(map(str, line)) + " |" for line in (head, *rows)]
    return "\n".join([first, "|" + "---|" * len(head), *others])


def command(depths: Iterable[str], folder: str = "FOLDER") -> str:
    """What to type next: decode from the exits, at ``depths`` but the last, or train some."""
    exits = ", ".join(f"{depth}: {{}}" for depth in sorted(map(int, depths))[:-1])
    if not exits:
        return f"dynamax fit -c configs/demo/fit.yaml --model.backbone Folder --model.backbone.path {folder}"
    policy = f"--exits '{{{exits}}}' --policy MaxProb --threshold 0.5"
    return f'dynamax generate "..." --backbone Folder --backbone.path {folder} {policy}'
