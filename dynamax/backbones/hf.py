"""Causal language models of transformers as backbones, block by block through the family table.

Knows one loaded model. How it is found, dequantised or read in part is the business of ``sources`` and ``loading``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from dynamax.backbones.attention_functions import AttentionCost
from dynamax.backbones.base import Backbone
from dynamax.backbones.cache import AnyCache
from dynamax.backbones.checkpoint import fingerprint_of
from dynamax.backbones.families import FamilySpec, family
from dynamax.backbones.mixers import MixerCost
from dynamax.backbones.plan import Plan, Rotary
from dynamax.backbones.recorded import Recordings
from dynamax.backbones.state import HeldView, LayerView, StateKind
from dynamax.errors import UserError
from dynamax.kernels import at_least_float32
from dynamax.kernels.products import Product
from dynamax.types import BlockCost, Spec


@final
class HFBackbone(Backbone):
    """A transformers causal language model whose depth is an argument.

    The model is frozen and used as it is: no weight is copied, no module replaced. Recurrent mixers are
    made to continue from a state, and what transformers gets wrong in them is corrected (``mixers``).

    Args:
        model: The model, loaded with the attention implementation its family asks for.
        fingerprint: Identity of the checkpoint; computed from the model's tensors if left out.

    Attributes:
        model: The wrapped model.
        row: Its row of the family table.

    Raises:
        UserError: If it is no causal language model of transformers, of an unknown family, or with other attention.
    """

    _slopes: Tensor | None

    def __init__(self, model: PreTrainedModel, *, fingerprint: str | None = None) -> None:
        super().__init__()
        self.row = check_model(model)
        self.model = model.requires_grad_(False).eval()
        config = model.config
        blocks = model.base_model.get_submodule(self.row.blocks)
        self._blocks = tuple(blocks.children())  # a tuple is not registered a second time
        slopes = self.row.slopes(config)
        self.register_buffer("_slopes", slopes if slopes is None else slopes.to(model.device), persistent=False)
        self._windows = self.row.windows(config)
        self._rotary_types = self.row.rotary_types(config)
        self._state_kinds = self.row.state_kinds(config)
        self.recordings: Recordings | None = None
        self._costs: list[BlockCost] = []
        self._weight_bytes: float | None = None
        self._mixers = tuple(self.row.mixer(block) for block in self._blocks)
        self._input_norms = tuple(self._input_norm(block) for block in self._blocks)
        self._check_rotary()
        self.additive_masks = config._attn_implementation == "eager"
        self.spec = Spec(
            family=config.model_type,
            depth=config.num_hidden_layers,
            width=config.hidden_size,
            vocab=self.output_matrix.shape[0],
            context=context_of(config),
            fingerprint=fingerprint_of(config, model.state_dict()) if fingerprint is None else fingerprint,
        )

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("row", "captured")  # functions without names, and graphs over these very weights
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.row = family(self.spec.family)

    @property
    def output_matrix(self) -> Tensor:
        """The output matrix ``W_VD``, which may be the embedding matrix as well."""
        output: Any = self.model.get_output_embeddings()
        return output.dense() if isinstance(output, Product) else output.weight

    def reference(self, tokens_BT: Tensor) -> Tensor:
        """Logits of one pass by transformers' own forward, to check this class against."""
        return self.model(tokens_BT, use_cache=False).logits

    @property
    def rotary(self) -> Rotary | None:
        """The model's rotary angles; None for a model without."""
        return self._rotary(self.model.base_model)

    def _rotary(self, base: nn.Module) -> Rotary | None:
        try:
            return self.row.rotary(base)
        except AttributeError as error:  # would be taken for a missing attribute of this class
            raise self._wrong_rotary(f"finds none: {error}") from error

    def _check_rotary(self) -> None:
        """Refuse a row whose rotary angles are not the model's."""
        base: Any = self.model.base_model
        rotary = self._rotary(base)
        if rotary is None:
            if "rotary_emb" in dict(base.named_children()):
                raise self._wrong_rotary("says that there are none, but the model has a rotary_emb")
            return
        weight = next(self.model.parameters())
        for kind in set(self._rotary_types):
            try:
                rotary(weight[:0], torch.zeros(1, 1, dtype=torch.long, device=weight.device), kind)
            except (AttributeError, KeyError, TypeError) as error:
                raise self._wrong_rotary(f"cannot ask for those of the kind {kind}: {error}") from error

    def _wrong_rotary(self, fault: str) -> UserError:
        return UserError(
            f"Rotary angles of {self.model.config.model_type}: its row of the family table {fault}. Set rotary, and "
            f"rotary_types where blocks have angles of their own."
        )

    @contextmanager
    def short_windows(self, window: int) -> Iterator[bool]:
        """Inside, ``sliding_window`` of the configuration is this short; False if it names none."""
        config, known = self.model.config, self._windows
        if (length := getattr(config, "sliding_window", None)) is None:
            yield False
            return
        try:
            config.sliding_window = window
            self._windows = self.row.windows(config)
            yield True
        finally:
            config.sliding_window, self._windows = length, known

    @property
    def slopes(self) -> Tensor | None:
        """ALiBi's slopes ``[H]``; None for a model without."""
        return self._slopes

    def embed(self, tokens_BT: Tensor, cache: AnyCache | None = None) -> Tensor:
        """Tokens to ``h_BTD``, the input of block 0, at the positions that follow the cache's."""
        h_BTD = self.model.base_model.get_submodule(self.row.embedding)(tokens_BT)
        plan = self.plan(h_BTD, cache, start=0 if cache is None else cache.before(0))
        return self.row.after_embedding(self.model.base_model, h_BTD, plan)

    def block(self, index: int, h_BTD: Tensor, plan: Plan, view: LayerView) -> Tensor:
        """One block over one chunk. ``view`` takes its keys and values, and advances its recurrent state."""
        if self.recordings is None or not isinstance(view, HeldView) or not self.recordings.suits(plan):
            return self._call(index, plan, h_BTD, view)
        angles = plan.angles(self._rotary_types[index])
        return self.recordings.run(index, h_BTD, plan, view, angles, partial(self._call, index, plan))

    def _call(self, index: int, plan: Plan, h_BTD: Tensor, view: LayerView) -> Tensor:
        return self.row.call_block(self._blocks[index], h_BTD, index, self._options(index, plan, view))

    def _options(self, index: int, plan: Plan, view: LayerView) -> dict[str, Any]:
        return {
            "attention_mask": view.mask,
            "position_ids": plan.positions_BT,
            "position_embeddings": plan.angles(self._rotary_types[index]),
            self.row.cache_argument: view,
        }

    def write_state(self, index: int, h_BTD: Tensor, plan: Plan, view: LayerView) -> None:
        """Only norm and projections of the block run: what its keys, values and recurrent state are made of."""
        block, mixer = self._blocks[index], self._mixers[index]
        if self.row.write is not None and len(self._state_kinds[index]) > 1:
            assert mixer is not None, "a block that keeps both has a mixer"
            self.row.write(block, h_BTD, index, self._options(index, plan, view), view, mixer)
            return
        u_BTD = self.row.residual_stream(self.model.config, h_BTD)
        if (name := self._input_norms[index]) is not None:
            norm = block.get_submodule(name)
            weight = norm._parameters.get("weight")
            u_BTD = norm(u_BTD if weight is None else u_BTD.to(weight.dtype))
        if mixer is not None:
            mixer.write(u_BTD, view)
        if "keys" in self._state_kinds[index]:
            k_BHTD, v_BHTD = self.row.keys_and_values(block, u_BTD)
            angles = plan.angles(self._rotary_types[index])
            view.update(*((k_BHTD, v_BHTD) if angles is None else self._turned(index, k_BHTD, v_BHTD, *angles)))

    def _input_norm(self, block: nn.Module) -> str | None:
        """Name of the norm that the block's input passes before it is projected."""
        names = self.row.input_norm
        if names is None or isinstance(names, str):
            return names
        held = dict(block.named_children())
        return next((name for name in names if name in held), None)  # a block that is left out of a part holds nothing

    def _turned(
        self, index: int, k_BHTD: Tensor, v_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, whichever of them has positions turned by these angles."""
        block, turn = self._blocks[index], self.row.turn
        if self.row.turned == "values":
            return k_BHTD, turn(block, v_BHTD, cos_BTR, sin_BTR)
        return turn(block, k_BHTD, cos_BTR, sin_BTR), v_BHTD

    def state_kinds(self, index: int) -> tuple[StateKind, ...]:
        """What the block keeps."""
        return self._state_kinds[index]

    def window(self, index: int) -> int | None:
        """Positions a row of this block sees, its own included; None for all."""
        return self._windows[index]

    def normalize(self, h_BTD: Tensor) -> Tensor:
        """The final norm."""
        norm = self.model.base_model.get_submodule(self.row.final_norm)
        return norm(self.row.residual_stream(self.model.config, h_BTD))

    def project(self, u_BTD: Tensor, tokens_C: Tensor | slice | None = None) -> Tensor:
        """Normalised states to logits, over the vocabulary or over some tokens: their ids, or a slice of all ids.

        The product is taken in the model's dtype; the logits are float32, or float64 for a float64 model.
        """
        output: Any = self.model.get_output_embeddings()
        bias_C: Tensor | None = getattr(output, "bias", None)
        bias_C = bias_C if bias_C is None or tokens_C is None else bias_C[tokens_C]
        if not isinstance(output, Product):
            matrix_CD = output.weight if tokens_C is None else output.weight[tokens_C]
            logits = F.linear(u_BTD.to(matrix_CD.dtype), matrix_CD, bias_C)
        elif tokens_C is None:
            logits = output(u_BTD)
        elif isinstance(tokens_C, slice) and output.repacks:
            logits = output.part(u_BTD, tokens_C.indices(self.spec.vocab)[:2])
        else:
            logits = F.linear(u_BTD, output.rows(tokens_C), bias_C)
        return self.row.scale_logits(self.model.config, at_least_float32(logits))

    def block_cost(self, index: int) -> BlockCost:
        """What the block costs: products only; norms and biases are left out."""
        return self._costs[index] if self._costs else self._cost(index)

    def freeze_costs(self, weight_bytes: float | None) -> None:
        """Keep what blocks cost, since packed weights cannot be counted; each of them takes ``weight_bytes``."""
        self._costs = [self._cost(index) for index in range(self.spec.depth)]
        self._weight_bytes = weight_bytes

    @property
    def weight_bytes(self) -> float:
        """Bytes that a product reads for each weight."""
        return super().weight_bytes if self._weight_bytes is None else self._weight_bytes

    def _cost(self, index: int) -> BlockCost:
        config, mixer, block = self.model.config, self._mixers[index], self._blocks[index]
        held = [pair for pair in block.named_parameters() if self.row.uses_parameter(config, index, pair[0])]
        plain, experts = linear_weights(held, 2), linear_weights(held, 3)
        attention = AttentionCost(0, 0, 0)
        if "keys" in self._state_kinds[index]:
            attention = self.row.attention_cost(config, block)
        write = attention.write
        mixed = MixerCost(0, 0, 0)
        if mixer is not None:
            mixed = mixer.cost()
            if self.row.write is not None:  # all of the block but its mixer runs where only the state is wanted
                write = plain - linear_weights(mixer.module.named_parameters(), 2)
        return BlockCost(
            weights=plain + experts,
            active=plain - attention.unfolding + round(experts * self.row.expert_share(config)),
            scores=attention.scores,
            keys=attention.keys,
            window=self._windows[index],
            write=write + mixed.write,
            state=mixed.state,
            scan=mixed.scan,
        )

    def shift(self, k_BHTD: Tensor, v_BHTD: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one block as they would stand one position later; unchanged without rotary positions."""
        rotary = self.rotary
        if rotary is None:
            return k_BHTD, v_BHTD
        one_11 = torch.ones(1, 1, dtype=torch.long, device=k_BHTD.device)
        precise = at_least_float32(k_BHTD), at_least_float32(v_BHTD)
        cos_11R, sin_11R = rotary(precise[0], one_11, self._rotary_types[index])
        length = torch.hypot(cos_11R, sin_11R)  # not 1 where angles are scaled, and keys carry it already
        k, v = self._turned(index, *precise, cos_11R / length, sin_11R / length)
        return k.to(k_BHTD.dtype), v.to(v_BHTD.dtype)


def check_model(model: object) -> FamilySpec:
    """The row of a model's family; refuses what cannot be driven block by block.

    Raises:
        UserError: If it is no causal language model of transformers, its family is unknown, or it has an attention
            implementation that takes other masks, or would drop a part of the model.
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
    given, row = model.config._attn_implementation, family(model.config.model_type)
    if (reason := row.refuse(model.config)) is not None:
        raise UserError(
            f"This {model.config.model_type} cannot be driven block by block: {reason}. Use another model, or write a "
            f"Backbone of your own."
        )
    if given not in (row.attention, "eager"):
        wanted = row.attention if row.attention == "eager" else f"{row.attention} or eager"
        raise UserError(
            f"A {model.config.model_type} model was loaded with attention {given!r}; {wanted} is wanted. "
            f"Load it with attn_implementation={row.attention!r}, or call "
            f"model.set_attn_implementation({row.attention!r}) first."
        )
    return row


def linear_weights(parameters: Iterable[tuple[str, nn.Parameter]], dimensions: int) -> int:
    """Weights of linear layers (matrices) or of experts (three dimensions).

    A convolution's taps and Mamba's decays are left out: they are counted with the scan. So are the biases of experts.
    """
    scanned = re.compile(r"(^|\.)(A_log|conv1d\.\w+|conv\.conv\.\w+|\w*bias)$")
    return sum(p.numel() for name, p in parameters if p.ndim == dimensions and not scanned.search(name))


def context_of(config: PretrainedConfig) -> int:
    """Longest exact sequence.

    LongRoPE turns *all* keys by other angles once a sequence outgrows the original context, and keys in
    a cache are turned already; so the original context is where exactness ends.
    """
    known = config.to_dict()
    rope = known.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", None) or UNBOUNDED  # GPT-2 has it under another name


UNBOUNDED = 1 << 30
"""Context of a model that has no positions to run out of."""
