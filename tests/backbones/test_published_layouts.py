"""Folders laid out as published Mamba checkpoints are, with small random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from dynamax.backbones import sources
from dynamax.backbones.sources import Folder, Hub
from dynamax.types import Span
from tests.tiny import redraw

CODESTRAL = {
    "architectures": ["Mamba2ForCausalLM"],
    "bos_token_id": 0,
    "chunk_size": 256,
    "conv_kernel": 4,
    "eos_token_id": 0,
    "expand": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.1,
    "intermediate_size": 64,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 2,
    "norm_before_gate": True,
    "num_heads": 8,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "state_size": 16,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 2,
    "time_step_scale": 1.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 61,
}
"""Codestral's published configuration, sizes made small; ``time_step_limit`` is bare Infinity in JSON."""

MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 4,
    "d_inner": 64,
    "d_model": 32,
    "eos_token_id": 0,
    "expand": 2,
    "fused_add_norm": True,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba",
    "n_layer": 4,
    "num_hidden_layers": 4,
    "pad_vocab_size_multiple": 8,
    "residual_in_fp32": True,
    "rms_norm": True,
    "ssm_cfg": {},
    "state_size": 4,
    "time_step_rank": 2,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 61,
}
"""The same of ``state-spaces/mamba-*-hf``, with the names of the code it was converted from."""

TOKENS = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(1))


def small(kind: type[PreTrainedModel], config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config)  # pyright: ignore[reportArgumentType]
    redraw(model, seed=0)
    return model.eval()


@pytest.fixture
def codestral(tmp_path: Path) -> Path:
    """Shards with an index; all weights once more under other names; a tokenizer in two forms."""
    known = {name: value for name, value in CODESTRAL.items() if name not in ("architectures", "torch_dtype")}
    model = small(Mamba2ForCausalLM, Mamba2Config(**known))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "config.json").write_text(json.dumps(CODESTRAL))
    renamed = {name.replace("backbone.layers", "layers"): t.clone() for name, t in model.state_dict().items()}
    save_file(renamed, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 4, "vocab_size": 61}))
    (tmp_path / "tokenizer.model.v3").write_bytes(b"not read")
    write_tokenizer(tmp_path)
    return tmp_path


def write_tokenizer(folder: Path) -> None:
    """A Llama tokenizer as Mistral ships it: pieces that begin with a lower bar, byte fallback, no chat template."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(32)], "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    made = Tokenizer(
        models.BPE(dict(zip(pieces, range(61), strict=False)), merges, unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "legacy": False,
                "clean_up_tokenization_spaces": False,
                "model_max_length": 1000000000000000019884624838656,
                "use_default_system_prompt": False,
            }
        )
    )


@torch.no_grad()
def test_codestrals_layout_loads_and_is_exact(codestral: Path) -> None:
    source = Folder(str(codestral))
    backbone, top = source.load(), source.output_stage()
    assert (backbone.spec.family, backbone.spec.depth, backbone.spec.width) == ("mamba2", 4, 32)
    assert top.spec == backbone.spec
    cache, parts = backbone.new_cache(), []
    for piece in TOKENS.split([9, 1, 7, 2], 1):
        parts.append(backbone.unembed(backbone.run(backbone.embed(piece, cache), Span(0, 4), cache)))
    torch.testing.assert_close(torch.cat(parts, 1), backbone.reference(TOKENS), rtol=1e-4, atol=1e-4)


def test_codestrals_tokenizer_needs_no_sentencepiece_file(codestral: Path) -> None:
    tokenizer = Folder(str(codestral)).tokenizer()
    ids = tokenizer("ab a")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "ab a"
    assert tokenizer.chat_template is None


@torch.no_grad()
def test_residuals_stay_in_float32_where_the_model_keeps_them_there(codestral: Path) -> None:
    backbone = Folder(str(codestral)).load(dtype="bfloat16")
    h_BTD = backbone.run(backbone.embed(TOKENS), Span(0, 2))
    assert h_BTD.dtype == torch.float32
    assert backbone.unembed(h_BTD).dtype == torch.float32


@torch.no_grad()
def test_state_spaces_layout_loads(tmp_path: Path) -> None:
    known = {name: value for name, value in MAMBA.items() if name not in ("architectures", "torch_dtype")}
    small(MambaForCausalLM, MambaConfig(**known)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MAMBA))
    backbone = Folder(str(tmp_path)).load()
    assert (backbone.spec.family, backbone.spec.depth, backbone.spec.width) == ("mamba", 4, 32)


def test_weights_that_come_twice_are_fetched_once(monkeypatch: pytest.MonkeyPatch, codestral: Path) -> None:
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options)
        return str(codestral)

    monkeypatch.setattr(sources, "snapshot_download", download)
    Hub("mistralai/Mamba-Codestral-7B-v0.1").folder()
    assert "consolidated*" in asked["ignore_patterns"]
