"""The one reader of model folders: a whole model, or some of its blocks with or without what stands around them.

transformers reads the tensors, of a part as of the whole: a part is the whole model whose other blocks are taken out
before anything is read. So renamed keys, prefixes, tied matrices and fused experts follow the same rules in both, a
block keeps its index, and what is not wanted is never allocated. Knows folders, not where they come from.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynamax.backbones.check import QUICK, check_backbone
from dynamax.backbones.checkpoint import Checkpoint, fingerprint_of, reading
from dynamax.backbones.families import FamilySpec, family
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.parts import Part, part_in
from dynamax.errors import UserError
from dynamax.types import Span

P = ParamSpec("P")
R = TypeVar("R")

ONE_AT_A_TIME = threading.Lock()
"""While transformers makes a model it changes functions of its own; two threads at it would leave them changed."""

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER = ("tokenizer*", "vocab*", "merges*", "spiece.model", "tekken.json", "*.tiktoken")
TOKENIZER_SETTINGS = ("special_tokens_map.json", "added_tokens.json", "chat_template*")


def on_cpu(run: Callable[P, R]) -> Callable[P, R]:
    """Make a function's tensors on the CPU unless it says otherwise, whatever torch's default device is.

    Lightning sets the default to the GPU while a model is configured.
    """

    @functools.wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return run(*args, **kwargs)

    return wrapped


@on_cpu
def load_backbone(
    folder: Path,
    *,
    dtype: str,
    device: str,
    span: Span | None = None,
    embedding: bool = True,
    output: bool = True,
    part: Part | None = None,
) -> HFBackbone:
    """Load a folder in transformers' layout, whole or in part.

    A whole model is run over a short prompt, and its logits are compared with transformers' own.

    Args:
        folder: Configuration and safetensors.
        dtype: Name of the type to run in.
        device: Name of the device to run on.
        span: Blocks to read; all if left out. A part counts its blocks as the whole does, and has the whole's
            ``spec``: ``run`` takes spans within it.
        embedding: Whether to keep the embedding matrix. A part that begins at an inner block needs none.
        output: Whether to keep the output matrix. A part that ends at an inner block needs none.
        part: What the folder holds, if ``dynamax split`` wrote it; then ``span``, ``embedding`` and ``output`` are its.

    Raises:
        UserError: If the family is unknown, a file is damaged, weights and configuration do not fit each other, or
            the logits differ; if the folder holds a part of a model, and the whole is wanted.
    """
    kind, place = dtype_of(dtype), device_of(device)
    if part is not None:
        span, embedding, output = part.span, part.embedding, part.output
    elif (held := part_in(folder)) is not None:
        raise UserError(
            f"{folder} holds the blocks {held.span.start} to {held.span.stop} of a model of {held.depth} alone, as "
            f"dynamax split wrote it. Give the whole model; or use it with dynamax serve."
        )
    config = read_config(folder)
    row, all_blocks = family(config.model_type), Span(0, config.num_hidden_layers)
    span = span or all_blocks
    if not 0 <= span.start < span.stop <= all_blocks.stop:
        raise UserError(
            f"Blocks {span} of {folder} were asked for; its model has the blocks {all_blocks}. Ask for blocks of it."
        )
    model_class: Any = causal_class(config)
    with ONE_AT_A_TIME, reading(folder, "*.safetensors", "*.safetensors.index.json"):
        tensors = Checkpoint(folder)
        loaded: Any = part_class(model_class, row, span).from_pretrained(
            None,
            config=config,
            state_dict=tensors.slices(),
            dtype=kind,
            attn_implementation=row.attention,
            ignore_mismatched_sizes=True,  # the report names them
            output_loading_info=True,
        )
    model, report = loaded
    check_report(report, model, row, folder, () if part is None else part.absent)
    model.__class__ = model_class  # the part is made: it is an ordinary model again
    if span != all_blocks:
        held = dict(model.base_model.get_submodule(row.blocks).named_children())
        blocks = [held[str(i)] if i in range(*span) else NotLoaded(f"Block {i}") for i in range(*all_blocks)]
        model.base_model.set_submodule(row.blocks, nn.ModuleList(blocks))
    if not embedding:
        model.set_input_embeddings(NotLoaded("The embedding matrix", model.get_input_embeddings().weight.shape))
    if not output:
        model.set_output_embeddings(NotLoaded("The output matrix", model.get_output_embeddings().weight.shape))
    if kind == torch.float64 and row.expert_share(config) < 1.0:
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    model.config.name_or_path = str(folder)
    model.generation_config = read_generation_config(folder)
    fingerprint = fingerprint_of(config, tensors) if part is None else part.fingerprint
    backbone = HFBackbone(model, fingerprint=fingerprint).to(place)
    if part is not None:
        backbone.held = part.span
    if part is None and span == all_blocks and embedding and output:
        check_backbone(backbone, backbone.reference, modes=QUICK)
    return backbone


@on_cpu
def outline(folder: Path) -> HFBackbone:
    """The model of a folder without its weights: it has sizes and costs, and nothing to run.

    Raises:
        UserError: If there is none, or it is of an unknown or refused type.
    """
    config = read_config(folder)
    model_class: Any = causal_class(config)
    with ONE_AT_A_TIME, reading(folder, CONFIG), torch.device("meta"):
        model = model_class._from_config(config, attn_implementation=family(config.model_type).attention)
    return HFBackbone(model, fingerprint="")


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers' causal language models for a configuration.

    Raises:
        UserError: If there is none.
    """
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None:
        raise UserError(f"transformers has no causal language model of type {config.model_type}. Give another model.")
    return found  # type: ignore[return-value]


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a folder.

    Raises:
        UserError: If there is none, it is damaged, or of an unknown model type.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} has no {CONFIG}. Give a folder in transformers' layout, as save_pretrained writes it."
        )
    with reading(folder, CONFIG):
        model_type = json.loads((folder / CONFIG).read_text())["model_type"]
        family(model_type)  # first, since the package that offers the family may teach transformers its type
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    if not any(path.stem != "tokenizer_config" for pattern in TOKENIZER for path in folder.glob(pattern)):
        raise UserError(  # transformers makes an empty one for some model types
            f"{folder} has no tokenizer (such as tokenizer.json). Copy the tokenizer's files from where the model "
            f"came from, or write them with the tokenizer's save_pretrained."
        )
    with reading(folder, *TOKENIZER, *TOKENIZER_SETTINGS):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer("a")  # some settings that are wrong raise only when a text is read
        return tokenizer


def read_generation_config(folder: Path) -> GenerationConfig:
    """End tokens, sampling, penalties: from ``generation_config.json``, else from the configuration.

    Raises:
        UserError: If the file is damaged.
    """
    with reading(folder, GENERATION):
        if not (folder / GENERATION).is_file():
            return GenerationConfig.from_model_config(read_config(folder))
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


class NotLoaded(nn.Module):
    """Takes the place of a part of a model that was not read: to run it or to multiply with it is an error.

    Attributes:
        shape: Shape of the matrix that was not read; the size of the vocabulary is read from it.
    """

    def __init__(self, name: str, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.shape = shape
        self._refusal = f"{name} was not loaded with this part of the model. Load a part that has it."

    @property
    def weight(self) -> NotLoaded:
        """Itself: a shape without values. A tensor on the meta device would be multiplied with, without an error."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Refuse to be multiplied with."""
        raise UserError(self._refusal)

    def forward(self, *_: object, **__: object) -> Tensor:
        """Refuse to run."""
        raise UserError(self._refusal)


def part_class(kind: type[PreTrainedModel], row: FamilySpec, span: Span) -> type[PreTrainedModel]:
    """The model class, but its instances are made without the blocks outside of ``span``.

    ``from_pretrained`` makes the model, then reads; only a class can act between the two. Blocks whose weights a
    block of the span shares (Zamba2) are read with it.
    """

    def __init__(model: PreTrainedModel, config: PretrainedConfig) -> None:  # noqa: N807
        kind.__init__(model, config)
        tied: dict[str, str] = model.all_tied_weights_keys
        absent = set(range(config.num_hidden_layers)) - blocks_needed(model, row, span)
        if not absent:
            return
        apart = {name for pair in tied.items() for name in pair if block_of(name, row) in absent}
        model.all_tied_weights_keys = {
            target: source for target, source in tied.items() if not apart & {target, source}
        }
        blocks = model.base_model.get_submodule(row.blocks)
        for index in absent:
            delattr(blocks, str(index))  # the others keep their names
        pattern = rf"(^|\.){row.blocks}\.({'|'.join(map(str, sorted(absent)))})\."
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), pattern}

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def blocks_needed(model: PreTrainedModel, row: FamilySpec, span: Span) -> set[int]:
    """Indices of the blocks of a span, and of those whose weights they share (Zamba2)."""
    wanted, tied = set(range(*span)), model.all_tied_weights_keys.items()
    shared = (block_of(source, row) for target, source in tied if block_of(target, row) in wanted)
    return wanted | {index for index in shared if index is not None}


def block_of(name: str, row: FamilySpec) -> int | None:
    """Index of the block that a tensor belongs to; None if to no block."""
    found = re.search(rf"(^|\.){row.blocks}\.(\d+)\.", name)
    return None if found is None else int(found[2])


def check_report(
    report: dict[str, Any], model: PreTrainedModel, row: FamilySpec, folder: Path, absent: Collection[str] = ()
) -> None:
    """Refuse a model whose weights and configuration do not fit each other.

    transformers would leave missing weights random, and pass over what it has no place for. The latter is harmless
    only where it belongs to another part of a larger model, which is not read at all.

    Raises:
        UserError: Naming the first weights.
    """
    modules = {name for name, _ in model.named_modules()}
    faults = {key: report.get(key) for key in ("missing_keys", "mismatched_keys", "error_msgs")}
    faults["missing_keys"] = set(report["missing_keys"]) - set(absent)
    faults["unexpected_keys"] = [
        key
        for key in report["unexpected_keys"]
        if block_of(key, row) is not None or key.rpartition(".")[0] in modules - {""}
    ]
    found = [f"{key.replace('_', ' ')}: {sorted(map(str, keys))[:3]}" for key, keys in faults.items() if keys]
    if found:
        raise UserError(
            f"{folder} does not fit its own {CONFIG}; {'; '.join(found)}. Fetch the folder again, or mend {CONFIG} "
            f"(tie_word_embeddings, num_hidden_layers, sizes, biases)."
        )


def dtype_of(name: str) -> torch.dtype:
    """A dtype by name.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in DTYPES:
        raise UserError(f"The dtype {name!r} was given; one of {', '.join(DTYPES)} is wanted.")
    return DTYPES[name]


def device_of(name: str) -> torch.device:
    """A device by name.

    Raises:
        UserError: If there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The device {name!r} was given, but cannot be used: {reason} 'cpu' always can.") from error
    return device
