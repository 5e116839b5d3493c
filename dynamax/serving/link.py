"""The edge's side of the wire: states go up in the background, each once; a token is waited for no longer than allowed.

What was sent of an answer is kept until it ends, so that a cloud that has lost it can be sent it again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import torch
from torch import Tensor

from dynamax.backbones.parts import Part
from dynamax.errors import UserError
from dynamax.serving.connection import Connection
from dynamax.serving.sent import WORTH, Sent, Traffic
from dynamax.serving.wire import CHUNK, VERSION, packed, unpacked, wire_format

PAUSE = 0.02
"""Seconds before a call that failed is made again; twice as long each time, up to a second."""


class CloudDown(UserError):
    """The cloud did not answer in time."""


class Link:
    """A connection to a cloud. One answer at a time.

    Args:
        address: Of the cloud, ``HOST:PORT``.
        part: The edge's part of the model.
        format: How states travel: float32, float16, bfloat16, int8 or int4.
        token: Bearer token.
        root: Certificate that vouches for the cloud's, as a PEM file; TLS is used if there is one.
        timeout: Seconds that a token may take, all tries together.

    Attributes:
        start: Depth at which states are sent.
        exact: Whether states arrive as they are.
        traffic: Of the answer under way, or of the last one.
    """

    def __init__(
        self,
        address: str,
        part: Part,
        *,
        format: str = "float32",  # noqa: A002 - the name of the option
        token: str | None = None,
        root: Path | None = None,
        timeout: float = 10.0,
    ) -> None:
        if not 0 < timeout < math.inf:
            raise UserError(f"timeout is {timeout}; it must be above 0, in seconds.")
        if part.sends is None:
            raise UserError("A cloud's part was given to an edge. Give the part in the folder edge.")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise UserError(
                "The bearer token has other characters than printable ASCII, or several lines. Give one token."
            )
        self.address, self.timeout = address, timeout
        self.traffic = Traffic()
        self._part, self.start = part, part.sends
        self._name, self._format, self.exact = format, wire_format(format), format == "float32"
        self._worth = min(CHUNK, math.ceil(WORTH / self._format.size(1, part.width)))
        self._tls = root is not None
        self._connection = Connection(address, token=token, root=root)
        self._sent = Sent()
        self._closing: Any = None
        self._changed, self._opening = threading.Condition(), threading.Lock()
        self._closed = False
        self._sender = threading.Thread(target=self._send_all, name="dynamax-link", daemon=True)
        self._sender.start()

    # -- an answer ----------------------------------------------------------------------------------------

    def begin(self, wanted: int = 0) -> None:
        """A new answer; whatever was under way is dropped, here and in the cloud.

        Args:
            wanted: Positions that prompt and answer may have; if it is told, the session is opened in the background.
        """
        self.end()
        with self._changed:
            self._sent, self.traffic = Sent(wanted, self._worth), Traffic()
            self._changed.notify_all()

    @property
    def opened(self) -> bool:
        """Whether the cloud has a session for this answer."""
        return self._sent.session is not None

    def end(self) -> None:
        """The answer is done: the cloud may forget it."""
        sent, self._sent = self._sent, Sent()
        if sent.session is not None:
            self._close(sent.session)

    def send(self, h_TW: Tensor) -> None:
        """The next positions, as they have passed the depth of the cut; they go up in the background."""
        with self._changed:
            self._sent.rows += h_TW.unbind()
            self._changed.notify_all()

    def next(self, drafts: Sequence[int] = (), timeout: float | None = None) -> tuple[list[int], int]:
        """The most likely tokens after all positions that were sent, and how many drafts the cloud would have said too.

        Positions behind the drafts that were kept are forgotten, here and there.

        Args:
            drafts: Tokens that the last positions were read from.
            timeout: Seconds to wait; the link's own if left out.

        Raises:
            CloudDown: If it takes longer.
            UserError: If the cloud refuses: another model, an unknown token, no room in its context.
        """
        begin, sent = time.monotonic(), self._sent
        until, pause, reason = begin + (self.timeout if timeout is None else timeout), PAUSE, "it missed states"
        self.traffic.asked += 1
        try:
            while True:
                try:
                    reply = self._ask(sent, drafts, until)
                    if "likely" in reply:
                        self._take_back(sent, len(sent.rows) - len(drafts) + reply["kept"], reply["turn"])
                        self.traffic.cloud += reply["seconds"]
                        return reply["likely"], reply["kept"]
                    self._send_again(sent, reply["missing"], reply["turn"])
                except grpc.RpcError as error:
                    self._sort(error, sent)
                    reason = _reason(error)
                except TimeoutError:
                    reason = "no session could be opened"
                if time.monotonic() + pause > until:
                    raise CloudDown(self._told(until - begin, reason))
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
        finally:
            self.traffic.waited += time.monotonic() - begin

    def fault(self, timeout: float = 2.0) -> str | None:
        """Why the cloud does not answer now, in a sentence; None if it does."""
        try:
            self._call("health", {}, time.monotonic() + timeout)
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION):
                return self._told(timeout, _reason(error))
        return None

    def _told(self, waited: float, reason: str) -> str:
        return f"The cloud at {self.address} did not answer within {waited:.3g} s: {reason}. {self._remedy(reason)}"

    def _remedy(self, reason: str) -> str:
        if self._tls and "handshake" in reason.lower():
            return "Give the certificate that vouches for it as edge.root, or none for a cloud without TLS."
        if any(sign in reason for sign in ("Socket closed", "reset", "HTTP/2", "preface")):
            return (
                "Something listens there, and speaks otherwise: a cloud with a certificate wants edge.root, and the "
                "address of a page or of metrics is not the cloud's."
            )
        return "Start it, or correct the address; with a deadline the edge answers alone meanwhile."

    def close(self) -> None:
        """End the connection."""
        self.end()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._sender.join(2.0)
        if self._closing is not None:
            self._closing.exception()  # wait for it; a cloud that is gone has forgotten
        self._connection.close()

    # -- calls ---------------------------------------------------------------------------------------------

    def _call(self, name: str, header: dict[str, Any], until: float, body: bytes = b"") -> dict[str, Any]:
        left = max(0.001, until - time.monotonic())
        return unpacked(self._connection.call(name, packed(header, body), left)).header

    def _close(self, session: str) -> None:
        self._closing = self._connection.future("close", packed({"session": session}), 1.0)

    def _session(self, sent: Sent, until: float) -> str:
        """The name of the session; opened if need be. A TimeoutError if another thread is at it for too long."""
        if not self._opening.acquire(timeout=max(0.001, until - time.monotonic())):
            raise TimeoutError
        try:
            session = sent.session
            if session is None:
                facts = {"version": VERSION, "fingerprint": self._part.fingerprint}
                facts |= {"start": self.start, "width": self._part.width}
                reply = self._call("open", facts, until)
                session = sent.session = str(reply["session"])
                sent.received = sent.handed = sent.turn = 0
                if sent.wanted > reply["positions"]:
                    sent.fault = UserError(
                        f"The cloud at {self.address} keeps {reply['positions']} positions of an answer, but prompt "
                        f"and answer may have {sent.wanted}. Ask for fewer tokens, or start it with more --positions."
                    )
                if sent is not self._sent:  # the answer ended meanwhile
                    self._close(session)
            return session
        finally:
            self._opening.release()

    def _ask(self, sent: Sent, drafts: Sequence[int], until: float) -> dict[str, Any]:
        """One try. Positions that have not gone yet go with it."""
        session = self._session(sent, until)
        if sent.fault is not None:
            raise sent.fault
        with self._changed:
            if sent.lost:
                sent.handed, sent.lost = sent.received, False
                self._changed.notify_all()
            self._changed.wait_for(
                lambda: sent.left <= CHUNK or sent.lost or sent.fault, max(0.0, until - time.monotonic())
            )
        states, body = self._taken(sent, session)
        header = {"session": session, "after": len(sent.rows), "drafts": list(drafts), **states}
        try:
            return self._call("next", header, until, body)
        except grpc.RpcError:
            with self._changed:  # what went with it may not have come
                sent.handed = min(sent.handed, states.get("first", sent.handed))
                self._changed.notify_all()
            raise

    def _taken(self, sent: Sent, session: str) -> tuple[dict[str, Any], bytes]:
        """The next message of states: its header and its body; of nothing, if all have gone, or the session has."""
        with self._changed:
            turn, first = sent.turn, sent.handed
            rows = sent.rows[first : first + CHUNK] if session == sent.session else []
            sent.handed += len(rows)
        if not rows:
            return {"turn": turn}, b""
        body = self._format.encode(torch.stack(rows))
        self.traffic.sent += len(body)
        self.traffic.positions += len(rows)
        return {"turn": turn, "first": first, "count": len(rows), "format": self._name}, body

    def _send_again(self, sent: Sent, first: int, turn: int) -> None:
        """Send positions from ``first`` on once more."""
        with self._changed:
            sent.turn, sent.received, sent.handed, sent.lost = turn, first, first, False
            self._changed.notify_all()

    def _take_back(self, sent: Sent, count: int, turn: int) -> None:
        """Forget all positions from ``count`` on, as the cloud has."""
        with self._changed:
            sent.turn, sent.received, sent.handed = turn, count, count
            del sent.rows[count:]

    def _sort(self, error: grpc.RpcError, sent: Sent) -> None:
        """Return if the call may be made again; else say what the cloud refuses."""
        code, told = error.code(), error.details() or ""
        if code is grpc.StatusCode.NOT_FOUND:  # the cloud was restarted, or needed the room
            sent.session, sent.turn, sent.received = None, 0, 0
            self.traffic.again += 1
        elif code is grpc.StatusCode.UNAUTHENTICATED:
            raise UserError(
                f"The cloud at {self.address} does not know this edge: {told}. Give it the token."
            ) from error
        elif code is grpc.StatusCode.FAILED_PRECONDITION:
            raise UserError(
                f"The cloud at {self.address} does not fit this edge: {told}. Use the two folders of one split."
            ) from error
        elif code is grpc.StatusCode.INVALID_ARGUMENT:
            raise UserError(f"The cloud at {self.address} refuses what was sent: {told}.") from error

    # -- the background ------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        """Send what is ready. While a message is under way others gather, and go together."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._sent.ready)
                sent = self._sent
            if self._closed:
                return
            try:
                self._send_one(sent)
            except (grpc.RpcError, TimeoutError):
                sent.lost = True
            except UserError as error:
                sent.fault = error
            except Exception as error:  # noqa: BLE001 - nobody waits for this thread
                sent.fault = UserError(f"States cannot be sent to the cloud at {self.address}: {error!r:.200}.")

    def _send_one(self, sent: Sent) -> None:
        """Send one message, without waiting for the answer; what does not arrive is noticed by the next ask."""
        session = self._session(sent, time.monotonic() + self.timeout)
        if sent is not self._sent:  # the answer is over
            return
        states, body = self._taken(sent, session)
        if not body:  # an ask took them along
            return
        with self._changed:
            sent.flying += 1
            self._changed.notify_all()
        header = {"session": session, **states}
        call = self._connection.future("send", packed(header, body), self.timeout)
        call.add_done_callback(lambda done: self._arrived(sent, session, states["turn"], done))

    def _arrived(self, sent: Sent, session: str, turn: int, call: Any) -> None:  # noqa: ANN401 - grpc's future
        """Take note of what the cloud has; what a message of an earlier session or turn says is of no use."""
        with self._changed:
            sent.flying -= 1
            self._changed.notify_all()
            if session != sent.session or turn != sent.turn:
                return
            if call.code() is grpc.StatusCode.OK:
                reply = unpacked(call.result()).header
                if reply["turn"] == turn:
                    sent.received = max(sent.received, reply["received"])
                return
            sent.lost = True
            if call.code() is grpc.StatusCode.INVALID_ARGUMENT:
                told = call.details()
                sent.fault = UserError(f"The cloud at {self.address} refuses the states: {told}.")


def _reason(error: grpc.RpcError) -> str:
    """What went wrong, in a few words: gRPC's own are led by a chain of addresses."""
    told = (error.details() or str(error.code())).splitlines()[0]
    if "Connection refused" in told:
        return "nothing listens there (connection refused)"
    if "DNS resolution" in told or "domain name" in told:
        return "there is no such host"
    return "it is slow, or silent" if "Deadline Exceeded" in told else told.rpartition("last error: ")[2].strip(". ")
