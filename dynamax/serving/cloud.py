"""The cloud's side of the wire: gRPC with TLS and bearer tokens around ``Cloud``.

A call's errors say what was wrong with it, and nothing of other sessions; what goes wrong inside is logged, not sent.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc

from dynamax.backbones.parts import Part
from dynamax.errors import UserError
from dynamax.serving.contexts import FullError, GoneError
from dynamax.serving.metrics import Metrics
from dynamax.serving.service import BusyError, DeniedError, MismatchError, Owners, most_bytes
from dynamax.serving.wire import ALIVE_MS, METHODS, SERVICE, Message, WireError, packed, unpacked

LOG = logging.getLogger("dynamax.cloud")

CODES: dict[type[Exception], grpc.StatusCode] = {
    WireError: grpc.StatusCode.INVALID_ARGUMENT,
    DeniedError: grpc.StatusCode.UNAUTHENTICATED,
    MismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    GoneError: grpc.StatusCode.NOT_FOUND,
    FullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""What a caller is told, by what went wrong; anything else is an internal error."""


class Offered(Protocol):
    """What a server offers: a ``Cloud``, or what stands for several; beside these a method for each of ``METHODS``.

    Attributes:
        part: Which part of a model it is.
        owners: Who may use it.
        metrics: Counts calls.
    """

    part: Part
    owners: Owners
    metrics: Metrics

    def stop(self) -> None:
        """End."""
        ...


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, as PEM files.

    Attributes:
        chain: The certificate, and those that vouch for it.
        key: Its private key.
    """

    chain: Path
    key: Path


class Server:
    """A cloud that listens.

    Args:
        cloud: What it offers.
        address: Where to listen, ``HOST:PORT``; port 0 takes a free one.
        certificate: For TLS; without one nothing is encrypted, which only this machine's own addresses may do.
        threads: Calls at a time; a token that is waited for takes one.

    Attributes:
        port: Where it listens.

    Raises:
        UserError: If it cannot listen there, or would without TLS where others can reach it.
    """

    def __init__(
        self, cloud: Offered, address: str = "127.0.0.1:0", certificate: Certificate | None = None, threads: int = 64
    ) -> None:
        self.cloud = cloud
        host = address.rpartition(":")[0].strip("[]")
        if certificate is None and host not in ("127.0.0.1", "localhost", "::1"):
            raise UserError(
                f"The cloud was to listen at {address} without TLS, where others can read what is sent. Give it a "
                f"certificate and its key, or listen at 127.0.0.1."
            )
        options = [
            ("grpc.max_receive_message_length", most_bytes(cloud.part)),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", ALIVE_MS // 2),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", ALIVE_MS // 2),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        most = threads + 16  # what waits for a thread takes memory
        self._server = grpc.server(ThreadPoolExecutor(threads), options=options, maximum_concurrent_rpcs=most)
        handlers = {name: grpc.unary_unary_rpc_method_handler(self._method(name)) for name in METHODS}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            if certificate is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, _credentials(certificate))
        except RuntimeError as error:
            raise UserError(
                f"The cloud cannot listen at {address}: it is taken, or none of this machine's. Choose another address."
            ) from error
        if not self.port:
            raise UserError(f"The cloud cannot listen at {address}. Choose another port, or free this one.")

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()

    def stop(self, grace: float | None = 1.0) -> None:
        """Finish the calls under way, and end."""
        self._server.stop(grace).wait()
        self.cloud.stop()

    def wait(self) -> None:
        """Until it is stopped."""
        self._server.wait_for_termination()

    def _method(self, name: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def call(raw: bytes, context: grpc.ServicerContext) -> bytes:
            begin, code, reply = time.perf_counter(), grpc.StatusCode.OK, b""
            try:
                reply = packed(self._answer(name, raw, context))
            except Exception as error:  # noqa: BLE001 - sorted below: a caller is told its own faults alone
                code = CODES.get(type(error), grpc.StatusCode.INTERNAL)
                if code is grpc.StatusCode.INTERNAL:
                    LOG.exception("failed", extra={"facts": {"method": name}})
                told = str(error) if code is not grpc.StatusCode.INTERNAL else "the cloud failed; its log says why"
                context.set_code(code)
                context.set_details(told or "there is no such session; open another and send its states again")
            self.cloud.metrics.calls.labels(name, code.name).inc()
            facts = {"method": name, "code": code.name, "bytes": len(raw), "ms": 1000 * (time.perf_counter() - begin)}
            LOG.log(
                logging.DEBUG if code is grpc.StatusCode.UNAUTHENTICATED else logging.INFO,
                "call",
                extra={"facts": facts},
            )
            return reply

        return call

    def _answer(self, name: str, raw: bytes, context: grpc.ServicerContext) -> dict[str, Any]:
        shown = dict(context.invocation_metadata()).get("authorization", "")
        owner = self.cloud.owners.find(str(shown).removeprefix("Bearer ") if shown else None)
        message: Message = unpacked(raw)
        return getattr(self.cloud, name)(message, owner)


def _credentials(certificate: Certificate) -> grpc.ServerCredentials:
    try:
        return grpc.ssl_server_credentials([(certificate.key.read_bytes(), certificate.chain.read_bytes())])
    except OSError as error:
        raise UserError(f"The certificate cannot be read: {error}. Give its file and its key's, as PEM.") from error


class JsonLines(logging.Formatter):
    """A line of JSON for each event."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, event and its facts."""
        facts = {"time": record.created, "level": record.levelname.lower(), "event": record.getMessage()}
        facts |= getattr(record, "facts", {})
        if record.exc_info:
            facts["error"] = self.formatException(record.exc_info)
        return json.dumps(facts)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Write events as lines of JSON to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    LOG.addHandler(handler)
    LOG.setLevel(level)
    LOG.propagate = False
