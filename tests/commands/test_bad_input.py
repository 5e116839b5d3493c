"""Mistakes a person makes: each is told in one screen, with what was given, wanted and to be done, and exit code 2."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Run = Callable[..., int]
Refused = Callable[[Sequence[str], Sequence[str]], None]

FIT = ("fit", "-c", "fit.yaml")
TEST = ("test", "-c", "test.yaml")
CASES = {
    "class": ([*FIT, "--model.backbone", "SmolLM"], ["model.backbone", "SmolLM", "Did you mean SmolLM2", "Folder"]),
    "lens": ([*FIT, "--model.exits={2: {lens: LogitLense}}"], ["lens", "Did you mean LogitLens", "TunedLens"]),
    "gate": ([*FIT, "--model.exits={2: {gates: [Mamba]}}"], ["gates", "Did you mean MambaLens or MambaGate?"]),
    "policy": (
        [*TEST, "--model.policies=[{policy: MaxProp}]"],
        ["policy", "Did you mean MaxProb", "GateConfidence, JEIGate, LatencyBudget, Margin"],
    ),
    "objective": ([*FIT, "--model.phases.gates.objective", "GateObj"], ["objective", "Did you mean GateObjective"]),
    "task": ([*TEST, "--data.task", "TriviaQ"], ["data.task", "Did you mean TriviaQA"]),
    "rule for skipped state": (
        [*TEST, "--model.decoder=EarlyExit", "--model.decoder.skipped_state", "Exakt"],
        ["skipped_state", "Did you mean Exact"],
    ),
    "decoder": ([*TEST, "--model.decoder", "EarlyExits"], ["model.decoder", "Did you mean EarlyExit"]),
    "callback": ([*FIT, "--trainer.callbacks", "ExitFronteer"], ["Did you mean ExitFrontier", "HeadsCheckpoint"]),
    "model": ([*FIT, "--model", "HeadModule"], ["Did you mean HeadsModule"]),
    "option of a head": (
        [*FIT, "--model.exits={2: {gates: [{class_path: MLPGate, init_args: {hiden: 4}}]}}"],
        ["no option hiden", "Did you mean hidden"],
    ),
    "option of a text": ([*FIT, "--data.text.lenght", "9"], ["data.text has no option lenght", "Did you mean length"]),
    "option of the trainer": (
        [*FIT, "--trainer.max_epoch", "9"],
        ["--trainer.max_epoch", "Did you mean --trainer.max_ep"],
    ),
    "type": ([*FIT, "--trainer.max_epochs", "four"], ["trainer.max_epochs was given four", "a whole number"]),
    "decoder of generate": (
        ["generate", "Who?", "--decoder", "Lossless"],
        ["decoder names the class Lossless", "Full"],
    ),
    "choice of generate": (
        ["generate", "Who?", "--device", "cudda"],
        ["device was given cudda; wanted: 'auto', 'cpu', 'cuda'. Did you mean cuda?"],
    ),
    "type of generate": (
        ["generate", "Who?", "--max_new_tokens", "many"],
        ["max_new_tokens was given many; wanted: a whole number or null. Change it."],
    ),
    "module of a gate": (
        [*FIT, "--model.exits={2: {gates: [{class_path: nobodys.EMAGate, init_args: {decay: 0.5}}]}}"],
        ["model.exits.gates: the module nobodys cannot be imported; put its folder on PYTHONPATH"],
    ),
    "module of a lens": (
        [*FIT, "--model.exits={2: {lens: nobodys.Lens}}"],
        ["model.exits.lens: the module nobodys cannot be imported; put its folder on PYTHONPATH"],
    ),
    "module of a policy": (["generate", "Who?", "--policy", "nobodys.Policy"], ["policy: the module nobodys cannot"]),
    "class of a module": (
        [*FIT, "--model.exits={2: {lens: dynamax.heads.EMALens}}"],
        ["model.exits.lens: module 'dynamax.heads' has no attribute 'EMALens'"],
    ),
    "heads beside exits": (
        [*TEST, "--model.exits={2: {gates: [{class_path: MLPGate, init_args: {hidden: 4}}]}}"],
        ["/heads and exits: {2: Exit(LogitLens, [MLPGate])}; it wants exactly one"],
    ),
    "model folder": (
        [*FIT, "--model.backbone=parts"],
        ["parts has no config.json"],
    ),
    "no path": ([*FIT, f"--model.backbone=/{'x' * 300}"], ["which is not there"]),
    "model folder of generate": (
        ["generate", "Who?", "--backbone=./parts", "--exits={2: {}}"],
        ["parts has no config.json"],
    ),
    "nothing given": (["fit"], ["start from a whole run: -c configs/demo/fit.yaml"]),
    "no prompt": (["generate"], ["no prompt", 'dynamax generate "']),
    "part missing": (["fit", "--model", "HeadsModule"], ["backbone, exits"]),
    "config file": (["fit", "-c", "nope.yaml"], ["nope.yaml"]),
    "part's file": ([*FIT, "--model.exits={2: parts/nope.yaml}"], ["parts/nope.yaml", "not there"]),
    "part's file beside us": ([*FIT, "--model.exits={2: nope.yaml}"], ["the file nope.yaml, which is not there"]),
    "backbone's file": ([*FIT, "--model.backbone", "nope.yaml"], ["the file nope.yaml, which is not there"]),
    "exit repeated": ([*FIT, "--model.exits={2: {}, '2': {}}"], ["key 2 stands twice"]),
    "exit too deep": ([*FIT, "--model.exits={7: parts/exit.yaml}"], ["depth 7", "6 blocks", "1 to 6"]),
    "exit at the top": ([*FIT, "--model.exits={6: parts/exit.yaml}"], ["depth 6, the top", "LogitLens and no gates"]),
    "exit at zero": ([*FIT, "--model.exits={0: parts/exit.yaml}"], ["depth 0", "1 to 6"]),
    "threshold": (
        [*TEST, "--model.policies=[{policy: {class_path: MaxProb, init_args: {threshold: 1.5}}}]"],
        ["MaxProb was given threshold 1.5", "[0, 1]"],
    ),
    "threshold in a sweep": (
        [*TEST, "--model.exits={2: {}}", "--model.heads=null", "--model.policies=[{policy: Never, thresholds: [0.5]}]"],
        ["Never has no threshold"],
    ),
    "heads missing": (TEST, ["no saved heads in /", "/heads: ", "run fit"]),
    "checkpoint": ([*FIT, "--ckpt_path", "nope.ckpt"], ["no checkpoint nope.ckpt", "--ckpt_path"]),
    "checkpoint of heads": (["validate", *FIT[1:], "--ckpt_path", "parts"], ["no checkpoint parts"]),
    "heads decode nothing": (["test", *FIT[1:]], ["test decodes a task", "HeadsModule. Use: dynamax fit"]),
    "a decoder has no heads": (["fit", *TEST[1:]], ["fit trains exit heads", "DecodingModule. Use: dynamax test"]),
    "empty file": ([*FIT, "--data.text.path", "empty.txt"], ["empty.txt"]),
    "row without the field": ([*FIT, "--data.text.path", "rows.csv"], ["text", "rows.csv", "body"]),
    "task's row without a field": (
        [*TEST, "--model.exits={2: {}}", "--model.heads=null", "--data.task=TriviaQA", "--data.task.path=rows.jsonl"],
        ["rows.jsonl"],
    ),
    "model folder missing": ([*FIT, "--model.backbone=Folder", "--model.backbone.path=nope"], ["nope is not a folder"]),
    "GGUF missing": ([*FIT, "--model.backbone=GGUF", "--model.backbone.path=no.gguf"], ["no.gguf is not a file"]),
    "GGUF's hash": (
        [*FIT, "--model.backbone=GGUF", "--model.backbone.path=text.txt", f"--model.backbone.sha256={'0' * 64}"],
        ["text.txt has SHA-256", "0000 is wanted"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_in_one_screen(refused: Refused, place: Path, case: str) -> None:
    (place / "empty.txt").write_text("")
    (place / "rows.csv").write_text("body\nwords\n")
    (place / "rows.jsonl").write_text('{"question": "Who?"}\n')
    refused(*CASES[case])


@pytest.mark.slow
def test_a_wrong_option_in_the_file_of_a_part(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "parts/lens.yaml").write_text("class_path: LowRankLens\ninit_args: {ranc: 2}\n")
    (place / "parts/text.yaml").write_text("class_path: LocalText\ninit_args: {path: ../text.txt, lenght: 9}\n")
    for option, file, given in (
        ("--data.text", "parts/text.yaml", "lenght"),
        ("--model.exits.2.lens", "parts/lens.yaml", "ranc"),
    ):
        assert run(*FIT, option, file) == 2
        message = capsys.readouterr().err
        assert f"has no option {given}. Did you mean" in message
        assert "loop" not in message


def test_a_key_twice_in_a_file(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (place / "fit.yaml").read_text().replace("{2: parts/exit.yaml,", "{4: parts/exit.yaml,")
    (place / "twice.yaml").write_text(text)
    assert run("fit", "-c", "twice.yaml") == 2
    assert "The key 4 stands twice" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    policy = ["--policy", "MaxProb", "--threshold", "0.5", "--exits", "{2: {}}"]
    assert run("generate", "x" * 600, "-c", "backbone.yaml", *policy) == 2
    assert "backbone.yaml" in capsys.readouterr().err
    assert run("generate", "x" * 600, "--backbone", "parts/backbone.yaml", *policy) == 2
    message = capsys.readouterr().err
    assert "600" in message or "context holds 512" in message


def test_no_network(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run(*FIT, "--model.backbone=Hub", "--model.backbone.name=someone/some-model") == 2
    message = capsys.readouterr().err.split("dynamax: ")[-1]
    assert "someone/some-model" in message
    assert "network" in message


@pytest.mark.slow
def test_a_full_disk(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynamax.heads.saved.write_atomically", full)
    assert run(*FIT) == 1
    assert "The disk is full" in capsys.readouterr().err


HEADS = ("--exits", "{2: {}}")
HINTS = {
    "dashes": (["generate", "Hi", "--max-new-tokens", "3"], "Did you mean --max_new_tokens?"),
    "a beginning": (["generate", "Hi", "--stop", "x"], "Did you mean --stop_strings?"),
    "another beginning": (["generate", "Hi", "--temper", "1"], "Did you mean --temperature?"),
    "another word": (["generate", "Hi", "--model", "tiny"], "Did you mean --backbone?"),
    "one more word": (["generate", "Hi", "--max_tokens", "3"], "Did you mean --max_new_tokens?"),
    "a slip": (["generate", "Hi", "--thresholt", "0.4"], "Did you mean --threshold"),
    "a file without its option": (["fit", "mine.yaml"], "Write -c mine.yaml"),
    "help of a part inside another": (["fit", "--data.text.help", "LocalText"], "put -c FILE before it"),
    "no value": (["generate", "Hi", "--device"], "--device was given no value"),
    "no value of a file": (["generate", "Hi", "-c"], "--config was given no value"),
    "help of no class": (["generate", "Hi", "--policy.help"], "wanted: one of AllOf"),
    "help of no data": (["fit", "--data.help"], "HiddenStates"),
    "help of no model": (["fit", "--model.help"], "HeadsModule"),
    "help of another class": (["generate", "Hi", "--policy.help", "Nope"], "the class Nope, which is not known"),
    "no model of split": (["split"], "There is no model. Write which behind the command"),
    "no model of calibrate": (["calibrate"], "the options --policy and --epsilon"),
    "an empty model": (["split", "", *HEADS], "The name of the model is empty"),
    "a model of spaces": (["suitability", "  "], "The name of the model is empty"),
    "a backbone without heads": (["generate", "Hi", "--backbone", "parts/backbone.yaml"], "--policy null"),
    "a home of nobody": (["split", "x", "--out", "~nobody-of-this-name/x", *HEADS], "A path cannot be used"),
    "a kind by another name": (["list", "gates"], "Did you mean heads?"),
    "an option of an exit": ([*FIT, "--model.exits={2: {gate: LinearGate}}"], "Did you mean gates or rate?"),
    "a number of a group": (
        ["generate", "Hi", "--edge.folder", "x", "--edge.deadline", ".nan"],
        "edge.deadline was given .nan; wanted: a number or null",
    ),
    "a word of a group": (
        ["generate", "Hi", "--edge.folder", "x", "--edge.mode", "drafts"],
        "'drafting', 'standalone'",
    ),
    "no option of a group": (
        ["generate", "Hi", "--edge.folder", "x", "--edge.modes", "drafting"],
        "edge has no option modes. Did you mean mode",
    ),
    "a command cut short": (["serv"], "Did you mean serve "),
}


@pytest.mark.parametrize("case", HINTS)
def test_the_hint_is_what_was_meant(run: Run, capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, told = HINTS[case]
    assert run(*arguments) == 2
    assert told in capsys.readouterr().err


GAP = "{2: {gates: [LinearGate]}, 4: {}}"
ASKS = "{class_path: GateConfidence, init_args: {threshold: 0.0, gate: LinearGate}}"
POLICIES = {
    "itself": ASKS,
    "any of": f"{{class_path: AnyOf, init_args: {{policies: [{ASKS}]}}}}",
    "decaying": f"{{class_path: Decaying, init_args: {{policy: {ASKS}, temperature: 1.0, horizon: 64}}}}",
    "JEI": "{class_path: JEIGate, init_args: {gate: LinearGate}}",
    "unnamed": "{class_path: GateConfidence, init_args: {threshold: 0.0, gate: null}}",
}


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_gate_that_one_exit_lacks_is_missed_although_all_tokens_leave_before(refused: Refused, policy: str) -> None:
    given = ["--backbone=parts/backbone.yaml", f"--exits={GAP}", f"--policy={POLICIES[policy]}"]
    refused(["generate", "Hi", *given], ["asks exit 4 for the gate", "its gates are: none"])
    sweep = f"--model.policies=[{{policy: {POLICIES[policy]}}}]"
    refused(["predict", "-c", "test.yaml", "--model.heads=null", f"--model.exits={GAP}", sweep], ["asks exit 4"])


def test_a_gate_is_not_missed_at_exits_that_are_not_asked(run: Run) -> None:
    policy = f"{{class_path: OnlyAt, init_args: {{depths: [2], policy: {ASKS}}}}}"
    given = ["--backbone=parts/backbone.yaml", f"--exits={GAP}", f"--policy={policy}", "--max_new_tokens=2"]
    assert run("generate", "Hi", *given) == 0
