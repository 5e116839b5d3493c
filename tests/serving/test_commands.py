"""The commands as a user types them: split, a cloud in a process of its own, an answer; and what they refuse."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dynamax
from dynamax.cli import main
from dynamax.policies import MaxProb
from tests.serving.house import KINDS, PROMPT, folders, whole
from tests.serving.test_faults import certified

EXITS = "{2: {}, 4: {}}"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code  # type: ignore[return-value]


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """A command that listens; what it printed first."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "dynamax", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield line
        finally:
            process.terminate()
            process.wait(20)
            assert process.returncode in (0, -15), process.stderr.read()


@pytest.fixture(scope="module", params=KINDS)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("split") / "parts"
    assert run("split", f"assets/{request.param}", "--exits", EXITS, "--out", str(out)) == 0
    return request.param, out


@pytest.mark.slow
def test_two_processes_and_tls_say_what_one_says(
    parts: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, out = parts
    certificate, root = certified(tmp_path)
    token = tmp_path / "token"
    token.write_text("secret\n")
    tls = ["--certificate", str(certificate.chain), "--key", str(certificate.key), "--token_file", str(token)]
    cloud = ["serve", "cloud", "--part", str(out / "cloud"), "--address", "127.0.0.1:0", "--precision", "null", *tls]
    policies = {
        "never": (["--policy", "Never", "--edge.mode", "collaborative"], None),
        "collaborative": (["--policy", "MaxProb", "--policy.threshold", "0.8"], MaxProb(0.8)),
        "drafting": (["--policy", "MaxProb", "--policy.threshold", "0.5", "--edge.mode", "drafting"], None),
    }
    monkeypatch.setenv("NO_COLOR", "1")
    with running(*cloud) as line:
        port = re.search(r":(\d+), TLS; bearer tokens: 1", line)
        assert port is not None, line
        edge = ["--edge.folder", str(out / "edge"), "--edge.cloud", f"127.0.0.1:{port[1]}", "--edge.root", str(root)]
        edge += ["--edge.token_file", str(token), "--precision", "null", "--max_new_tokens", "24"]
        for options, policy in policies.values():
            wanted = whole(kind).generate(PROMPT, policy=policy, max_new_tokens=24, do_sample=False).text
            assert run("generate", PROMPT, *edge, *options) == 0
            said = capsys.readouterr().out
            assert said.startswith(wanted), said
            assert "Sent " in said
            assert "the cloud said it" in said


@pytest.mark.slow
def test_smollm2_over_tls_says_what_the_whole_model_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At threshold 1.0, and where the edge never answers; float32 on the wire and in both processes."""
    monkeypatch.setenv("NO_COLOR", "1")
    out = tmp_path / "parts"
    assert run("split", "SmolLM2", "--exits", "{10: {}, 15: {}}", "--out", str(out)) == 0
    certificate, root = certified(tmp_path)
    tls = ["--certificate", str(certificate.chain), "--key", str(certificate.key)]
    wanted = dynamax.load("SmolLM2").generate(PROMPT, max_new_tokens=24, do_sample=False).text
    capsys.readouterr()
    cloud = ["serve", "cloud", "--part", str(out / "cloud"), "--address", "127.0.0.1:0", "--precision", "null", *tls]
    with running(*cloud) as line:
        port = re.search(r"Blocks 15 to 30 listen at .*:(\d+), TLS", line)
        assert port is not None, line
        edge = ["--edge.folder", str(out / "edge"), "--edge.cloud", f"127.0.0.1:{port[1]}", "--edge.root", str(root)]
        for policy in (["--policy", "MaxProb", "--policy.threshold", "1.0"], ["--policy", "Never"]):
            options = [*edge, *policy, "--precision", "null", "--max_new_tokens", "24"]
            assert run("generate", PROMPT, *options) == 0
            assert capsys.readouterr().out.startswith(wanted)


@pytest.mark.slow
def test_an_edge_alone_needs_no_cloud(parts: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    edge = ["--edge.folder", str(parts[1] / "edge"), "--edge.mode", "standalone", "--max_new_tokens", "8"]
    assert run("generate", PROMPT, *edge, "--policy", "MaxProb", "--policy.threshold", "0.9") == 0
    assert "Sent" not in capsys.readouterr().out


FOLDER = ["--edge.folder", "EDGE"]
POLICY = ["--policy", "MaxProb", "--policy.threshold", "0.9"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["split", "assets/llama"], "was given without exits"),
        (["split", "assets/llama", "--exits", EXITS, "--at", "3"], "its exits are at 2, 4"),
        (["split", "assets/llama", "--exits", EXITS, "--at", "2", "--cloud_from", "4"], "the edge ends at 2"),
        (["split", "assets/llama", "--exits", EXITS, "--out", "OUT"], "exists already"),
        (["split", "EDGE", "--exits", EXITS], "of a model of 8 alone"),
        (["serve", "cloud", "--part", "EDGE", "--address", "127.0.0.1:0"], "a cloud's ends at the top"),
        (["serve", "cloud", "--part", "assets/llama"], "holds no part of a model"),
        (["serve", "cloud", "--part", "CLOUD", "--address", "127.0.0.1"], "HOST:PORT is wanted"),
        (["serve", "cloud", "--part", "CLOUD", "--address", "0.0.0.0:0"], "without TLS"),
        (["serve", "cloud", "--part", "CLOUD", "--metrics", "9090"], "HOST:PORT is wanted"),
        (["serve", "cloud", "--part", "CLOUD", "--certificate", "x.pem"], "belong together"),
        (["serve", "cloud", "--part", "CLOUD", "--certificate", "x.pem", "--key", "x.pem"], "cannot be read"),
        (["serve", "cloud", "--part", "CLOUD", "--sessions", "0"], "at least one session"),
        (["serve", "cloud", "--part", "CLOUD", "--rate", "-1"], "rate is -1"),
        (["serve", "cloud", "--part", "CLOUD", "--token_file", "none"], "cannot be read"),
        (["serve", "edge"], "one of the two"),
        (["serve", "edge", *FOLDER, "--edge.cloud", "h:1"], "An edge needs a policy"),
        (["serve", "edge", *FOLDER, "--edge.cloud", "h:1", *POLICY, "--compile", "true"], "compile stood beside edge"),
        (["serve", "edge", *FOLDER, "--edge.cloud", "h:1", *POLICY, "--address", "0.0.0.0:80"], "wants no token"),
        (["serve", "edge", *FOLDER, "--edge.cloud", "h:1", *POLICY, "--waiting", "-2"], "waiting is -2"),
        (["serve", "edge", *FOLDER, "--edge.cloud", "h:1", *POLICY, "--edge.deadline", ".nan"], "was given .nan"),
        (["generate", PROMPT, *FOLDER, *POLICY], "asks a cloud, and none was given"),
        (["generate", PROMPT, *FOLDER, *POLICY, "--edge.cloud", "h"], "HOST:PORT is wanted"),
        (["generate", PROMPT, *FOLDER, *POLICY, "--edge.cloud", "h:1", "--edge.wire", "int2"], "one of float32"),
        (["generate", PROMPT, *FOLDER, *POLICY, "--edge.cloud", "h:1", "--edge.draft_limit", "3"], "mode drafting"),
        (["generate", PROMPT, *FOLDER, *POLICY, "--edge.cloud", "h:1", "--edge.timeout", "0"], "timeout is 0"),
        (["generate", PROMPT, *FOLDER, *POLICY, "--edge.cloud", "h:1", "--edge.mode", "standalone"], "asks no cloud"),
        (["generate", PROMPT, *FOLDER, *POLICY, "--edge.cloud", "h:1", "--heads", "x"], "heads stood beside edge"),
        (["generate", PROMPT, *FOLDER, *POLICY, "--edge.cloud", "h:1", "--device", "cuda"], "device stood beside edge"),
        (["generate", PROMPT, *FOLDER, *POLICY, "--edge.cloud", "http://h:1"], "without http://"),
        (
            ["generate", PROMPT, *FOLDER, *POLICY, "--edge.cloud", "h:1", "--temperature", "1"],
            "temperature was given",
        ),
        (
            ["generate", PROMPT, *FOLDER, *POLICY, "--edge.cloud", "h:1", "--do_sample", "true"],
            "do_sample was given",
        ),
        (["generate", PROMPT, "--edge.folder", "CLOUD", *POLICY, "--edge.cloud", "h:1"], "Give the folder edge"),
        (["generate", PROMPT, "--edge.folder", "nowhere", *POLICY, "--edge.cloud", "h:1"], "holds no part of a model"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(
    command: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edge, cloud = folders("llama")
    places = {"EDGE": edge, "CLOUD": cloud, "OUT": edge.parent}
    assert run(*[str(places.get(each, each)) for each in command]) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert told in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_an_exit_that_no_edge_reaches_is_told_and_the_next_command_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits = "{2: {}, 4: {}, 8: {}}"
    assert run("split", "assets/llama", "--exits", exits, "--at", "2", "--out", str(tmp_path / "s")) == 0
    told = capsys.readouterr().out
    assert "Left out: the exits at 4, 8, which the edge does not reach" in told
    (command,) = re.findall(r"dynamax generate '\.\.\.' (.*) --edge.cloud HOST:PORT (.*)", told)
    options = [*" ".join(command).split(), "--edge.mode", "standalone", "--max_new_tokens", "2"]
    assert run("generate", PROMPT, *options) == 0


def test_a_taken_port_is_told_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert run("serve", "edge", "--backbone", "assets/llama", "--address", address) == 2
    told = capsys.readouterr()
    assert f"cannot listen at {address}: Address already in use" in told.err
    assert "answers at" not in told.out
