"""A Transformer as a student: exact where its attention stays, attention without a softmax where Mamba-2 takes over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dynamax.backbones.conversion import student_configuration, student_weights
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.mixers import check_devices
from dynamax.types import Span
from tests.tiny import tiny

DEPTH, HEADS, SHARED, SIZE = 6, 4, 2, 8
TEACHERS = ("llama", "llama-tied", "llama-yarn", "mistral-nowindow")


def student(teacher: PreTrainedModel, keep: Sequence[int], seed: int = 0) -> PreTrainedModel:
    config = student_configuration(teacher.config, keep)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=teacher.dtype)
    generator = torch.Generator().manual_seed(seed)
    model.load_state_dict(student_weights(config, teacher.state_dict(), generator=generator))
    return model.eval()


def tokens(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("family", TEACHERS)
def test_a_student_that_keeps_all_attention_is_its_teacher(family: str) -> None:
    teacher = tiny(family)
    twin = student(teacher, range(DEPTH))
    torch.testing.assert_close(twin(tokens()).logits, teacher(tokens()).logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        HFBackbone(twin).reference(tokens(1, 1)), teacher(tokens(1, 1)).logits, atol=1e-12, rtol=0
    )


@torch.no_grad()
def test_biases_of_attention_come_along() -> None:
    teacher = tiny("llama", attention_bias=True)
    torch.testing.assert_close(student(teacher, range(DEPTH))(tokens()).logits, teacher(tokens()).logits)
    mixer = student(teacher, [1]).model.layers[0].mamba
    attention = teacher.model.layers[0].self_attn
    assert torch.equal(mixer.out_proj.bias, attention.o_proj.bias)
    assert torch.equal(mixer.in_proj.bias[3 * 32 : 4 * 32], attention.q_proj.bias)


def test_projections_are_the_teachers() -> None:
    """Gate, input, B, C and step lie in this order in transformers' projection."""
    teacher = tiny("llama")
    for mine, theirs in zip(student(teacher, []).model.layers, teacher.model.layers, strict=True):
        attention = theirs.self_attn
        _, x, b, c, _ = mine.mamba.in_proj.weight.split([32, 32, 32, 32, HEADS])
        for head in range(HEADS):
            rows, shared = slice(head * SIZE, (head + 1) * SIZE), head // (HEADS // SHARED)
            theirs_rows = slice(shared * SIZE, (shared + 1) * SIZE)
            assert torch.equal(x[rows], attention.v_proj.weight[theirs_rows])
            assert torch.equal(b[rows], attention.k_proj.weight[theirs_rows])
        assert torch.equal(c, attention.q_proj.weight)
        assert torch.equal(mine.mamba.out_proj.weight, attention.o_proj.weight)
        assert torch.equal(mine.input_layernorm.weight, theirs.input_layernorm.weight)
        assert torch.equal(mine.shared_mlp.output_linear.weight, theirs.mlp.down_proj.weight)


class Ungated(nn.Module):
    """In the place of the gated norm."""

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        return y


@torch.no_grad()
def test_without_what_is_mambas_own_the_mixer_is_attention_without_a_softmax() -> None:
    teacher = tiny("llama")
    mixer: Any = student(teacher, []).model.layers[2].mamba
    check_devices(mixer)
    attention = teacher.model.layers[2].self_attn
    for parameter in (mixer.conv1d.weight, mixer.conv1d.bias, mixer.D, mixer.in_proj.weight[-HEADS:]):
        parameter.zero_()
    mixer.conv1d.weight[..., -1] = 1.0
    mixer.dt_bias.fill_(math.log(math.e - 1))  # a step of 1
    mixer.A_log.fill_(-60.0)  # no decay
    mixer.act, mixer.activation, mixer.norm = nn.Identity(), None, Ungated()
    h = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (
        projection(h).unflatten(-1, (-1, SIZE)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    k, v = (each.repeat_interleave(HEADS // SHARED, 1) for each in (k, v))
    wanted = (q @ k.transpose(-1, -2)).tril() @ v
    torch.testing.assert_close(
        mixer(h), attention.o_proj(wanted.transpose(1, 2).flatten(-2)), atol=1e-4, rtol=1e-4
    )  # transformers scans in float32


@torch.no_grad()
def test_a_hybrid_runs_block_by_block_as_transformers_runs_it() -> None:
    hybrid = student(tiny("llama"), [1, 4])
    backbone = HFBackbone(hybrid)
    assert [backbone.state_kinds(block) for block in range(DEPTH)] == [
        ("keys",) if block in (1, 4) else ("recurrent",) for block in range(DEPTH)
    ]
    h = backbone.run(backbone.embed(tokens()), Span(0, DEPTH))
    torch.testing.assert_close(backbone.unembed(h), backbone.reference(tokens()), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blocks_below_the_first_converted_one_are_untouched() -> None:
    teacher = tiny("llama")
    mine = HFBackbone(student(teacher, [0, 1, 2]))
    theirs = HFBackbone(teacher)
    states = [each.run(each.embed(tokens()), Span(0, 3)) for each in (mine, theirs)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-12)


def test_mamba_begins_as_mamba_does_and_the_seed_makes_a_difference() -> None:
    first, again, other = (student(tiny("llama"), [], seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {
        name.split("layers.0.")[1] for name in first if not torch.equal(first[name], other[name]) and ".0." in name
    }
    assert differing == {
        f"mamba.{name}" for name in ("dt_bias", "A_log", "conv1d.weight", "conv1d.bias", "in_proj.weight")
    }
    step = nn.functional.softplus(first["model.layers.0.mamba.dt_bias"])
    assert step.min() >= 0.001 - 1e-9
    assert step.max() <= 0.1 + 1e-9
    assert 0 <= first["model.layers.0.mamba.A_log"].min() <= first["model.layers.0.mamba.A_log"].max() <= math.log(16)


def test_smollm2s_own_sizes() -> None:
    config = student_configuration(
        LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
        ),
        range(0, 30, 2),
    )
    assert (config.mamba_n_heads, config.mamba_d_head, config.mamba_d_state, config.mamba_n_groups) == (9, 64, 64, 9)
    assert config.layer_types[:3] == ["full_attention", "linear_attention", "full_attention"]
    assert config.attention_multiplier == 0.125


@pytest.mark.parametrize(
    ("family", "options", "keep", "told"),
    [
        ("qwen3", {}, [], "a qwen3; only llama and mistral"),
        ("mistral", {}, [], "a window"),
        ("llama", {"mlp_bias": True}, [], "mlp_bias True"),
        ("llama", {"head_dim": 16}, [], "4 heads of 16 beside a width of 32"),
        ("llama", {}, [6], "6 blocks; wanted different blocks in 0 to 5"),
        ("llama", {}, [1, 1], "different blocks"),
        ("llama", {}, [-1], "0 to 5"),
    ],
)
def test_what_has_no_place_is_refused(family: str, options: dict, keep: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        student_configuration(tiny(family, **options).config, keep)
