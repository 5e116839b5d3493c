"""Transformers' models as backbones: what the contract does not already say."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dynamax.backbones.checkpoint import fingerprint_of
from dynamax.backbones.families import family
from dynamax.backbones.hf import HFBackbone, context_of
from dynamax.types import Span
from tests.float64 import upcast64
from tests.tiny import FAMILIES, RECURRENT, WINDOW, tiny

TOKENS_BT = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))


def test_unknown_family_names_near_and_known():
    with pytest.raises(
        ValueError, match=r"'lama' is not in the family table. Did you mean .*llama.*Known: .*starcoder2"
    ):
        family("lama")


def test_frozen_and_in_eval_whatever_is_asked():
    backbone = HFBackbone(tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5))
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_gradients_pass_through():
    backbone = HFBackbone(tiny("llama"))
    h_BTD = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)
    site = backbone.site(3)
    site.project(site.normalize(site.last_blocks(h_BTD, 1))).sum().backward()
    assert h_BTD.grad.abs().sum() > 0


def test_nothing_is_copied_or_registered_twice():
    model = tiny("llama-tied")
    backbone = HFBackbone(model)
    assert backbone.output_matrix.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert list(backbone.state_dict()) == [f"model.{name}" for name in model.state_dict()]


@pytest.mark.parametrize("family", ["llama", "mamba2", "jamba", "falcon_h1", "lfm2", "zamba2"])
def test_a_copy_stands_alone(family):
    backbone = HFBackbone(tiny(family))
    said = backbone.unembed(backbone.run(backbone.embed(TOKENS_BT), Span(0, 6)))
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for tensor in (*backbone.parameters(), *backbone.buffers()):
            tensor.zero_()
    assert other.unembed(other.run(other.embed(TOKENS_BT), Span(0, 6))).equal(said)


def test_what_is_no_causal_language_model_is_refused():
    with pytest.raises(ValueError, match="given 'someone/some-model'; wanted: a model of transformers"):
        HFBackbone("someone/some-model")
    with pytest.raises(ValueError, match="LlamaModel has no output matrix"):
        HFBackbone(tiny("llama").model)


def test_no_positions_are_refused():
    backbone = HFBackbone(tiny("mamba2"))
    with pytest.raises(ValueError, match="no positions"):
        backbone.run(backbone.embed(TOKENS_BT)[:, :0], Span(0, 6), backbone.new_cache())


@pytest.mark.parametrize("family", ["llama-eager", "gemma2"])
def test_a_chunk_of_padding_alone_is_a_number_in_half_precision(family):
    """Scores are added to the mask's least value; were it the least there is, the sum would be infinite."""
    for seed in range(10):
        model = tiny(family, dtype=torch.float16, seed=seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "q_proj" in name or "k_proj" in name:
                    parameter.mul_(3)
        backbone = HFBackbone(model)
        cache = backbone.new_cache(pad_B=torch.tensor([0, 4]))
        for chunk_BT in torch.randint(0, 61, (2, 14)).split([2, 1, 11], 1):
            h_BTD = backbone.run(backbone.embed(chunk_BT, cache), Span(0, 6), cache)
        assert h_BTD.isfinite().all()


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_other_attention_is_refused(implementation):
    model = tiny("llama")
    model.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=f"attention '{implementation}'; sdpa or eager is wanted"):
        HFBackbone(model)


def test_gemma2_must_be_eager():
    model = tiny("gemma2")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match="eager is wanted"):
        HFBackbone(model)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_logits_are_float32_at_least(dtype, wanted):
    backbone = HFBackbone(tiny("llama", dtype=dtype))
    assert backbone.unembed(backbone.embed(TOKENS_BT)).dtype == wanted


WINDOWS = {
    "llama": [None] * 6,
    "mistral": [WINDOW] * 6,
    "mistral-nowindow": [None] * 6,
    "qwen2": [None] * 6,
    "qwen2-window": [None, WINDOW] * 3,
    "gemma2": [WINDOW, None] * 3,
    "gemma3_text": [WINDOW, WINDOW, None] * 2,
    "phi3": [WINDOW] * 6,
    "starcoder2-nowindow": [None] * 6,
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name):
    backbone = HFBackbone(tiny(name))
    assert [backbone.window(index) for index in range(6)] == WINDOWS[name]
    assert [backbone.block_cost(index).window for index in range(6)] == WINDOWS[name]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in RECURRENT])
def test_shifted_keys_are_those_of_the_next_position(name):
    """The same rows, one position later: a padded row starts a position earlier than its neighbour."""
    with upcast64(), torch.no_grad():
        backbone = HFBackbone(tiny(name))
        index = 2
        h_BTD = torch.randn(1, 5, 32, dtype=torch.float64).repeat(2, 1, 1)
        cache = backbone.new_cache(pad_B=torch.tensor([1, 0]))
        cache.group.filled = [8] * 6  # past the padding
        backbone.write(h_BTD, index, cache)
        held = cache.states[index].keys.read(8, 13)
        shifted = backbone.shift(*(x_BHTD[:1] for x_BHTD in held), index)
    for got_BHTD, wanted_BHTD in zip(shifted, held, strict=True):
        torch.testing.assert_close(got_BHTD, wanted_BHTD[1:], atol=1e-12, rtol=1e-12)


def test_shape_counts_what_is_there():
    width, inner, heads, keys, size = 32, 64, 4, 2, 8
    shape = HFBackbone(tiny("llama")).block_cost(0)
    projections = width * size * (heads + 2 * keys)
    assert shape.weights == shape.active == projections + heads * size * width + 3 * width * inner
    assert (shape.write, shape.keys, shape.scores) == (width * size * 2 * keys, 2 * keys * size, 2 * heads * size)


def test_only_some_experts_are_active():
    shape = HFBackbone(tiny("mixtral")).block_cost(0)
    one_expert = 3 * 32 * 64
    assert shape.weights - shape.active == 2 * one_expert


def test_longrope_ends_where_its_angles_change():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    options = {"max_position_embeddings": 512, "original_max_position_embeddings": 64}
    model = tiny("phi3", rope_parameters={**rope, "original_max_position_embeddings": 64}, **options)
    assert context_of(model.config) == 64
    assert context_of(tiny("llama").config) == 512


# -- fingerprint ------------------------------------------------------------------------------------


def print_of(model):
    return HFBackbone(model).spec.fingerprint


def test_fingerprint_is_the_checkpoints_not_the_runs():
    prints = {print_of(tiny("llama", dtype=torch.float32).to(dtype)) for dtype in (torch.float64, torch.bfloat16)}
    assert prints == {print_of(tiny("llama", dtype=torch.float32))}


def test_fingerprint_tells_checkpoints_apart():
    models = [
        tiny("llama", dtype=torch.float32),
        tiny("llama", dtype=torch.float32, seed=1),
        tiny("llama", dtype=torch.float32, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        tiny("mistral", dtype=torch.float32),
        tiny("mistral-nowindow", dtype=torch.float32),
        tiny("gpt_neox", dtype=torch.float32),
        tiny("gpt_neox-sequential", dtype=torch.float32),
    ]
    one_weight = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        one_weight.model.layers[2].mlp.up_proj.weight[3, 3] += 1
    assert len({print_of(model) for model in [*models, one_weight]}) == len(models) + 1


def test_a_tied_matrix_may_be_stored_twice():
    model = tiny("llama-tied", dtype=torch.float32)
    state = dict(model.state_dict())
    assert "lm_head.weight" in state
    with_copy = fingerprint_of(model.config, state)
    state.pop("lm_head.weight")
    assert with_copy == fingerprint_of(model.config, state)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "zamba2", "falcon_h1"])
def test_a_backbone_can_be_pickled(name):
    backbone = HFBackbone(tiny(name))
    other = pickle.loads(pickle.dumps(backbone))
    assert other.row == backbone.row
    wanted = backbone.unembed(backbone.run(backbone.embed(TOKENS_BT), Span(0, 6)))
    assert other.unembed(other.run(other.embed(TOKENS_BT), Span(0, 6))).equal(wanted)


def test_gpt2_has_its_context_under_another_name() -> None:
    assert context_of(tiny("gpt2").config) == 512
