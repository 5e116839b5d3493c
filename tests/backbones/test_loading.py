"""One reader for a checkpoint: whole, top and parts say the same, and transformers is what they are held to."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dynamax
from dynamax.backbones import families
from dynamax.backbones.checkpoint import NO_EFFECT, facts, fingerprint_of
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.loading import load_backbone, read_config
from dynamax.backbones.sources import Folder
from dynamax.errors import UserError
from dynamax.heads.bank import Exit
from dynamax.heads.gates import MambaGate
from dynamax.types import Span
from tests.tiny import FAMILIES, tiny

TOKENS_BT = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))
DEPTH = 4
SAVED = [name for name, v in FAMILIES.items() if v.attention == families.family(v.model_type).attention]


def rewrite(folder: Path, change, **config) -> None:
    """Change tensors and configuration of a folder with one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))


def embedding_of(name: str) -> str:
    model = tiny(name, depth=DEPTH)
    return next(key for key, p in model.named_parameters() if p is model.get_input_embeddings().weight)


def ties(name: str) -> bool:
    model = tiny(name, depth=DEPTH, tie_word_embeddings=True)
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def untied(name, folder):
    tiny(name, dtype=torch.float32, depth=DEPTH, tie_word_embeddings=False).save_pretrained(
        folder, max_shard_size="20KB"
    )


def tied(name, folder):
    tiny(name, dtype=torch.float32, depth=DEPTH, tie_word_embeddings=True).save_pretrained(
        folder, max_shard_size="20KB"
    )


def said_to_be_tied(name, folder):
    tiny(name, dtype=torch.float32, depth=DEPTH, tie_word_embeddings=False).save_pretrained(folder)
    rewrite(folder, lambda tensors: None, tie_word_embeddings=True)


def tied_to_the_output_matrix(name, folder):
    tiny(name, dtype=torch.float32, depth=DEPTH, tie_word_embeddings=ties(name)).save_pretrained(folder)

    def swap(tensors):
        if ties(name):
            tensors["lm_head.weight"] = tensors.pop(embedding_of(name))

    rewrite(folder, swap)


TIES = ("llama", "gpt2", "gemma3_text", "opt", "cohere", "bloom", "mamba2", "jamba", "zamba2", "falcon_h1", "lfm2")
"""Families of which each way to tie and to store two matrices is tried; of the others, the plainest."""


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((name, untied) for name in SAVED),
        *((name, write) for name in TIES for write in (tied, said_to_be_tied, tied_to_the_output_matrix)),
    ],
)
@torch.no_grad()
def test_whole_and_top_say_what_transformers_says(name, write, tmp_path):
    write(name, tmp_path)
    whole, top = Folder(str(tmp_path)).load(dtype="float64"), Folder(str(tmp_path)).output_stage(dtype="float64")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation=families.family(FAMILIES[name].model_type).attention
    )
    if whole.row.expert_share(theirs.config) < 1:
        theirs.set_experts_implementation("eager")
    wanted = HFBackbone(theirs).reference(TOKENS_BT)  # wrapped, as wrapping repairs Zamba2's and Nemotron-H's steps
    torch.testing.assert_close(whole.reference(TOKENS_BT), wanted, rtol=0, atol=0)
    assert top.spec == whole.spec
    h_BTD = whole.run(whole.embed(TOKENS_BT), Span(0, DEPTH - 1))
    here, there = top.site(DEPTH - 1), whole.site(DEPTH - 1)
    torch.testing.assert_close(here.last_blocks(h_BTD, 1), there.last_blocks(h_BTD, 1), rtol=0, atol=0)
    u_BTD = here.normalize(h_BTD)
    logits = here.project(u_BTD)
    torch.testing.assert_close(logits, there.project(there.normalize(h_BTD)), rtol=0, atol=0)
    few_C = torch.tensor([0, 5, 60])
    torch.testing.assert_close(here.project(u_BTD, few_C), logits[..., few_C])
    got = top.unembed(top.run(h_BTD, Span(DEPTH - 1, DEPTH)))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, check_dtype=False)  # some types cast to float32


@pytest.mark.parametrize("name", [name for name in SAVED if FAMILIES[name].model_type != "nemotron_h"])
def test_a_matrix_that_is_not_there_is_told_in_the_same_words(name, tmp_path):
    tiny(name, dtype=torch.float32, depth=DEPTH, tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: None, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"missing keys: \['lm_head.weight'") as whole:
        Folder(str(tmp_path)).load()
    with pytest.raises(UserError, match=r"missing keys: \['lm_head.weight'") as top:
        Folder(str(tmp_path)).output_stage()
    if FAMILIES[name].model_type != "zamba2":  # where the same entry tells whether blocks share weights
        assert str(top.value) == str(whole.value)


# -- parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SAVED, "gpt2-by-index"])
@torch.no_grad()
def test_two_parts_are_the_whole(name, tmp_path):
    """An edge with the embedding, a cloud with the output matrix, each with state of its own."""
    options = {"scale_attn_by_inverse_layer_idx": True} if name == "gpt2-by-index" else {}
    tiny(name.removesuffix("-by-index"), dtype=torch.float32, depth=DEPTH, **options).save_pretrained(tmp_path)
    whole = load_backbone(tmp_path, dtype="float64", device="cpu")
    edge = load_backbone(tmp_path, dtype="float64", device="cpu", span=Span(0, 3), output=False)
    cloud = load_backbone(tmp_path, dtype="float64", device="cpu", span=Span(3, DEPTH), embedding=False)
    assert edge.spec == cloud.spec == whole.spec
    h_BTD = edge.run(edge.embed(TOKENS_BT), Span(0, 3))
    logits = cloud.unembed(cloud.run(h_BTD, Span(3, DEPTH)))
    torch.testing.assert_close(logits, whole.reference(TOKENS_BT), rtol=1e-4, atol=1e-4, check_dtype=False)
    both_BTV = whole.unembed(whole.run(whole.embed(TOKENS_BT), Span(0, DEPTH)))
    torch.testing.assert_close(logits, both_BTV, rtol=0, atol=1e-12)
    held = [sum(p.numel() for p in part.parameters()) for part in (edge, cloud, whole)]
    assert held[0] < held[2]
    assert held[1] < held[2]


def test_what_a_part_lacks_is_told(tmp_path):
    tiny("llama", dtype=torch.float32, depth=DEPTH).save_pretrained(tmp_path)
    part = load_backbone(tmp_path, dtype="float32", device="cpu", span=Span(1, 3), embedding=False)
    with pytest.raises(UserError, match="The embedding matrix was not loaded"):
        part.embed(TOKENS_BT)
    with pytest.raises(UserError, match="Block 3 was not loaded"):
        part.run(torch.zeros(1, 2, 32), Span(1, 4))
    edge = load_backbone(tmp_path, dtype="float32", device="cpu", span=Span(0, 3), output=False)
    with pytest.raises(UserError, match="The output matrix was not loaded"):
        edge.project(torch.zeros(1, 2, 32))
    with pytest.raises(UserError, match="its model has the blocks"):
        load_backbone(tmp_path, dtype="float32", device="cpu", span=Span(2, 5))


# -- which tensors count ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_with_and_without_the_prefix(prefix, tmp_path):
    model = tiny("llama", dtype=torch.float32, depth=DEPTH, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)

    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    rewrite(tmp_path, rename)
    whole, top = Folder(str(tmp_path)).load(), Folder(str(tmp_path)).output_stage()
    torch.testing.assert_close(whole.reference(TOKENS_BT), model(TOKENS_BT).logits)
    h_BTD = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(top.site(2).last_blocks(h_BTD, 1), whole.site(2).last_blocks(h_BTD, 1), rtol=0, atol=0)


@torch.no_grad()
def test_an_output_matrix_under_its_old_name(tmp_path):
    """Pythia's folders call it embed_out."""
    model = tiny("gpt_neox", dtype=torch.float32, depth=DEPTH)
    model.save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: tensors.update(
            {"embed_out.weight": tensors.pop(next(n for n in ("embed_out.weight", "lm_head.weight") if n in tensors))}
        ),
    )
    whole, top = Folder(str(tmp_path)).load(), Folder(str(tmp_path)).output_stage()
    torch.testing.assert_close(whole.reference(TOKENS_BT), model(TOKENS_BT).logits)
    u_BTD = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(top.project(u_BTD), whole.project(u_BTD), rtol=0, atol=0)


@torch.no_grad()
def test_positions_of_the_embeddings_shape_are_no_output_matrix(tmp_path):
    model = tiny("gpt2", dtype=torch.float32, depth=DEPTH, max_position_embeddings=61)
    model.save_pretrained(tmp_path)
    whole, top = Folder(str(tmp_path)).load(), Folder(str(tmp_path)).output_stage()
    u_BTD = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(top.project(u_BTD), whole.project(u_BTD), rtol=0, atol=0)
    torch.testing.assert_close(top.project(u_BTD), u_BTD @ model.lm_head.weight.T)


@torch.no_grad()
def test_the_single_file_counts_as_it_does_for_transformers(tmp_path):
    tiny("llama", dtype=torch.float32, depth=DEPTH, seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    index = (tmp_path / "model.safetensors.index.json").read_text()
    shards = {path.name: path.read_bytes() for path in tmp_path.glob("model-*")}
    model = tiny("llama", dtype=torch.float32, depth=DEPTH, seed=2)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    for name, content in shards.items():
        (tmp_path / name).write_bytes(content)
    torch.testing.assert_close(Folder(str(tmp_path)).load().reference(TOKENS_BT), model(TOKENS_BT).logits)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lm_head.bias", "unexpected keys"),
        ("model.layers.3.self_attn.q_proj.bias", "unexpected keys"),
        ("model.layers.4.mlp.up_proj.weight", "unexpected keys"),
    ],
)
def test_a_weight_that_the_model_would_drop_is_told(name, told, tmp_path):
    tiny("llama", dtype=torch.float32, depth=DEPTH).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(61)}))
    with pytest.raises(UserError, match=told) as whole:
        Folder(str(tmp_path)).load()
    with pytest.raises(UserError) as top:
        Folder(str(tmp_path)).output_stage()
    assert str(top.value) == str(whole.value)


def test_another_part_of_a_larger_model_is_passed_over(tmp_path):
    tiny("llama", dtype=torch.float32, depth=DEPTH).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"vision_tower.patch.weight": torch.zeros(61)}))
    Folder(str(tmp_path)).load()


# -- fingerprints -----------------------------------------------------------------------------------------------


def test_the_fingerprint_covers_the_output_matrix_that_is_read(tmp_path):
    found = {}
    for number, write in enumerate((untied, tied, said_to_be_tied)):
        write("llama", tmp_path / str(number))
        found[write.__name__] = Folder(str(tmp_path / str(number))).output_stage().spec.fingerprint
    assert found["untied"] == found["said_to_be_tied"] != found["tied"]
    rewrite(tmp_path / "2", lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert Folder(str(tmp_path / "2")).output_stage().spec.fingerprint != found["untied"]


def test_a_copy_of_the_embedding_changes_no_fingerprint(tmp_path):
    tied("llama", tmp_path / "a")
    tiny("llama", dtype=torch.float32, depth=DEPTH, tie_word_embeddings=True).save_pretrained(tmp_path / "b")
    copied = lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})  # noqa: E731
    rewrite(tmp_path / "b", copied, tie_word_embeddings=False)
    prints = [Folder(str(tmp_path / name)).load().spec.fingerprint for name in "ab"]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_saved_again_keeps_its_fingerprint(name, tmp_path):
    """By transformers, from the model it loaded, in half the bits."""
    tiny(name, dtype=torch.float32, depth=DEPTH).save_pretrained(tmp_path / "a", max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    model.config.use_cache = False
    model.save_pretrained(tmp_path / "b")
    prints = [Folder(str(tmp_path / place)).output_stage().spec.fingerprint for place in "ab"]
    assert prints[0] == prints[1]


CHANGES = {
    "granitemoehybrid": {"embedding_multiplier": 3.0, "logits_scaling": 7.0, "attention_multiplier": 0.3},
    "falcon_h1": {"key_multiplier": 0.5, "ssm_out_multiplier": 0.5, "mlp_multipliers": [0.5, 2.0]},
    "nemotron_h": {"routed_scaling_factor": 2.5, "norm_topk_prob": False, "n_group": 2},
    "llama": {"hidden_act": "gelu", "rms_norm_eps": 1e-3, "an_entry_nobody_knows": 2.0},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "layer_norm_epsilon": 1e-3},
    "llama-yarn": {"max_position_embeddings": 1024},
}


@pytest.mark.parametrize(("name", "entry"), [(name, entry) for name, entries in CHANGES.items() for entry in entries])
def test_an_entry_that_may_change_results_changes_the_fingerprint(name, entry):
    config = tiny(name, depth=DEPTH).config
    before = fingerprint_of(config, {})
    setattr(config, entry, CHANGES[name][entry])
    assert fingerprint_of(config, {}) != before


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("attention_dropout", 0.3),
        ("initializer_range", 0.5),
        ("eos_token_id", [0, 3]),
        ("use_cache", False),
        ("max_position_embeddings", 4096),
        ("architectures", ["Another"]),
        ("dtype", "bfloat16"),
        ("temperature", 0.5),
    ],
)
@torch.no_grad()
def test_an_entry_without_effect_does_not(entry, value):
    model = tiny("llama", depth=DEPTH)
    before, logits = fingerprint_of(model.config, {}), model(TOKENS_BT).logits
    setattr(model.config, entry, value)
    assert fingerprint_of(model.config, {}) == before
    model.config.return_dict = True
    torch.testing.assert_close(HFBackbone(model).reference(TOKENS_BT), logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", SAVED)
def test_a_configuration_read_back_tells_the_same_facts(name, tmp_path):
    config = tiny(name, depth=DEPTH).config
    config.save_pretrained(tmp_path)
    assert facts(read_config(tmp_path)) == facts(config)


def test_nothing_of_a_models_sizes_is_passed_over():
    assert not {"hidden_size", "layer_types", "sliding_window", "rope_parameters", "num_experts_per_tok"} & NO_EFFECT


@pytest.mark.slow
def test_threads_may_load_at_the_same_time(tmp_path):
    """transformers alone cannot: afterwards the process could tie no matrices."""
    tied("llama", tmp_path)
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda _: Folder(str(tmp_path)).load(), range(16)))
    assert {backbone.spec.fingerprint for backbone in loaded} == {Folder(str(tmp_path)).load().spec.fingerprint}


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "float32"])
def test_a_model_is_loaded_where_it_is_told_whatever_torchs_default_device_is(precision: str | None) -> None:
    """Lightning's default is the GPU while a model is configured; here a device that holds nothing stands for it."""
    with torch.device("meta"):
        engine = dynamax.load("assets/mamba2", exits={2: Exit(gates=[MambaGate])}, precision=precision, device="cpu")
    assert engine.exits is not None
    held = [*engine.backbone.parameters(), *engine.backbone.buffers(), *engine.exits.parameters()]
    assert {tensor.device.type for tensor in held} == {"cpu"}
    plain = dynamax.load("assets/mamba2", precision=precision, device="cpu")
    assert engine.generate("Hi", max_new_tokens=8).text == plain.generate("Hi", max_new_tokens=8).text
