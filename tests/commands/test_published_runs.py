"""Runs for published checkpoints, on small random weights in the same layouts: LayerSkip's, and DYNAMAX's two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from dynamax.commands import generate
from tests.backbones.test_published_layouts import CODESTRAL
from tests.folders import byte_tokenizer
from tests.tiny import redraw, tiny

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
LLAMA |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
LAYOUTS = {
    "llama 3.2, tied, one file": (
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": ROPE3, "num_hidden_layers": 16},
        "5GB",
    ),
    "llama 2, untied, shards": (
        {"num_key_value_heads": 4, "tie_word_embeddings": False, "num_hidden_layers": 8},
        "60KB",
    ),
}
Run = Callable[..., int]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_trained_with_layerskip_is_decoded_losslessly(
    layout: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deep blocks change little, as after LayerSkip's training, so that some drafts are right and some wrong."""
    options, shard = LAYOUTS[layout]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, **options)).eval()
    redraw(model, seed=0)
    with torch.no_grad():
        for block in model.model.layers[4:]:
            block.self_attn.o_proj.weight *= 0.15
            block.mlp.down_proj.weight *= 0.15
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size=shard)
    byte_tokenizer().save_pretrained(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "model.safetensors.index.json").is_file() == (shard != "5GB")

    answers = []
    monkeypatch.setattr(generate, "show", lambda _, stream: answers.append(stream.answer()))
    here = ["--backbone", "Folder", "--backbone.path", "checkpoint", "--dtype", "float32", "--max_new_tokens", "40"]
    assert run("generate", "Alice and Bob", "-c", str(CONFIGS / "layerskip" / "generate.yaml"), *here) == 0
    (answer,) = answers
    assert 4 in answer.depths, "no draft was right"
    assert answer.depths.count(answer.cost.total) > 2, "no draft was wrong"

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    asked = torch.tensor([byte_tokenizer()("Alice and Bob")["input_ids"]])
    wanted = {"do_sample": False, "max_new_tokens": 40, "attention_mask": torch.ones_like(asked)}
    plain = theirs.generate(asked, **wanted)[0, asked.shape[1] :].tolist()
    drafted = theirs.generate(asked, assistant_early_exit=4, **wanted)[0, asked.shape[1] :].tolist()
    assert answer.tokens == plain == drafted


def mistral(folder: Path) -> None:
    tiny("mistral-nowindow", dtype=torch.float32, depth=32, vocab=257, max_position_embeddings=2048).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)


def codestral(folder: Path) -> None:
    """In shards, with the published configuration's keys."""
    known = {name: value for name, value in CODESTRAL.items() if name not in ("architectures", "torch_dtype")}
    sizes = {"num_hidden_layers": 64, "vocab_size": 257}
    model = Mamba2ForCausalLM(Mamba2Config(**(known | sizes)))
    redraw(model, seed=0)
    model.save_pretrained(folder, max_shard_size="200KB")
    (folder / "config.json").write_text(json.dumps(CODESTRAL | sizes | {"torch_dtype": "float32"}))
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "written"), [("mistral-7b", mistral), ("codestral-7b", codestral)])
def test_dynamax_is_run_from_text_to_report(name: str, written: Callable, run: Run, place: Path) -> None:
    """Backbone, text and tasks are small; exits, classifiers, labels, thresholds are those of the configs."""
    written(place / "model")
    rows = [
        {"question_id": f"q{n}", "question": f"Who is {n}", "answer": {"value": "b", "normalized_aliases": ["b"]}}
        for n in range(3)
    ]
    (place / "trivia.jsonl").write_text("\n".join(map(json.dumps, rows)))
    story = {
        "story": "A b.",
        "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "Why?", "turn_id": 2}],
        "answers": [{"input_text": "b", "turn_id": 1}, {"input_text": "a", "turn_id": 2}],
    }
    (place / "coqa.json").write_text(json.dumps({"version": "1.0", "data": [story]}))
    (place / "truth.csv").write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\nx,y,Who?,b,b; bb,a; aa,z\n"
    )
    folder = CONFIGS / name
    model = ["--model.backbone", "Folder", "--model.backbone.path", "model", "--trainer.accelerator", "cpu"]
    model += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    text = ["--data.text", "LocalText", "--data.text.path", "text.txt", "--data.text.length", "32"]
    text += ["--data.compute", "float32", "--data.validation", "0.25", "--trainer.limit_train_batches", "2"]
    assert run("fit", "-c", str(folder / "fit.yaml"), *model, *text) == 0
    record = json.loads((place / "runs" / name / "heads" / "heads.json").read_text())
    top, exits = {"mistral-7b": (32, [16, 20, 24, 28]), "codestral-7b": (64, [32, 40, 48, 56])}[name]
    assert list(record["exits"]) == list(map(str, exits))
    for exit_ in record["exits"].values():
        assert exit_["lens"]["class"] == "LastBlockLens"
        assert [gate["class"] for gate in exit_["gates"]] == ["LinearGate", "FFNGate", "MambaGate"]

    for file, thresholds in (("few.yaml", [[0.3]] * 3), ("depths.yaml", [[top - 2, top - 5]])):
        policies = {"policies": [{"thresholds": each} for each in thresholds]}
        (place / file).write_text(json.dumps({"model": {"init_args": policies}}))
    few = [
        "--model.dtype",
        "float32",
        "--model.timed",
        "1",
        "--data.task.limit",
        "1",
        "--data.task.max_new_tokens",
        "3",
    ]
    saved = ["--model.heads", f"runs/{name}/heads"]
    task, data = {"mistral-7b": ("coqa", "coqa.json"), "codestral-7b": ("truthfulqa", "truth.csv")}[name]
    runs = {
        "triviaqa": (["test.yaml"], "few.yaml", ["--data.task.path", "trivia.jsonl", *saved]),
        task: (["test.yaml", f"{task}.yaml"], "few.yaml", ["--data.task.path", data, *saved]),
        "pruned": (["test.yaml", "pruned.yaml"], "depths.yaml", ["--data.task.path", "trivia.jsonl"]),
    }
    for label, (over, less, options) in runs.items():
        files = [part for file in (*(folder / each for each in over), less) for part in ("-c", str(file))]
        assert run("test", *files, *model, *few, *options, "--trainer.logger.init_args.name", label) == 0
        (report,) = (place / "runs" / name / label).rglob("report.json")
        frontier = json.loads(report.read_text())["frontier"]
        if label == "pruned":
            assert sorted(row["blocks_per_token"] for row in frontier) == [top - 4, top - 1, top]
        else:
            assert len(frontier) == 1 + 3
