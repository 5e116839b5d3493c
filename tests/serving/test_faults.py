"""What networks, clients and machines do: nothing hangs, nothing is told of others, no token changes."""

from __future__ import annotations

import datetime
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
import trustme

import dynamax.serving.service
from dynamax.decoding.full import Full
from dynamax.errors import UserError
from dynamax.policies import MaxProb, Never
from dynamax.serving.cloud import Certificate, Server
from dynamax.serving.contexts import Limits
from dynamax.serving.edge import CLOUD, Collaborative, Drafting
from dynamax.serving.link import CloudDown, Link
from dynamax.serving.service import Cloud
from dynamax.serving.wire import FORMATS, METHODS, SERVICE, VERSION, packed, unpacked
from tests.serving.house import CUT, KINDS, cloud, cloud_part, edge_part, link, prompt, tokens, whole
from tests.serving.proxy import Proxy

LONG = 40


def right(kind: str, count: int = LONG) -> list[int]:
    return tokens(Full(whole(kind).backbone), prompt(kind), count)[0]


def drafting(kind: str, connection: Link) -> Drafting:
    backbone, exits, _ = edge_part(kind)
    return Drafting(backbone, exits, MaxProb(0.5), link=connection, draft_limit=4)


@contextmanager
def through(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    try:
        yield proxy
    finally:
        proxy.close()


def call(port: int, name: str, raw: bytes, token: str | None = None) -> grpc.StatusCode:
    """How one call ends."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(f"/{SERVICE}/{name}")(raw, timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def opened(port: int, kind: str = "llama", **other: object) -> tuple[grpc.StatusCode, str]:
    """A session opened by hand."""
    part = cloud_part(kind)[1]
    header = {"version": VERSION, "fingerprint": part.fingerprint, "start": CUT, "width": part.width} | other
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            reply = channel.unary_unary(f"/{SERVICE}/open")(packed(header), timeout=10)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, unpacked(reply).header["session"]


# -- the cloud -----------------------------------------------------------------------------------------------


def test_a_cloud_that_is_not_there_is_an_error_in_time() -> None:
    with link("llama", 1, timeout=0.5) as connection:
        begin = time.monotonic()
        with pytest.raises(CloudDown, match=r"did not answer within .*refused"):
            tokens(drafting("llama", connection), prompt("llama"))
        assert time.monotonic() - begin < 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_cloud_killed_in_the_middle_and_back_again_changes_no_token(kind: str) -> None:
    server = Server(Cloud(*cloud_part(kind)))
    server.start()
    with link(kind, server.port, timeout=20) as connection:
        said = []
        for number, step in enumerate(drafting(kind, connection).decode(prompt(kind), max_new_tokens=LONG)):
            said.append(int(step.token_B))
            if number == 9:
                server.stop(0)
                server = Server(Cloud(*cloud_part(kind)), f"127.0.0.1:{server.port}")
                threading.Timer(0.5, server.start).start()
        assert said == right(kind)
        assert connection.traffic.again == 1
    server.stop(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_the_cloud_has_dropped_is_sent_again(kind: str) -> None:
    with cloud(kind, limits=Limits(sessions=1, idle=0)) as server, link(kind, server.port) as connection:
        said = []
        for number, step in enumerate(drafting(kind, connection).decode(prompt(kind), max_new_tokens=LONG)):
            said.append(int(step.token_B))
            if number % 10 == 5:
                assert opened(server.port, kind)[0] is grpc.StatusCode.OK  # another needs the room
        assert said == right(kind)
        assert connection.traffic.again >= 2


# -- the network ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_is_cut_again_and_again_changes_no_token(kind: str) -> None:
    with cloud(kind) as server, through(server) as proxy, link(kind, proxy.port, timeout=20) as connection:
        said = []
        for number, step in enumerate(drafting(kind, connection).decode(prompt(kind), max_new_tokens=LONG)):
            said.append(int(step.token_B))
            if number % 12 == 6:
                proxy.cut()
        assert said == right(kind)


@pytest.mark.slow
def test_a_slow_link_changes_no_token() -> None:
    with cloud("mamba2") as server, through(server) as proxy, link("mamba2", proxy.port, timeout=20) as connection:
        proxy.delay = 0.02
        assert tokens(drafting("mamba2", connection), prompt("mamba2"), 16)[0] == right("mamba2", 16)


@pytest.mark.slow
def test_a_link_that_goes_silent_is_not_waited_for_longer_than_allowed() -> None:
    backbone, exits, _ = edge_part("llama")
    with cloud("llama") as server, through(server) as proxy, link("llama", proxy.port, timeout=1.0) as connection:
        edge = Collaborative(backbone, exits, Never(), link=connection, deadline=0.2)
        begin, origins = time.monotonic(), []
        for number, _ in enumerate(edge.decode(prompt("llama"), max_new_tokens=80)):
            proxy.silent = 4 <= number < 12
            time.sleep(0.2 if number >= 12 else 0)
            origins = edge.origins
        assert origins[:5] == [CLOUD] * 5
        assert CLOUD not in origins[6:12]
        assert CLOUD in origins[13:]  # back again
        assert time.monotonic() - begin < 30
        proxy.silent = True
        with pytest.raises(CloudDown):
            tokens(drafting("llama", connection), prompt("llama"), 4)


# -- whoever asks --------------------------------------------------------------------------------------------


def test_a_wrong_token_is_refused_everywhere() -> None:
    with cloud("llama", tokens=["one", "two"]) as server:
        for name in METHODS:
            for shown in (None, "", "three", "One", "one "):
                assert call(server.port, name, packed({}), shown) is grpc.StatusCode.UNAUTHENTICATED
        with link("llama", server.port, token="three") as connection, pytest.raises(UserError, match="does not know"):
            tokens(drafting("llama", connection), prompt("llama"))
        with link("llama", server.port, token="two") as connection:
            assert tokens(drafting("llama", connection), prompt("llama"), 8)[0] == right("llama", 8)


def test_a_session_belongs_to_the_token_that_made_it() -> None:
    with cloud("llama", tokens=["one", "two"]) as server, link("llama", server.port, token="one") as connection:
        for number, _ in enumerate(drafting("llama", connection).decode(prompt("llama"), max_new_tokens=8)):
            if number == 3:
                header = {"session": connection._sent.session, "turn": 0, "after": 1, "drafts": []}
                assert call(server.port, "next", packed(header), "two") is grpc.StatusCode.NOT_FOUND
                assert call(server.port, "close", packed(header), "two") is grpc.StatusCode.OK  # and nothing happens


@pytest.mark.slow
def test_another_model_is_refused() -> None:
    wanted = pytest.raises(UserError, match="Use the two folders of one split")
    with cloud("mamba2") as server, link("llama", server.port) as connection, wanted:
        tokens(drafting("llama", connection), prompt("llama"))
    with cloud("llama") as server:
        for change in ({"version": 99}, {"start": 2}, {"width": 7}, {"fingerprint": None}, {"fingerprint": ["x"]}):
            assert opened(server.port, **change)[0] is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    "change",
    [
        {"count": 10**6},
        {"first": 10**6},
        {"count": 0},
        {"first": -1},
        {"format": "float64"},
        {"format": None},
        {"turn": "0"},
        {"count": 3},
        {"count": 1},
    ],
)
def test_a_tensor_that_is_not_as_it_says_is_refused(change: dict[str, object]) -> None:
    width = cloud_part("llama")[1].width
    body = FORMATS["float32"].encode(torch.zeros(2, width))
    with cloud("llama") as server:
        header = {"session": opened(server.port)[1], "turn": 0, "first": 0, "count": 2, "format": "float32"}
        assert call(server.port, "send", packed(header, body)) is grpc.StatusCode.OK
        assert call(server.port, "send", packed(header | change, body)) is grpc.StatusCode.INVALID_ARGUMENT
        odd = FORMATS["float32"].encode(torch.full((2, width), float("nan")))
        assert call(server.port, "send", packed(header, odd)) is grpc.StatusCode.INVALID_ARGUMENT
        asked = {**header, "after": 2, "drafts": []}  # states may come with what is asked
        assert call(server.port, "next", packed(asked | change, body)) is grpc.StatusCode.INVALID_ARGUMENT
        assert call(server.port, "next", packed(asked, odd)) is grpc.StatusCode.INVALID_ARGUMENT
        assert call(server.port, "next", packed(asked, body)) is grpc.StatusCode.OK


@pytest.mark.slow
def test_a_message_larger_than_a_context_is_refused_before_it_is_read() -> None:
    with cloud("llama", limits=Limits(positions=32)) as server:
        assert call(server.port, "send", bytes(10_000_000)) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "change",
    [
        {"after": 0},
        {"after": 10**9},
        {"drafts": "no"},
        {"drafts": [0] * 65},
        {"drafts": [-1]},
        {"drafts": [10**9]},
        {"drafts": [1, 2]},
    ],
)
def test_a_token_that_cannot_be_asked_for_is_refused(change: dict[str, object]) -> None:
    with cloud("llama") as server:
        header = {"session": opened(server.port)[1], "turn": 0, "after": 2, "drafts": []}
        assert call(server.port, "next", packed(header | change)) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.slow
def test_ten_thousand_random_messages_leave_the_cloud_as_it_was() -> None:
    order, codes = random.Random(0), set()
    with cloud("llama") as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        session = opened(server.port)[1]
        good = packed(
            {"session": session, "turn": 0, "first": 0, "count": 1, "format": "int8", "drafts": []}, b"x" * 90
        )
        for _ in range(10_000):
            raw = bytearray(order.choice([good, order.randbytes(order.randrange(200))]))
            for _ in range(order.randrange(1, 6) if raw else 0):
                raw[order.randrange(len(raw))] = order.randrange(256)
            name = order.choice(["open", "send", "close"])
            try:
                channel.unary_unary(f"/{SERVICE}/{name}")(bytes(raw), timeout=10)
            except grpc.RpcError as error:
                codes.add(error.code().name)
        assert codes <= {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}
        with link("llama", server.port) as connection:
            assert tokens(drafting("llama", connection), prompt("llama"), 8)[0] == right("llama", 8)


@pytest.mark.slow
def test_fifty_clients_at_once_get_their_own_answers() -> None:
    questions = [f"What is {number} plus {number % 7}?" for number in range(50)]
    wanted = [tokens(Full(whole("mamba2").backbone), prompt("mamba2", each), 6)[0] for each in questions]
    backbone, exits, _ = edge_part("mamba2")
    found: dict[int, list[int]] = {}
    with cloud("mamba2", limits=Limits(sessions=50)) as server:

        def one(number: int) -> None:
            with link("mamba2", server.port, timeout=60) as connection:
                edge = Collaborative(backbone, exits, Never(), link=connection)
                found[number] = tokens(edge, prompt("mamba2", questions[number]), 6)[0]

        run_all([lambda number=number: one(number) for number in range(50)])
        assert [found[number] for number in range(50)] == wanted
        assert len(server.cloud.contexts) == 0
        batches = server.cloud.metrics.registry.get_sample_value("dynamax_cloud_pass_rows_sum")
        passes = server.cloud.metrics.registry.get_sample_value("dynamax_cloud_pass_rows_count")
        assert batches == 300
        assert passes < 300  # sessions were finished side by side


def test_no_room_is_said_and_waited_for() -> None:
    with cloud("llama", limits=Limits(sessions=1, idle=60)) as server:
        assert opened(server.port)[0] is grpc.StatusCode.OK
        code, told = opened(server.port)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "all sessions are in use" in told
        with link("llama", server.port, timeout=0.5) as connection, pytest.raises(CloudDown, match="all sessions"):
            tokens(drafting("llama", connection), prompt("llama"))


def test_calls_above_the_rate_are_refused() -> None:
    now = [0.0]
    with cloud("llama", tokens=["one"], rate=2.0, clock=lambda: now[0]) as server:
        ends = [call(server.port, "close", packed({"session": "x"}), "one") for _ in range(6)]
        assert [end.name for end in ends] == ["OK"] * 4 + ["RESOURCE_EXHAUSTED"] * 2
        now[0] = 0.6
        assert call(server.port, "close", packed({"session": "x"}), "one") is grpc.StatusCode.OK
        assert call(server.port, "close", packed({"session": "x"}), "one") is not grpc.StatusCode.OK
        now[0] = 60.0
        assert call(server.port, "close", packed({"session": "x"}), "one") is grpc.StatusCode.OK


@pytest.mark.slow
def test_an_edge_that_was_killed_leaves_no_trace_that_another_could_see() -> None:
    """A process that asks, and is killed in the middle of its answer; then it begins anew."""
    program = (
        "import sys, time; from tests.serving.house import *; from dynamax.policies import Never\n"
        "from dynamax.serving.edge import Collaborative\n"
        "backbone, exits, part = edge_part('llama'); connection = Link(f'127.0.0.1:{sys.argv[1]}', part)\n"
        "edge = Collaborative(backbone, exits, Never(), link=connection)\n"
        "for number, step in enumerate(edge.decode(prompt('llama'), max_new_tokens=40)):\n"
        "    print(int(step.token_B), flush=True)\n"
        "    time.sleep(0.05)\n"
    )
    wanted = right("llama")
    with cloud("llama", limits=Limits(sessions=1, idle=0.2)) as server:
        command = [sys.executable, "-c", program, str(server.port)]
        here = {**os.environ, "PYTHONPATH": "."}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=here) as first:
            assert first.stdout is not None
            assert [int(first.stdout.readline()) for _ in range(5)] == wanted[:5]
            first.kill()
        time.sleep(0.3)
        with link("llama", server.port) as connection:
            assert tokens(drafting("llama", connection), prompt("llama"))[0][:8] == wanted[:8]


def test_a_context_that_is_full_is_said() -> None:
    length = prompt("llama").shape[1]
    full = pytest.raises(UserError, match=f"keeps {length + 4} positions of an answer")
    with cloud("llama", limits=Limits(positions=length + 4)) as server, link("llama", server.port) as connection, full:
        tokens(drafting("llama", connection), prompt("llama"))


@pytest.mark.slow
def test_a_call_that_is_made_again_while_its_answer_is_on_the_way_gets_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connection is cut in the middle of each pass, and the edge asks again."""
    with cloud("granite") as server, through(server) as proxy, link("granite", proxy.port, timeout=20) as connection:
        passed = [0]
        whole_pass = dynamax.serving.service.finish

        def cut_in_the_middle(*given: object) -> object:
            said = whole_pass(*given)  # type: ignore[arg-type]
            passed[0] += 1
            if passed[0] % 3 == 0:
                proxy.cut()
                time.sleep(0.05)  # the call is made again while this one has not ended
            return said

        monkeypatch.setattr("dynamax.serving.service.finish", cut_in_the_middle)
        assert tokens(drafting("granite", connection), prompt("granite"), LONG)[0] == right("granite")


def test_an_answer_that_ends_here_ends_there() -> None:
    with cloud("llama") as server, link("llama", server.port) as connection:
        steps = drafting("llama", connection).decode(prompt("llama"), max_new_tokens=LONG)
        next(steps)
        assert len(server.cloud.contexts) == 1
        steps.close()
        for _ in range(100):
            if not len(server.cloud.contexts):
                break
            time.sleep(0.02)
        assert len(server.cloud.contexts) == 0


@pytest.mark.slow
def test_a_silent_address_costs_no_more_than_the_deadline() -> None:
    """Nobody answers there, not even with a refusal."""
    backbone, exits, _ = edge_part("llama")
    listening = socket.create_server(("127.0.0.1", 0), backlog=1)
    port = listening.getsockname()[1]
    with listening, link("llama", port, timeout=10) as connection:
        edge = Collaborative(backbone, exits, Never(), link=connection, deadline=0.2)
        begin = time.monotonic()
        assert len(tokens(edge, prompt("llama"), 6)[0]) == 6
        assert time.monotonic() - begin < 3


# -- TLS -------------------------------------------------------------------------------------------------------


def certified(folder: Path, **options: object) -> tuple[Certificate, Path]:
    """A certificate of this machine's address, and what vouches for it."""
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1", **options)  # type: ignore[arg-type]
    chain, key, root = folder / "chain.pem", folder / "key.pem", folder / "root.pem"
    chain.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    made.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(root)
    return Certificate(chain, key), root


@contextmanager
def secured(folder: Path, **options: object) -> Iterator[tuple[int, Path]]:
    certificate, root = certified(folder, **options)
    server = Server(Cloud(*cloud_part("llama")), certificate=certificate)
    server.start()
    try:
        yield server.port, root
    finally:
        server.stop(0.2)


def test_with_tls_the_tokens_are_the_same(tmp_path: Path) -> None:
    with secured(tmp_path) as (port, root), link("llama", port, root=root) as connection:
        assert tokens(drafting("llama", connection), prompt("llama"), LONG)[0] == right("llama")


@pytest.mark.slow
def test_an_expired_certificate_is_not_trusted(tmp_path: Path) -> None:
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    options = {"not_before": past, "not_after": past + datetime.timedelta(days=1)}
    with (
        secured(tmp_path, **options) as (port, root),
        link("llama", port, root=root, timeout=1.5) as connection,
        pytest.raises(CloudDown),
    ):
        tokens(drafting("llama", connection), prompt("llama"))


@pytest.mark.slow
def test_a_certificate_that_nobody_vouches_for_and_no_tls_are_not_trusted(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    _, strange = certified(other)
    with secured(tmp_path) as (port, _):
        for options in ({"root": strange}, {}):
            with link("llama", port, timeout=1.5, **options) as connection, pytest.raises(CloudDown):
                tokens(drafting("llama", connection), prompt("llama"))


def test_without_tls_only_this_machine_is_listened_to(tmp_path: Path) -> None:
    made = Cloud(*cloud_part("llama"))
    with pytest.raises(UserError, match="without TLS"):
        Server(made, "0.0.0.0:0")
    with pytest.raises(UserError, match="certificate cannot be read"):
        Server(made, "0.0.0.0:0", Certificate(tmp_path / "none.pem", tmp_path / "none.key"))
    made.stop()
    with pytest.raises(UserError, match="cannot be read"):
        Link("127.0.0.1:1", edge_part("llama")[2], root=tmp_path / "none.pem")


def run_all(works: list[Callable[[], None]]) -> None:
    """All at once, each in a thread; the first error is raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
