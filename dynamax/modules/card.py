"""The card of a trained model: recipe, text, losses, figures by depth, samples, limits. Knows a report, no models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

CANNOT = """\
It is small and saw little text: a fixture for tests and comparisons. It knows no facts, follows no instructions and \
writes text that need not be true or make sense. Nothing was done against what its text may contain. How well its \
exits do is no evidence of how well those of a large model would."""
CANNOT_STUDENT = """\
It imitates its teacher on the text named above, and does so worse on other text and on longer contexts than its \
blocks. What its teacher gets wrong it gets wrong too. Nothing was done against what its text may contain."""


def card(name: str, report: dict[str, Any]) -> str:
    """The card in Markdown.

    Args:
        name: What the model is called.
        report: See ``dynamax.modules.export.write_model``.
    """
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {name}",
        _summary(report),
        "## Use",
        _use(report),
        "## Recipe",
        _recipe(report),
        "## Text",
        _text(report["text"]),
        "## Every depth, on held-out text",
        "All depths are read through the final norm and the output matrix; the last is the top. Agreement is with the "
        "top's likeliest token, accuracy with the true one. Measured on these files.",
        _depths(report["depths"]),
        "## Loss",
        "Cross-entropy of the top on training batches, mean of the steps since the row before.",
        table(("step", "loss"), [(step, f"{loss:.3f}") for step, loss in report["curve"]]),
        *(["## Distance from the teacher", _distance(report["validation"])] if "teacher" in report else []),
        *(["## Samples", _samples(report["samples"])] if report["samples"] else []),
        "## What it cannot do",
        CANNOT_STUDENT if "teacher" in report else CANNOT,
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown.

    >>> print(table(("a", "b"), [(1, 2)]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [head, *rows]
    written = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([written[0], "|" + "---|" * len(head), *written[1:]])


def _summary(report: dict[str, Any]) -> str:
    return (
        f"A causal language model of type `{report['config']['model_type']}` with {report['parameters'] / 1e6:.2f} "
        f"million parameters, {_made(report)} on {report['tokens'] / 1e6:.2f} million tokens "
        f"in {report['seconds'] / 60:.1f} minutes. Weights are float16."
    )


def _made(report: dict[str, Any]) -> str:
    if "teacher" not in report:
        return "trained from the start by `dynamax train`"
    kept = len(report["config"]["keep"])
    return (
        f"distilled by `dynamax distill` from a Transformer whose attention it keeps in {kept} of "
        f"{report['config']['num_hidden_layers']} blocks (numbered from 0), with Mamba-2 in the others,"
    )


def _use(report: dict[str, Any]) -> str:
    lines = [f"With this folder as FOLDER: `{command(report['depths'])}`"]
    if "teacher" in report and not report["config"]["keep"]:
        lines.append("It keeps no attention, so transformers runs it with `use_cache=False` only.")
    else:
        lines.append("In transformers: `AutoModelForCausalLM.from_pretrained(FOLDER)`.")
    return "\n\n".join(lines)


def command(depths: Iterable[str], folder: str = "FOLDER") -> str:
    """What to type next: decode from the exits, at ``depths`` but the last, or train some."""
    exits = ", ".join(f"{depth}: {{}}" for depth in sorted(map(int, depths))[:-1])
    if not exits:
        return f"dynamax fit -c configs/demo/fit.yaml --model.backbone Folder --model.backbone.path {folder}"
    policy = f"--exits '{{{exits}}}' --policy MaxProb --threshold 0.5"
    return f'dynamax generate "..." --backbone Folder --backbone.path {folder} {policy}'


def _recipe(report: dict[str, Any]) -> str:
    rows = [
        ("configuration", _listed(report["config"])),
        *([("teacher", _listed(report["teacher"])), ("trained", report["trained"])] if "teacher" in report else []),
        ("objective", _listed(report["objective"])),
        ("AdamW (.9, .95)", _listed(report["optimiser"])),
        ("steps", report["steps"]),
        ("tokens a step", report["text"]["rows"] * report["text"]["block"]),
        ("gradients clipped at", report["gradient_clip"]),
        ("precision", report["precision"]),
        ("environment", _listed(report["environment"])),
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


def _depths(depths: dict[str, dict[str, float]]) -> str:
    rows = [
        (depth, f"{score['perplexity']:.1f}", f"{score['accuracy']:.3f}", f"{score['agreement']:.3f}")
        for depth, score in depths.items()
    ]
    return table(("blocks", "perplexity", "accuracy", "agreement"), rows)


def _distance(validation: dict[Any, dict[Any, dict[str, float]]]) -> str:
    tops = [(step, list(depths.values())[-1]) for step, depths in validation.items()]
    rows = [(step, f"{top['divergence']:.4f}", f"{top['fidelity']:.3f}") for step, top in tops]
    told = "Of the top on held-out text: KL(teacher || student) in nats, and how often the likeliest token is its own."
    return f"{told}\n\n{table(('step', 'divergence', 'same token'), rows)}"


def _samples(samples: Sequence[dict[str, str]]) -> str:
    lines = [f"- {_quoted(each['prompt'])} ({each['sampling']}): {_quoted(each['text'])}" for each in samples]
    return "\n".join(["Prompts may stand in the training text.", "", *lines])


def _quoted(text: str) -> str:
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
