"""``calibrate``: a file that ``test`` and ``generate`` take, with its promise; what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import beta

import dynamax
from dynamax.calibration.promise import Promise, TaskScore
from dynamax.calibration.scores import scored, split, texts
from dynamax.data.generated import SelfGenerated
from dynamax.policies import MaxProb

Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]
LLAMA = Path("assets/llama").resolve()
EXITS = ("--exits", "{2: {}, 4: {}, 6: {}}")
TEXT = ("--text", "SelfGenerated", "--text.documents", "60", "--text.max_new_tokens", "16", "--text.chat", "false")
SCORE = ("--policy", "MaxProb", "--policy.threshold", "0.5")
TASK = ("--task", "Questions", "--task.limit", "20", "--task.max_new_tokens", "8")
MIXTURE = ("--policy", "BetaMixture", "--policy.threshold", "0.5", "--policy.policy", "MaxProb")
MIXTURE += ("--policy.policy.threshold", "0.5")
TESTED = """
trainer:
  accelerator: cpu
  enable_progress_bar: false
  logger: false
  callbacks:
  - {{class_path: ExitFrontier, init_args: {{folder: report}}}}
model:
  class_path: DecodingModule
  init_args:
    backbone: {{class_path: Folder, init_args: {{path: {llama}}}}}
    exits: {{2: {{}}, 4: {{}}, 6: {{}}}}
    policies: [{policy}]
    timed: 1
data:
  class_path: TaskData
  init_args:
    task: {{class_path: Questions, init_args: {{limit: 4, max_new_tokens: 16}}}}
"""


def calibrate(run: Run, *options: str) -> int:
    return run("calibrate", str(LLAMA), *EXITS, *TEXT, *SCORE, *options)


@pytest.mark.slow
def test_what_is_written_is_tested_and_generated_with(
    run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert calibrate(run, "--epsilon", "0.3", "--out", "calibrated.yaml", "--plot", "pictures/it.png") == 0
    shown = capfd.readouterr().out
    assert (tmp_path / "pictures" / "it.png").read_bytes().startswith(b"\x89PNG")
    content = yaml.safe_load((tmp_path / "calibrated.yaml").read_text())
    promise = Promise(**content["promise"])
    assert promise.text in shown
    assert f"it lost {promise.loss:.2%}" in shown
    exits = [line.split() for line in shown.splitlines() if line.startswith("   ") and "%" in line]
    assert [int(cells[0]) for cells in exits] == [2, 4, 6]
    assert {int(cells[1]) for cells in exits} == {promise.tokens}
    assert content["policy"]["class_path"] == "OnlyAt"
    levels = content["policy"]["init_args"]["policy"]["init_args"]["threshold"]
    assert sorted(levels) == content["policy"]["init_args"]["depths"]

    (tmp_path / "promised.yaml").write_text(TESTED.format(llama=LLAMA, policy="calibrated.yaml"))
    assert run("test", "-c", "promised.yaml") == 0
    shown = capfd.readouterr().out
    assert f"Promised: {promise.text}. Here: " in shown
    assert "on 4 examples" in shown

    asked = ("generate", "-c", "calibrated.yaml", "--backbone", "Folder", "--backbone.path", str(LLAMA))
    assert run(*asked, "--exits", EXITS[1], "--max_new_tokens", "4", "A kitten") == 0
    assert f"Promised: {promise.text}." in capfd.readouterr().out

    mamba = LLAMA.with_name("mamba2")
    asked = ("generate", "-c", "calibrated.yaml", "--backbone", "Folder", "--backbone.path", str(mamba))
    assert run(*asked, "--exits", EXITS[1], "--max_new_tokens", "4", "A kitten") == 2
    assert "The promise is about the model" in capfd.readouterr().err

    (tmp_path / "other.yaml").write_text(TESTED.format(llama=mamba, policy="calibrated.yaml"))
    assert run("test", "-c", "other.yaml") == 2
    assert "The promise is about the model" in capfd.readouterr().err


@pytest.mark.slow
def test_a_task_s_score_is_promised_and_tested(run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("calibrate", str(LLAMA), *EXITS, *TASK, *SCORE, "--epsilon", "0.4", "--method", "ucb") == 0
    shown = capfd.readouterr().out
    content = yaml.safe_load((tmp_path / "calibrated.yaml").read_text())
    assert content["promise"]["task"] == {"task": "Questions", "score": "accuracy", "chat": False}
    promise = Promise(**{**content["promise"], "task": TaskScore(**content["promise"]["task"])})
    assert promise.level == "score"
    assert promise.text.startswith("accuracy of Questions below the full model's")
    assert promise.text in shown
    assert (tmp_path / "calibrated.yaml").read_text().startswith(f"# {promise.text}\n# dynamax calibrate ")
    assert content["policy"]["class_path"] == "OnlyAt"

    greedy = TESTED.replace("timed: 1", "timed: 1\n    sampler: Greedy")
    (tmp_path / "promised.yaml").write_text(greedy.format(llama=LLAMA, policy="calibrated.yaml"))
    assert run("test", "-c", "promised.yaml") == 0
    shown = capfd.readouterr().out
    assert f"Promised: {promise.text}. Here: " in shown
    assert "on 4 examples" in shown

    assert run("test", "-c", "promised.yaml", "--model.chat", "true") == 2
    assert "would measure TaskScore(task='Questions', score='accuracy', chat=True)" in capfd.readouterr().err
    assert run("test", "-c", "promised.yaml", "--data.task", "Passages", "--data.task.limit", "2") == 2
    assert "would measure TaskScore(task='Passages', score='f1', chat=False)" in capfd.readouterr().err

    asked = ("generate", "-c", "calibrated.yaml", "--backbone", "Folder", "--backbone.path", str(LLAMA))
    assert run(*asked, "--exits", EXITS[1], "--max_new_tokens", "4", "A kitten") == 0
    assert f"Promised: {promise.text}." in capfd.readouterr().out


@pytest.mark.slow
def test_a_policy_that_must_be_fitted_is_fitted_to_the_searched_texts(
    run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ("calibrate", str(LLAMA), *EXITS, *TEXT, *MIXTURE)
    assert run(*given, "--epsilon", "0.3", "--method", "naive") == 0
    content = yaml.safe_load((tmp_path / "calibrated.yaml").read_text())
    written = content["policy"]["init_args"]["policy"]
    assert written["class_path"] == "BetaMixture"
    mixtures = written["init_args"]["mixtures"]
    assert sorted(mixtures) == [2, 4, 6]

    engine = dynamax.load(LLAMA, exits=[2, 4, 6], device="cpu")
    source = SelfGenerated(documents=60, max_new_tokens=16, chat=False)
    documents = [document for group in source.groups(engine) for document in group]
    first, _ = split(documents, [document.origin for document in documents], 0.5)
    seen = [scored(text, MaxProb(0.5)) for text in texts(engine, first)]
    for place, depth in enumerate((2, 4, 6)):
        score_N = np.concatenate([each.score_ET[place] for each in seen])
        right_N = np.concatenate([each.right_ET[place] for each in seen])
        assert mixtures[depth]["prior"] == pytest.approx(right_N.mean())
        for name, part in (("right", score_N[right_N]), ("wrong", score_N[~right_N])):
            mean, variance = beta.stats(*mixtures[depth][name])
            assert mean == pytest.approx(part.mean(), rel=1e-4)
            assert variance == pytest.approx(part.var(), rel=1e-3)

    (tmp_path / "promised.yaml").write_text(TESTED.format(llama=LLAMA, policy="calibrated.yaml"))
    assert run("test", "-c", "promised.yaml") == 0
    asked = ("generate", "A kitten", "--backbone", "Folder", "--backbone.path", str(LLAMA), "--exits", EXITS[1])
    assert run(*asked, "--max_new_tokens", "4", "-c", "calibrated.yaml") == 0
    capfd.readouterr()
    assert run(*asked, "--max_new_tokens", "4", *MIXTURE) == 2
    assert "BetaMixture was given no mixtures" in capfd.readouterr().err


@pytest.mark.slow
def test_nothing_can_be_promised(run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert calibrate(run, "--epsilon", "0.05", "--delta", "0.0001") == 0
    assert "Nothing can be promised: " in capfd.readouterr().out
    content = yaml.safe_load((tmp_path / "calibrated.yaml").read_text())
    assert content["policy"] == {"class_path": "Never"}
    assert content["promise"]["reason"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--epsilon", "1.5"), ("epsilon 1.5", "between 0 and 1")),
        (("--epsilon", "0.1", "--policy", "Patience", "--policy.patience", "2"), ("Patience", "one with a score")),
        (("--epsilon", "0.1", "--out", "nowhere/x.yaml"), ("nowhere/x.yaml cannot be written", "--out")),
        (("--epsilon", "0.1", "--plot", "x.json"), ("x.json", ".png")),
        (("--epsilon", "0.1", "--method", "magic"), ("magic", "ltt")),
        (("--epsilon", "0.1", "--policy", "GateConfidence", "--policy.threshold", "0.5"), ("gate",)),
    ],
)
def test_mistakes_are_told(refused: Refused, options: Sequence[str], named: Sequence[str]) -> None:
    refused(("calibrate", str(LLAMA), *EXITS, *TEXT, *SCORE, *options), named)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), ("neither text nor task", "--text SelfGenerated", "--task Questions")),
        ((*TEXT, *TASK), ("both text and task", "one of the two")),
        ((*TASK, "--level", "token"), ("level=token", "a loss is of its score", "Leave level out")),
        ((*TEXT, "--chat", "true"), ("chat=True", "a source of texts has its own", "Leave chat out")),
        (("--task", "Perplexity", "--task.path", "text.txt"), ("Perplexity", "asks for likelihoods", "--text")),
        (("--task", "TruthfulQA", "--task.path", "x.csv"), ("TruthfulQA", "bleu_max", "any number", "headline_scale")),
        (("--task", "Questions", "--task.limit", "1"), ("1 examples", "to search", "Raise the task's limit")),
        (("--task", "CoQA", "--task.path", "nowhere.json"), ("nowhere.json",)),
    ],
)
def test_mistakes_about_a_task_are_told_before_a_model_is_loaded(
    refused: Refused, options: Sequence[str], named: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("dynamax.commands.calibrate.load")
    refused(("calibrate", str(LLAMA), *EXITS, *SCORE, "--epsilon", "0.1", *options), named)


def test_a_promise_stands_beside_no_sweep(refused: Refused, tmp_path: Path) -> None:
    promise = {"level": "document", "epsilon": 0.1, "delta": 0.1, "method": "ltt", "documents": 9, "tokens": 90}
    promise |= {"loss": 0.01, "blocks": 7.0, "data": "a", "model": "b"}
    policy = {"class_path": "MaxProb", "init_args": {"threshold": 0.9}}
    text = yaml.safe_dump({"policy": policy, "promise": promise, "thresholds": [0.5]})
    (tmp_path / "both.yaml").write_text(text)
    (tmp_path / "promised.yaml").write_text(TESTED.format(llama=LLAMA, policy="both.yaml"))
    refused(
        ("test", "-c", "promised.yaml"),
        ("a promise and with thresholds [0.5]", "Leave thresholds out"),
    )
