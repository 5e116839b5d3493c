"""Causal language models of transformers as backbones, block by block through the family table.

Knows one loaded model. How it is found, dequantised or read in part is the business of ``sources``
and ``top``.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from dynamax.backbones.base import Backbone
from dynamax.backbones.cache import Cache
from dynamax.backbones.costs import block_cost
from dynamax.backbones.families import FamilySpec, family
from dynamax.backbones.family_state import rotated
from dynamax.backbones.fingerprint import fingerprint_of
from dynamax.backbones.plan import Rotary, StepPlan
from dynamax.backbones.repairs import check_devices
from dynamax.backbones.state import LayerView, StateKind
from dynamax.errors import UserError
from dynamax.kernels.backend import at_least_float32
from dynamax.types import BlockCost, Spec


@final
class HFBackbone(Backbone):
    """A transformers causal language model whose depth is an argument.

    The model is frozen and used as it is: no weight is copied, no module replaced. Recurrent mixers are
    taught to continue (``mixers``), and what transformers gets wrong is put right (``repairs``).

    Args:
        model: The model, loaded with the attention implementation its family asks for.
        fingerprint: Identity of the checkpoint; computed from the model's tensors if left out.

    Attributes:
        model: The wrapped model.
        row: Its row of the family table.

    Raises:
        UserError: If it is no causal language model of transformers, of an unknown family, or with other attention.
    """

    def __init__(self, model: PreTrainedModel, *, fingerprint: str | None = None) -> None:
        super().__init__()
        check_model(model)
        self.row = family(model.config.model_type)
        check_attention(model.config, self.row)
        self.model = model.requires_grad_(False).eval()
        self._blocks = tuple(getattr(model.base_model, self.row.blocks))  # a tuple is not registered a second time
        self._windows = self.row.windows(model.config)
        self._kinds = self.row.rotary_types(model.config)
        self._state_kinds = self.row.state_kinds(model.config)
        self._mixers = tuple(self.row.mixer(block) for block in self._blocks)
        for mixer in self._mixers:
            if mixer is not None:
                check_devices(mixer.module)
                mixer.install()
        self.additive_masks = model.config._attn_implementation == "eager"
        if fingerprint is None:
            fingerprint = fingerprint_of(model.config, model.state_dict())
        self.spec = spec_of(model.config, vocab=self.output_matrix.shape[0], fingerprint=fingerprint)

    @property
    def output_matrix(self) -> Tensor:
        """The output matrix ``W_VD``, which may be the embedding matrix as well."""
        output = self.model.get_output_embeddings()
        assert output is not None, "a causal language model has an output matrix"
        return output.weight

    def reference(self, tokens_BT: Tensor) -> Tensor:
        """Logits of one pass by transformers' own forward, to check this class against."""
        return self.model(tokens_BT, use_cache=False).logits

    @property
    def rotary(self) -> Rotary | None:
        """The model's rotary angles; None for a model without."""
        return self.row.rotary(self.model.base_model)

    def embed(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Tokens to ``h_BTD``, the input of block 0, at the positions that follow the cache's."""
        h_BTD = getattr(self.model.base_model, self.row.embedding)(tokens_BT)
        plan = self.plan(h_BTD, cache, start=0 if cache is None else cache.length)
        return self.row.after_embedding(self.model.base_model, h_BTD, plan)

    def block(self, index: int, h_BTD: Tensor, plan: StepPlan, view: LayerView) -> Tensor:
        """One block over one chunk. ``view`` takes its keys and values, and advances its recurrent state."""
        return self.row.call_block(self._blocks[index], h_BTD, index, self._options(index, plan, view))

    def _options(self, index: int, plan: StepPlan, view: LayerView) -> dict[str, Any]:
        return {
            "attention_mask": view.mask,
            "position_ids": plan.positions_BT,
            "position_embeddings": plan.angles(self._kinds[index]),
            self.row.cache_argument: view,
        }

    def write_state(self, index: int, h_BTD: Tensor, plan: StepPlan, view: LayerView) -> None:
        """Norm and projections of one block alone: what its keys, values and recurrent state are made of."""
        block, mixer = self._blocks[index], self._mixers[index]
        if self.row.write is not None and len(self._state_kinds[index]) > 1:
            assert mixer is not None, "a block that keeps both has a mixer"
            self.row.write(block, h_BTD, index, self._options(index, plan, view), view, mixer)
            return
        u_BTD = self.row.residual_stream(self.model.config, h_BTD)
        if self.row.input_norm is not None:
            norm: Any = block.get_submodule(self.row.input_norm)
            u_BTD = norm(u_BTD.to(norm.weight.dtype))
        if mixer is not None:
            mixer.write(u_BTD, view)
        if "keys" in self._state_kinds[index]:
            k_BHTD, v_BHTD = self.row.keys_and_values(block, u_BTD)
            angles = plan.angles(self._kinds[index])
            view.update(k_BHTD if angles is None else rotated(block, k_BHTD, angles), v_BHTD)

    def state_kinds(self, index: int) -> tuple[StateKind, ...]:
        """What the block keeps."""
        return self._state_kinds[index]

    def window(self, index: int) -> int | None:
        """Positions a row of this block sees, its own included; None for all."""
        return self._windows[index]

    def normalize(self, h_BTD: Tensor) -> Tensor:
        """The final norm."""
        return getattr(self.model.base_model, self.row.final_norm)(self.row.residual_stream(self.model.config, h_BTD))

    def project(self, u_BTD: Tensor, tokens_C: Tensor | None = None) -> Tensor:
        """Normalised states to logits, over the vocabulary or over candidate tokens.

        The product is taken in the model's dtype; the logits are float32, or float64 for a float64 model.
        """
        matrix_VD = self.output_matrix
        logits = F.linear(u_BTD.to(matrix_VD.dtype), matrix_VD if tokens_C is None else matrix_VD[tokens_C])
        return self.row.scale_logits(self.model.config, at_least_float32(logits))

    def block_cost(self, index: int) -> BlockCost:
        """What the block costs."""
        config, held = self.model.config, self._blocks[index].named_parameters()
        return block_cost(
            config,
            {name: parameter for name, parameter in held if self.row.uses_parameter(config, index, name)},
            self._state_kinds[index],
            mixer=self._mixers[index],
            window=self._windows[index],
            share=self.row.expert_share(config),
            runs_to_write=self.row.write is not None,
        )

    def shift_keys(self, k_BHTD: Tensor, index: int) -> Tensor:
        """Keys of one block as they would stand one position later; unchanged without rotary positions."""
        rotary = self.rotary
        if rotary is None:
            return k_BHTD
        one_11 = torch.ones(1, 1, dtype=torch.long, device=k_BHTD.device)
        precise_BHTD = at_least_float32(k_BHTD)
        cos_11R, sin_11R = rotary(precise_BHTD, one_11, self._kinds[index])
        length = torch.hypot(cos_11R, sin_11R)  # not 1 where angles are scaled, and keys carry it already
        turned, kept = precise_BHTD.tensor_split([cos_11R.shape[-1]], -1)
        low, high = turned.chunk(2, -1)
        turned = (turned * cos_11R + torch.cat([-high, low], -1) * sin_11R) / length
        return torch.cat([turned, kept], -1).to(k_BHTD.dtype)


def check_model(model: object) -> None:
    """Refuse what is no causal language model of transformers.

    Raises:
        UserError: If it is something else, or has no output matrix.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"HFBackbone was given {model!r:.80}; wanted: a model of transformers. To load one by name use "
            f"dynamax.backbones.sources.Hub, from a folder Folder."
        )
    if model.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__} has no output matrix; wanted: a causal language model. Load it with "
            f"AutoModelForCausalLM."
        )


def spec_of(config: PretrainedConfig, *, vocab: int, fingerprint: str) -> Spec:
    """What a configuration tells of a backbone."""
    return Spec(
        family=config.model_type,
        depth=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=vocab,
        context=context_of(config),
        fingerprint=fingerprint,
    )


def context_of(config: PretrainedConfig) -> int:
    """Longest exact sequence.

    LongRoPE turns *all* keys by other angles once a sequence outgrows the original context, and keys in
    a cache are turned already; so the original context is where exactness ends.
    """
    known = config.to_dict()
    rope = known.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return known.get("max_position_embeddings") or UNBOUNDED


UNBOUNDED = 1 << 30
"""Context of a model that has no positions to run out of."""


def check_attention(config: PretrainedConfig, row: FamilySpec) -> None:
    """Refuse an attention implementation that takes other masks, or would drop a part of the model.

    Raises:
        UserError: If the implementation is neither the row's own nor eager.
    """
    given = config._attn_implementation
    if given not in (row.attention, "eager"):
        wanted = row.attention if row.attention == "eager" else f"{row.attention} or eager"
        raise UserError(
            f"A {config.model_type} model was loaded with attention {given!r}; {wanted} is wanted. "
            f"Load it with attn_implementation={row.attention!r}, or call "
            f"model.set_attn_implementation({row.attention!r}) first."
        )
