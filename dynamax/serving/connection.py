"""Calls to a cloud. A connection that has gone silent is given up, and made anew."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import grpc

from dynamax.errors import UserError
from dynamax.serving.wire import ALIVE_MS, METHODS, SERVICE

SILENT = 2 * ALIVE_MS / 1000
"""Seconds without any answer after which a call that is late takes the connection with it."""

OPTIONS = (
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", ALIVE_MS),
    ("grpc.keepalive_timeout_ms", ALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # else a new channel would use the connection of the old one
)
"""Of gRPC. It gives up a connection that is silent, if a call waits on it for long enough."""


class Connection:
    """Calls to a cloud, from any thread.

    gRPC does not notice that a connection is dead while every call on it ends by a short deadline. So the time since
    the last answer is kept here too.

    Args:
        address: Of the cloud, ``HOST:PORT``.
        token: Bearer token.
        root: Certificate that vouches for the cloud's, as a PEM file; TLS is used if there is one.

    Raises:
        UserError: If the certificate cannot be read.
    """

    def __init__(self, address: str, *, token: str | None = None, root: Path | None = None) -> None:
        self._address, self._credentials = address, None if root is None else _credentials(root)
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._lock = threading.Lock()
        self._unanswered: float | None = None  # when the first call began of those since the last answer
        self._connect()

    def call(self, name: str, message: bytes, timeout: float) -> bytes:
        """The reply to a message.

        Args:
            name: Of the method.
            message: As :func:`~dynamax.serving.wire.packed` makes it.
            timeout: Seconds.

        Raises:
            grpc.RpcError: If there is none.
        """
        begin = time.monotonic()
        try:
            reply = self._started(name, message, timeout, wait=True)
        except grpc.RpcError as error:
            self._note(begin, error.code())
            raise
        self._note(begin, grpc.StatusCode.OK)
        return reply

    def future(self, name: str, message: bytes, timeout: float) -> Any:  # noqa: ANN401 - grpc's future
        """As :meth:`call`, without waiting: gRPC's future of the reply."""
        begin = time.monotonic()
        call = self._started(name, message, timeout, wait=False)
        call.add_done_callback(lambda done: self._note(begin, done.code()))
        return call

    def close(self) -> None:
        """End it, with the calls under way."""
        self._channel.close()

    def _connect(self) -> None:
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self._address, OPTIONS)
        else:
            self._channel = grpc.secure_channel(self._address, self._credentials, OPTIONS)
        self._calls = {name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in METHODS}

    def _started(self, name: str, message: bytes, timeout: float, *, wait: bool) -> Any:  # noqa: ANN401
        while True:
            calls = self._calls
            start = calls[name] if wait else calls[name].future
            try:
                return start(message, timeout, metadata=self._metadata)
            except ValueError:  # what gRPC says of a channel that is closed
                if calls is self._calls:
                    raise

    def _note(self, begin: float, code: grpc.StatusCode) -> None:
        """Connect anew, if a call was late and none was answered for some time."""
        with self._lock:
            if code is grpc.StatusCode.CANCELLED:  # by this side
                return
            if code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                self._unanswered = None
                return
            self._unanswered = begin if self._unanswered is None else min(begin, self._unanswered)
            if time.monotonic() - self._unanswered < SILENT:
                return
            self._unanswered, old = None, self._channel
            self._connect()
        old.close()


def _credentials(root: Path) -> grpc.ChannelCredentials:
    try:
        return grpc.ssl_channel_credentials(root.read_bytes())
    except OSError as error:
        raise UserError(f"The certificate {root} cannot be read: {error}. Give the cloud's, as PEM.") from error
