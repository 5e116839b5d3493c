"""The top of a backbone alone: last block, final norm, output matrix. All that exit heads are trained with.

The other blocks are never read, let alone allocated. Knows model folders.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from dynamax.backbones.checkpoint import Checkpoint
from dynamax.backbones.families import FamilySpec, family
from dynamax.backbones.fingerprint import fingerprint_of
from dynamax.backbones.hf import HFBackbone, spec_of
from dynamax.backbones.loading import check_report, config_of, device_of, dtype_of, exact_experts
from dynamax.errors import UserError
from dynamax.types import Site, Span, Spec


@final
class OutputStage(nn.Module):
    """Last block, final norm and output matrix of a backbone.

    Args:
        last: A backbone of one block, the last.
        spec: Facts about the whole backbone.

    Attributes:
        spec: The same; equal to that of the whole backbone.
    """

    def __init__(self, last: HFBackbone, spec: Spec) -> None:
        super().__init__()
        self._last = last
        self.spec = spec

    def site(self, depth: int) -> Site:
        """The place after ``depth`` blocks, as ``Backbone.site`` gives it without a cache."""

        def last_block(h_BTD: Tensor) -> Tensor:
            return self._last.run(h_BTD, Span(0, 1))

        return Site(depth, self.spec, self._last.normalize, self._last.project, last_block)


def load_output_stage(folder: Path, *, dtype: str, device: str) -> OutputStage:
    """Load the top of a model folder.

    transformers builds a model of one block, so that names, fused experts and rotary angles are its own.

    Raises:
        UserError: If the family is unknown, or a weight is missing.
    """
    kind, place = dtype_of(dtype), device_of(device)
    config = config_of(folder)
    row = family(config.model_type)
    tensors = Checkpoint(folder)
    kind_of_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    names, matrix = top_names(config, row, tensors, ties=bool(kind_of_model._tied_weights_keys))
    model, report = kind_of_model.from_pretrained(
        None,
        config=one_block(config),
        state_dict={new: tensors[old] for new, old in names.items()},
        dtype=kind,
        attn_implementation=row.attention,
        output_loading_info=True,
    )
    check_report(report, folder)
    fingerprint = fingerprint_of(config, tensors)
    last = HFBackbone(exact_experts(model), fingerprint=fingerprint).to(place)
    return OutputStage(last, spec_of(config, vocab=tensors.shape(matrix)[0], fingerprint=fingerprint))


def one_block(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration cut down to the last block, the output matrix tied to the embedding's place.

    Raises:
        UserError: If the block is what it is by its index, or by weights of others, which a single block would lose.
    """
    known: dict[str, Any] = config.to_dict()
    if known.get("scale_attn_by_inverse_layer_idx") or kind_of_last(config) == "zamba2 hybrid":
        raise UserError(
            f"The top of this {config.model_type} cannot stand alone: its last block is scaled by its index, or shares "
            f"its weights with others. Load the whole backbone instead."
        )
    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    for name, value in like_last(config, known).items():
        setattr(single, name, value)
    single.tie_word_embeddings = True
    return single


def kind_of_last(config: PretrainedConfig) -> str:
    """Model type and layer type of the last block."""
    kinds = getattr(config, "layer_types", None)
    return f"{config.model_type} {kinds[-1]}" if kinds else config.model_type


def like_last(config: PretrainedConfig, known: dict[str, Any]) -> dict[str, Any]:
    """Entries by which block 0 of a configuration becomes what the last block of this one is."""
    last = config.num_hidden_layers - 1
    told = {name: known[name][-1:] for name in ("layer_types", "layers_block_type") if known.get(name)}
    if "attn_layer_indices" in known:
        told["attn_layer_indices"] = [0] if last in (known["attn_layer_indices"] or []) else []
    for kind in ("attn", "expert"):
        period, offset = f"{kind}_layer_period", f"{kind}_layer_offset"
        if period in known:  # every block is such a one, or every other from the second on
            told[period], told[offset] = (1, 0) if last % known[period] == known[offset] else (2, 1)
    if "hybrid_layer_ids" in known:
        told["hybrid_layer_ids"] = []
    return told


def top_names(
    config: PretrainedConfig, row: FamilySpec, tensors: Checkpoint, *, ties: bool
) -> tuple[Mapping[str, str], str]:
    """What to read: names in a one-block model to names on disk, and the name of the output matrix on disk.

    The output matrix is read in the embedding's place, where it is tied from (a type that ``ties`` nothing
    reads it twice), so that an embedding of its own is never read.
    """
    numbered = re.compile(rf"(^|\.){row.blocks}\.(\d+)\.")
    last = config.num_hidden_layers - 1
    names: dict[str, str] = {}
    for name in tensors:
        found = numbered.search(name)
        if found is None:
            names[name] = name
        elif int(found[2]) == last:
            names[numbered.sub(rf"\g<1>{row.blocks}.0.", name)] = name
    embedding = next(name for name in names if name.endswith(f"{row.embedding}.weight"))
    shape = tensors.shape(embedding)
    twins = [name for name, old in names.items() if name != embedding and tensors.shape(old) == shape]
    matrix = embedding
    for twin in twins:  # lm_head, embed_out: whatever it is called on disk
        old = names.pop(twin)
        matrix = matrix if config.tie_word_embeddings and ties else old
        if not ties:
            names[twin] = matrix
    return {**names, embedding: matrix}, matrix
