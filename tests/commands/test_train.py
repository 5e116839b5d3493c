"""``train`` from YAML: it trains, goes on, writes a model that the other commands take, and tells mistakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists", "ignore:Found .* in eval mode", "ignore:.*there is no last checkpoint"
)
Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]
TRAIN = """
trainer:
  max_steps: 6
model:
  class_path: PretrainingModule
  init_args:
    config:
      model_type: llama
      num_hidden_layers: 6
      hidden_size: 32
      intermediate_size: 32
      num_attention_heads: 2
      num_key_value_heads: 2
      max_position_embeddings: 256
      tie_word_embeddings: true
    exits: [2, 4]
    objective: LayerSkip
    export: model
data:
  class_path: LanguageData
  init_args:
    vocab: 280
"""
ARGUMENTS = ("train", "-c", "training.yaml", "-c", "train.yaml")


@pytest.fixture
def prepared(place: Path) -> Path:
    (place / "train.yaml").write_text(TRAIN)
    return place


@pytest.mark.slow
def test_a_model_is_trained_and_then_has_heads_fitted_to_it(run: Run, prepared: Path) -> None:
    assert run(*ARGUMENTS, "--ckpt_path", "last") == 0  # there is none yet, and so it starts anew
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in (prepared / "model").iterdir()
    }
    (metrics,) = (prepared / "logs").rglob("metrics.csv")
    head = metrics.read_text().splitlines()[0]
    assert all(f"val/{name}/{depth}" in head for name in ("perplexity", "agreement") for depth in (2, 4, 6))
    backbone = ["--model.backbone", "Folder", "--model.backbone.path", "model"]
    assert run("fit", "-c", "fit.yaml", *backbone) == 0
    prompt = ["generate", "3 and 3", "--backbone", "Folder", "--backbone.path", "model", "--exits", "{2: {}}"]
    assert run(*prompt, "--policy", "MaxProb", "--threshold", "0.1", "--max_new_tokens", "4") == 0


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_steps(run: Run, prepared: Path) -> None:
    assert run(*ARGUMENTS) == 0
    assert run("validate", *ARGUMENTS[1:], "--ckpt_path", "checkpoints/last.ckpt") == 0
    assert run(*ARGUMENTS, "--ckpt_path", "last", "--trainer.max_steps", "8") == 0
    assert '"steps": 8' in (prepared / "model" / "training.json").read_text()


@pytest.mark.slow
def test_a_later_file_changes_the_objective(run: Run, prepared: Path) -> None:
    (prepared / "plain.yaml").write_text(
        "model: {class_path: PretrainingModule, init_args: {objective: NextToken, export: plain}}"
    )
    assert run(*ARGUMENTS, "-c", "plain.yaml", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0") == 0
    assert '"name": "NextToken"' in (prepared / "plain" / "training.json").read_text()


CASES = {
    "another model": (["train", "-c", "fit.yaml"], ["HeadsModule", "Use: dynamax fit"]),
    "filling": (["cache", *ARGUMENTS[1:]], ["cache fills the store", "PretrainingModule. Use: dynamax train"]),
    "decoding": (["test", *ARGUMENTS[1:]], ["test decodes a task", "PretrainingModule. Use: dynamax train"]),
    "answering": (["predict", *ARGUMENTS[1:]], ["predict decodes a task", "PretrainingModule. Use: dynamax train"]),
    "untrained": (["validate", *ARGUMENTS[1:]], ["given no checkpoint", "--ckpt_path FILE"]),
    "no checkpoint": ([*ARGUMENTS, "--ckpt_path", "last.ckpt"], ["no checkpoint last.ckpt", "--ckpt_path"]),
    "another command": (["fit", *ARGUMENTS[1:]], ["PretrainingModule", "Use: dynamax train"]),
    "objective": ([*ARGUMENTS, "--model.objective", "LayerSkep"], ["Did you mean LayerSkip", "NextToken"]),
    "family": ([*ARGUMENTS, "--model.config={model_type: lama}"], ["lama", "llama, "]),
    "entry": ([*ARGUMENTS, "--model.config={model_type: llama, hiden_size: 3}"], ["no hiden_size", "hidden_size"]),
    "exit": ([*ARGUMENTS, "--model.exits=[6]"], ["exits [6]", "6 blocks", "1 to 5"]),
    "corpus": ([*ARGUMENTS, "--data.portions=[{corpus: Gloses}]"], ["Did you mean Glosses", "LocalText"]),
    "no WordNet": (
        [*ARGUMENTS, "--data.portions=[{corpus: {class_path: Glosses, init_args: {folder: nope}}}]"],
        ["nope lacks data.noun", "wordnet-base"],
    ),
    "vocabulary": ([*ARGUMENTS, "--data.vocab", "4096"], ["4096", "lower vocab"]),
    "context": ([*ARGUMENTS, "--data.length", "512"], ["Blocks of 512 tokens", "context holds 256"]),
    "data": (
        [*ARGUMENTS, "--data", "TaskData", "--data.task", "Questions"],
        ["was given data of TaskData; give it LanguageData"],
    ),
    "export": ([*ARGUMENTS, "--model.export", "parts"], ["parts exists and is no model"]),
    "no end": ([*ARGUMENTS, "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"], ["Set trainer.max_steps"]),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_told_in_one_screen(refused: Refused, prepared: Path, case: str) -> None:
    refused(*CASES[case])
    assert not (prepared / "model").exists()


@pytest.mark.slow
def test_blocks_too_long_are_told_before_texts_are_read(refused: Refused, prepared: Path) -> None:
    refused([*ARGUMENTS, "--data.length", "512"], ["Lower data.length"])
    assert not (prepared / "text").exists()
