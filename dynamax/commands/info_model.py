"""``dynamax info MODEL``: what is known of a model before its weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dynamax.backbones.base import Backbone
from dynamax.backbones.families import FAMILIES
from dynamax.backbones.families_table import kind, special
from dynamax.backbones.hf import UNBOUNDED
from dynamax.backbones.loading import outline
from dynamax.backbones.sources import FolderSource, Source
from dynamax.decoding.cost import CostModel
from dynamax.decoding.sampling import Sampled, Sampler
from dynamax.engine import find_source
from dynamax.errors import UserError
from dynamax.generation import generation_options
from dynamax.heads.saved import check_record, read_record

CONTEXT = 128
"""Positions before the token whose cost is told."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Depths that are told where there are no exits, as parts of the whole."""


def told(model: str) -> str:
    """What there is to say of a model: its family, sizes, rules and exits, and what a token costs by depth.

    Args:
        model: As ``dynamax.load`` takes it; a folder of heads is told with its model.

    Raises:
        UserError: If there is no such model, or it cannot be run.
    """
    source, heads = find_source(model)
    backbone = outline(source.folder()) if isinstance(source, FolderSource) else source.load()
    exits = {} if heads is None else saved(heads)
    begin = [("model", str(source)), *([] if heads is None else [("heads", str(heads))])]
    lines = [f"{name:<12}{text}" for name, text in (*begin, *facts(backbone), *rules(source))]
    lines += [f"{'exit ' + str(depth):<12}{text}" for depth, text in exits.items()]
    return "\n".join([*lines, "", *costs(backbone, list(exits))])


def facts(backbone: Backbone) -> Iterator[tuple[str, str]]:
    """Family, sizes and state, as name and text."""
    spec, size = backbone.spec, next(backbone.parameters()).element_size()
    text = spec.family
    if spec.family in FAMILIES:
        row = FAMILIES[spec.family]
        text += f", {kind(row)}" if special(row) == "-" else f", {kind(row)}; {special(row)}"
    yield "family", text
    yield "blocks", f"{spec.depth} of width {spec.width:,}"
    yield "vocabulary", f"{spec.vocab:,} tokens"
    yield "context", "no limit" if spec.context == UNBOUNDED else f"{spec.context:,} tokens of prompt and answer"
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    blocks = [backbone.block_cost(index) for index in range(spec.depth)]
    inner = sum(block.weights for block in blocks)
    yield "weights", f"{weights:,}, {inner / weights:.0%} in blocks; {in_bytes(size * weights)} in float{8 * size}"
    if (active := sum(block.active for block in blocks)) < inner:
        yield "", f"{active:,} of {inner:,} in blocks are multiplied with each token"
    keys, state = sum(block.keys for block in blocks), sum(block.state for block in blocks)
    parts = [f"{in_bytes(size * keys)} for each token"] if keys else []
    parts += [f"{in_bytes(max(size, 4) * state)} however long the text is"] if state else []
    yield "state", " and ".join(parts) or "none"


def rules(source: Source) -> Iterator[tuple[str, str]]:
    """How the model's makers want its text to be asked for, drawn and ended, as name and text."""
    tokenizer, asked = source.tokenizer(), source.generation_config()
    try:
        options = generation_options(tokenizer, asked)
    except UserError as error:  # such as a penalty; the model runs with that switched off
        yield "answers", str(error)
    else:
        yield "answers", drawn(options.sampler)
        yield "ends at", ", ".join(named(tokenizer, token) for token in options.eos_token_id) or "no token"
    yield "chat", "has a template" if tokenizer.chat_template else "no template; prompts are taken as text"


def drawn(sampler: Sampler) -> str:
    """How tokens are drawn.

    >>> drawn(Sampled(0.7, top_p=0.9))
    'drawn at temperature 0.7, top_p 0.9'
    """
    if not isinstance(sampler, Sampled):
        return "the most likely tokens"
    limits = {"top_k": sampler.top_k, "top_p": sampler.top_p}
    told = [f"{name} {value}" for name, value in limits.items() if value not in (None, 1.0)]
    return ", ".join([f"drawn at temperature {sampler.temperature:g}", *told])


def named(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token by its text and number."""
    text: Any = tokenizer.convert_ids_to_tokens(token)
    return f"{text} ({token})"


def saved(folder: Path) -> dict[int, str]:
    """The saved heads of each exit, by depth."""
    record = read_record(folder)
    check_record(record, folder)
    return {
        int(depth): ", ".join(head["class"] for head in (each["lens"], *each["gates"]))
        for depth, each in record["exits"].items()
    }


def costs(backbone: Backbone, depths: list[int]) -> list[str]:
    """What a token costs that leaves at each depth and is read out there, beside one at full depth, in lines."""
    total, model = backbone.spec.depth, CostModel(backbone)
    full = model.full(CONTEXT)
    at = depths or sorted({max(1, round(total * share)) for share in SHARES})
    lines = [
        f"A token behind {CONTEXT} others, read out once; heads are not counted:",
        f"{'blocks':>8}{'FLOPs':>10}{'bytes':>10}",
    ]
    for depth in sorted({*at, total}):
        cost = model.path([depth], CONTEXT)
        lines.append(f"{depth:>8}{cost.flops / full.flops:>10.0%}{cost.bytes / full.bytes:>10.0%}")
    return lines


def in_bytes(count: float) -> str:
    """A number of bytes in the largest unit that leaves one digit before the point.

    >>> in_bytes(512), in_bytes(8_700_000)
    ('512 bytes', '8.7 MB')
    """
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count:.0f} bytes"
