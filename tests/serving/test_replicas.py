"""Two replicas behind Ray Serve: each session stays on its own, and one that dies or hangs changes no token."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil
import pytest
import torch

from dynamax.decoding.full import Full
from dynamax.errors import UserError
from dynamax.policies import MaxProb, Never
from dynamax.serving.cloud import Server
from dynamax.serving.contexts import Limits
from dynamax.serving.edge import Collaborative, Drafting
from dynamax.serving.link import Link
from dynamax.serving.options import check_replicas
from dynamax.serving.replicas import Replicas, share, start
from dynamax.serving.wire import FORMATS, METHODS, SERVICE, VERSION, packed, unpacked
from tests.serving.house import CUT, PROMPT, edge_part, folders, link, prompt, tokens, whole
from tests.serving.test_commands import run, running

pytestmark = pytest.mark.slow

KIND, LONG = "llama", 40
QUESTIONS = ["What is the capital of France?", "Who wrote Hamlet?", "Name a fruit.", "How are you?"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Two replicas, one Ray for all tests here."""
    front = start(folders(KIND)[1], 2, limits=Limits(sessions=4), tokens=["one", "two"])
    made = Server(front)
    made.start()
    processes = [psutil.Process(each["process"]) for each in front.living()]
    yield made
    made.stop(0.2)
    assert not psutil.wait_procs(processes, 10)[1]


@pytest.fixture
def front(server: Server) -> Replicas:
    """The front of two replicas that live and have no session."""
    assert isinstance(server.cloud, Replicas)
    found = server.cloud
    wait_until(lambda: sessions(found) == [0, 0])
    return found


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)


def sessions(front: Replicas) -> list[int]:
    return sorted(each["sessions"] for each in front.living())


def right(question: str, count: int = LONG) -> list[int]:
    return tokens(Full(whole(KIND).backbone), prompt(KIND, question), count)[0]


def collaborating(connection: Link) -> Collaborative:
    backbone, exits, _ = edge_part(KIND)
    return Collaborative(backbone, exits, Never(), link=connection)


def call(
    port: int, method: str, header: dict[str, Any], token: str | None = "one", body: bytes = b""
) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """How one call ends, and what it says."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            reply = channel.unary_unary(f"/{SERVICE}/{method}")(packed(header, body), timeout=20, metadata=metadata)
        except grpc.RpcError as error:
            return error.code(), {"told": error.details()}
    return grpc.StatusCode.OK, unpacked(reply).header


def opened(port: int, **other: object) -> tuple[grpc.StatusCode, dict[str, Any]]:
    part = edge_part(KIND)[2]
    header = {"version": VERSION, "fingerprint": part.fingerprint, "start": CUT, "width": part.width}
    return call(port, "open", header | other)


def asked(session: str) -> dict[str, Any]:
    """The header of a token that is asked for, after a state that has not come."""
    return {"session": session, "turn": 0, "after": 1, "drafts": []}


# -- sessions ------------------------------------------------------------------------------------------------


def test_edges_at_once_get_the_tokens_of_one_process(server: Server, front: Replicas) -> None:
    links = [Link(f"127.0.0.1:{server.port}", edge_part(KIND)[2], token="one") for _ in QUESTIONS]
    answers = [
        collaborating(connection).decode(prompt(KIND, question), max_new_tokens=LONG)
        for connection, question in zip(links, QUESTIONS, strict=True)
    ]
    first = [int(next(answer).token_B) for answer in answers]
    assert sessions(front) == [2, 2]
    with ThreadPoolExecutor() as pool:
        rest = list(pool.map(lambda answer: [int(step.token_B) for step in answer], answers))
    for connection, question, head, tail in zip(links, QUESTIONS, first, rest, strict=True):
        assert [head, *tail] == right(question)
        assert connection.traffic.again == 0  # every call came to the replica that has the session
        connection.close()
    assert sessions(front) == [0, 0]


def test_drafts_are_verified_too(server: Server, front: Replicas) -> None:
    backbone, exits, _ = edge_part(KIND)
    with link(KIND, server.port, token="two") as connection:
        edge = Drafting(backbone, exits, MaxProb(0.5), link=connection, draft_limit=4)
        assert tokens(edge, prompt(KIND), LONG)[0] == right(PROMPT)


def test_sessions_are_opened_where_the_fewest_are(server: Server, front: Replicas) -> None:
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: opened(server.port), range(8)))
    assert [code for code, _ in found] == [grpc.StatusCode.OK] * 8
    assert sessions(front) == [4, 4]
    code, said = opened(server.port)
    assert (code, said["told"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "all sessions are in use")
    names = [reply["session"] for _, reply in found]
    _, health = call(server.port, "health", {})
    assert (health["sessions"], health["limit"], health["replicas"], health["working"]) == (8, 8, 2, True)
    assert {name.partition(".")[0] for name in names} == {each["replica"] for each in front.living()}
    assert front.metrics.registry.get_sample_value("dynamax_cloud_sessions") == 8
    for name in names:
        assert call(server.port, "close", {"session": name})[0] is grpc.StatusCode.OK
    opens = {"method": "open", "code": "RESOURCE_EXHAUSTED"}
    assert front.metrics.registry.get_sample_value("dynamax_cloud_calls_total", opens) == 1


# -- what is refused -------------------------------------------------------------------------------------------


def test_who_may_not_ask_is_refused(server: Server, front: Replicas) -> None:
    for method in METHODS:
        assert call(server.port, method, {}, "three")[0] is grpc.StatusCode.UNAUTHENTICATED
    name = opened(server.port)[1]["session"]
    assert call(server.port, "next", asked(name), "two")[0] is grpc.StatusCode.NOT_FOUND
    assert call(server.port, "close", {"session": name}, "two")[0] is grpc.StatusCode.OK  # and nothing happens
    assert sessions(front) == [0, 1]
    assert call(server.port, "close", {"session": name})[0] is grpc.StatusCode.OK


def test_what_replicas_refuse_is_told_as_one_cloud_tells_it(server: Server, front: Replicas) -> None:
    width = edge_part(KIND)[2].width
    for change in ({"version": 99}, {"start": 2}, {"width": 7}, {"fingerprint": None}):
        assert opened(server.port, **change)[0] is grpc.StatusCode.FAILED_PRECONDITION
    name = opened(server.port)[1]["session"]
    replica, _, key = name.partition(".")
    other = next(each["replica"] for each in front.living() if each["replica"] != replica)
    for unknown in ("x", "", ".", key, f"{replica}.x", f"{other}.{key}", f"{name}.x"):
        assert call(server.port, "next", asked(unknown))[0] is grpc.StatusCode.NOT_FOUND
    states = {"session": name, "turn": 0, "first": 0, "count": 1, "format": "float32"}
    odd = FORMATS["float32"].encode(torch.full((1, width), float("nan")))
    for header in (states, states | {"format": "float64"}, states | {"first": -1}, states | {"session": 7}):
        assert call(server.port, "send", header, body=odd)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert call(server.port, "send", states, body=bytes(10_000_000))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert call(server.port, "close", {"session": name})[0] is grpc.StatusCode.OK


def test_nobody_else_can_call_a_replica(front: Replicas) -> None:
    from ray.serve.generated.serve_pb2 import ASGIRequest
    from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

    doors = [
        each.laddr
        for process in psutil.Process().children(recursive=True)
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN and each.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ]
    assert len(doors) <= 2  # Ray Serve's own in each replica, which has no setting
    for door in doors:
        with grpc.insecure_channel(f"127.0.0.1:{door.port}") as channel, pytest.raises(grpc.RpcError) as refused:
            ASGIServiceStub(channel).HandleRequest(ASGIRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


# -- what happens to replicas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_a_replica_that_is_lost_changes_no_token(server: Server, front: Replicas, how: signal.Signals) -> None:
    """Each replica has an answer, and a call that waits for states, when one of the two is lost."""
    with (
        ThreadPoolExecutor() as pool,
        link(KIND, server.port, token="one", timeout=30) as struck,
        link(KIND, server.port, token="one", timeout=30) as spared,
    ):
        edges = (collaborating(struck), collaborating(spared))
        answers = [edge.decode(prompt(KIND), max_new_tokens=LONG) for edge in edges]
        said = [[int(next(answer).token_B) for _ in range(10)] for answer in answers]
        names = [opened(server.port)[1]["session"] for _ in answers]
        waiting = [pool.submit(call, server.port, "next", asked(name)) for name in names]
        assert sessions(front) == [2, 2]
        time.sleep(0.5)
        lost = process_of(front, str(struck._sent.session))
        os.kill(lost, how)
        for row, answer in zip(said, answers, strict=True):
            row += [int(step.token_B) for step in answer]
        assert said == [right(PROMPT)] * 2
        assert (struck.traffic.again, spared.traffic.again) == (1, 0)
        assert struck.traffic.waited < 15
        assert sorted(each.result(10)[0].name for each in waiting) == ["NOT_FOUND", "OK"]
    for name in names:
        assert call(server.port, "close", {"session": name})[0] is grpc.StatusCode.OK  # one is gone already
    assert sessions(front) == [0]
    if how is signal.SIGSTOP:
        os.kill(lost, signal.SIGKILL)  # Ray Serve would, after a while


def process_of(front: Replicas, session: str) -> int:
    """The process of the replica that has a session."""
    place = session.partition(".")[0]
    return next(each["process"] for each in front.living() if each["replica"] == place)


# -- the command -----------------------------------------------------------------------------------------------


def test_the_command_starts_two_and_they_answer(capsys: pytest.CaptureFixture[str]) -> None:
    edge, cloud = folders(KIND)
    options = ["--part", str(cloud), "--address", "127.0.0.1:0", "--precision", "null", "--replicas", "2"]
    with running("serve", "cloud", *options) as line:
        port = re.search(r"4 to 8 in 2 replicas listen at .*:(\d+), without TLS; no token is needed", line)
        assert port is not None, line
        given = ["--edge.folder", str(edge), "--edge.cloud", f"127.0.0.1:{port[1]}", "--precision", "null"]
        assert run("generate", PROMPT, *given, "--policy", "Never", "--max_new_tokens", "16") == 0
        wanted = whole(KIND).generate(PROMPT, max_new_tokens=16, do_sample=False).text
        assert wanted in capsys.readouterr().out  # Ray may say beside it what was killed before


def test_replicas_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", "cloud", "--part", str(folders(KIND)[1]), "--replicas", "0") == 2
    assert "replicas is 0; it must be at least 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="Give the folder cloud"):
        start(folders(KIND)[0], 2)
    monkeypatch.setattr("dynamax.serving.options.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'dynamax-exits\[ray\]'"):
        check_replicas(2)
    check_replicas(1)


@pytest.mark.parametrize(
    ("nodes", "count", "wanted"),
    [([2], 2, 1), ([2], 3, 0.666), ([8, 8], 2, 8), ([8, 8, 8], 2, 8), ([16, 4], 2, 8), ([16, 4], 5, 4), ([0, 4], 2, 2)],
)
def test_cores_are_shared_by_replicas_of_one_machine(nodes: list[float], count: int, wanted: float) -> None:
    assert share(nodes, count) == wanted
