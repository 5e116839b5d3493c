"""GGUF files written here, by the conventions of llama.cpp's converter, and read back."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from dynamax.backbones.gguf import NAMES, halves
from dynamax.backbones.sources import GGUF, Folder
from tests.tiny import tiny

VOCAB = ["<|end|>", "<|im|>", *(chr(i) for i in range(33, 80)), "Ġ", "Ċ", "Ġ1", "AB", "ĊĊ"]
BACK = {theirs: ours for ours, theirs in NAMES.items()}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path / "cache"))


def pairs(weights, heads):
    """Rotary pairs side by side, as llama.cpp's converter stores queries and keys."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def write(path, model, *, kind=Kind.F32, entries=None, extra=None, drop=()):
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCAB)
    writer.add_token_types([3, 3] + [1] * (len(VOCAB) - 2))
    writer.add_token_merges(["Ġ 1", "A B", "Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im|>{{ m['content'] }}{% endfor %}")
    for key, value in (entries or {}).items():
        add = {int: writer.add_uint32, str: writer.add_string, bool: writer.add_bool}[type(value)]
        add(key, value)
    for name, tensor in {**tensors(model), **(extra or {})}.items():
        if name not in drop:
            flat = kind if tensor.ndim == 2 else Kind.F32
            writer.add_tensor(name, gguf.quantize(tensor, flat), raw_dtype=flat)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(model):
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem = name.removesuffix(".weight")
        inside = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
        block, theirs = (f"blk.{inside[1]}.", BACK[inside[2]]) if inside else ("", BACK[stem])
        weights = tensor.numpy()
        heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
        if theirs in heads:
            weights = pairs(weights, heads[theirs])
        found[f"{block}{theirs}.weight"] = np.ascontiguousarray(weights)
    return found


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return tiny("llama", dtype=torch.float32, depth=2, vocab=len(VOCAB), tie_word_embeddings=request.param)


@pytest.fixture
def plain():
    return tiny("llama", dtype=torch.float32, depth=2, vocab=len(VOCAB))


def test_halves_undo_pairs():
    weights = np.arange(48.0).reshape(16, 3)
    assert not np.array_equal(pairs(weights, 2), weights)
    np.testing.assert_array_equal(halves(pairs(weights, 2), 2), weights)


@torch.no_grad()
def test_float32_comes_back_as_it_was(model, tmp_path):
    source = GGUF(str(write(tmp_path / "x.gguf", model)))
    backbone = source.load()
    tokens_BT = torch.arange(20)[None]
    torch.testing.assert_close(backbone.reference(tokens_BT), model(tokens_BT).logits, rtol=0, atol=0)
    assert backbone.model.config.rms_norm_eps == model.config.rms_norm_eps
    assert backbone.model.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert (backbone.model.config.eos_token_id, backbone.model.config.pad_token_id) == (0, 0)
    assert source.output_stage().spec == backbone.spec


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0, Kind.F16])
def test_quantised_weights_are_exact(kind, plain, tmp_path):
    """Every weight equals what the blocks say, by their definition."""
    backbone = GGUF(str(write(tmp_path / "x.gguf", plain, kind=kind))).load()
    up = plain.model.layers[1].mlp.up_proj.weight.detach().numpy()
    wanted = gguf.dequantize(gguf.quantize(up, kind), kind)
    np.testing.assert_array_equal(backbone.model.model.layers[1].mlp.up_proj.weight.numpy(), wanted)
    if kind == Kind.Q4_1:
        np.testing.assert_array_equal(wanted, by_definition(gguf.quantize(up, kind)))


def by_definition(blocks):
    """Q4_1: scale d and offset m in float16, then 16 bytes: low halves are weights 0-15, high 16-31; w = d q + m."""
    rows = []
    for row in blocks:
        for block in row.reshape(-1, 20):
            d, m = block[:4].view(np.float16).astype(np.float32)
            q = np.concatenate([block[4:] & 15, block[4:] >> 4]).astype(np.float32)
            rows.append(d * q + m)
    return np.concatenate(rows).reshape(len(blocks), -1)


def test_the_dense_copy_is_made_once_and_stands_alone(plain, tmp_path, monkeypatch):
    path = write(tmp_path / "x.gguf", plain)
    folder = GGUF(str(path)).folder()
    monkeypatch.setattr("dynamax.backbones.sources.dequantise", None)
    assert GGUF(str(path)).folder() == folder
    path.unlink()
    Folder(str(folder)).load()
    assert Folder(str(folder)).tokenizer()("AB").input_ids == [VOCAB.index("AB")]


def ids(text):
    return [VOCAB.index(token) for token in text]


def test_tokenizer(plain, tmp_path):
    tokenizer = GGUF(str(write(tmp_path / "x.gguf", plain))).tokenizer()
    assert tokenizer("AB 1").input_ids == ids(["AB", "Ġ", "1"])  # digits stand alone
    assert tokenizer("\n\n1<|im|>A").input_ids == ids(["ĊĊ", "1", "<|im|>", "A"])
    assert tokenizer.decode(ids(["<|im|>", "AB", "Ġ"]), skip_special_tokens=True) == "AB "
    chat = [{"role": "user", "content": "AB"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im|>AB"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im|>", "<|end|>", "<|end|>")


def test_tokenizer_that_begins_with_a_token(plain, tmp_path):
    path = write(tmp_path / "x.gguf", plain, entries={"tokenizer.ggml.add_bos_token": True})
    assert GGUF(str(path)).tokenizer()("A").input_ids == ids(["<|im|>", "A"])


@pytest.mark.parametrize(
    ("entries", "ends"),
    [
        ({}, [0]),
        ({"tokenizer.ggml.eot_token_id": 1}, [0, 1]),
        ({"tokenizer.ggml.eot_token_id": 0}, [0]),
        ({"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}, [0, 5, 6]),
    ],
)
def test_every_token_that_ends_an_answer_is_kept(entries, ends, plain, tmp_path):
    source = GGUF(str(write(tmp_path / "x.gguf", plain, entries=entries)))
    assert source.generation_config().eos_token_id == ends
    assert source.tokenizer().eos_token_id == 0


REFUSED = {
    "experts": {"entries": {"llama.expert_count": 4}},
    "rotary scaling 'yarn'": {"entries": {"llama.rope.scaling.type": "yarn"}},
    "rotary frequencies of its own": {"extra": {"rope_freqs.weight": np.ones(4, np.float32)}},
    "which no llama has": {"extra": {"blk.0.attn_q.bias": np.ones(32, np.float32)}},
    "lacks 1 tensors, 'model.layers.1.mlp.up_proj' first": {"drop": ("blk.1.ffn_up.weight",)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_covered_is_refused(reason, plain, tmp_path):
    path = write(tmp_path / "x.gguf", plain, **REFUSED[reason])
    with pytest.raises(ValueError, match=reason):
        GGUF(str(path)).load()
    assert list((tmp_path / "cache" / "dense").iterdir()) == []


def test_other_architectures_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"architecture 'bloom' \(covered: 'llama'\)"):
        GGUF(str(tmp_path / "x.gguf")).load()
